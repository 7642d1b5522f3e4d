"""Programmatic dependent launch: a kernel starts while its predecessor still runs, sets up, and then waits for it.

Every kernel of a chain waits, and only then lets the next one start. So when a kernel starts, all before its immediate
predecessor have finished: before `wait` it may read anything that the kernel just before it does not write. Letting the next
one start earlier was slower by a third: kernels that wait in a row take room and bandwidth from those that work. Asking for
weights before the wait, by bulk requests to the L2, gained nothing for any product of Maverick and cost up to a tenth.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

__all__ = ["wait"]


@triton.jit
def wait(PDL: tl.constexpr):
    """Until the kernel before has finished and its writes are visible; then the next one may start."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
