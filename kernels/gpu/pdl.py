"""Programmatic dependent launch: a kernel starts while its predecessor still runs, loads weights, and then waits for it.

Every kernel of a chain waits, and only then lets the next one start. So when a kernel starts, all before its immediate
predecessor have finished: before `wait` it may read anything that the kernel just before it does not write. Letting the next
one start earlier was slower by a third: kernels that wait in a row take room and bandwidth from those that work. So was asking
for the weights of kernels further on: a program does not end before what it has asked for is there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

__all__ = ["prefetch_rows", "wait"]


@triton.jit
def wait(PDL: tl.constexpr):
    """Until the kernel before has finished and its writes are visible; then the next one may start."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def prefetch_rows(
    ptr, row, stride: tl.constexpr, bytes_per_row: tl.constexpr, ROWS: tl.constexpr, N, PDL: tl.constexpr
):
    """Ask for ROWS rows of a matrix from `row` on, N in all, to be brought to the L2. ptr [N, stride] bytes.

    One bulk request a thread: rows are cut in equal pieces, so that 128 threads have one each. Requests are of whole 16 bytes.
    """
    if PDL and stride % 16 == 0 and bytes_per_row % 16 == 0:
        PIECES: tl.constexpr = 128 // ROWS if ROWS < 128 else 1
        SIZE: tl.constexpr = (bytes_per_row // PIECES) // 16 * 16
        if SIZE > 0:
            piece = tl.arange(0, ROWS * PIECES)
            at = row + piece // PIECES
            at = tl.minimum(at, N - 1)
            address = ptr.to(tl.int64) + at.to(tl.int64) * stride + (piece % PIECES) * SIZE
            tl.inline_asm_elementwise(
                "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
                "=r,l,r",
                [address, tl.full([ROWS * PIECES], SIZE, tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
