"""Programmatic dependent launch: a kernel starts while its predecessors still run, loads weights, and then waits for them.

A kernel that calls `trigger` at its start lets the next one start as well, so several wait in a row; because every one waits,
whoever has waited sees all that was launched before. Before its wait a kernel may read only what was written before the last
ordinary launch (weights, and all that an earlier step or forward left) - unless its predecessor triggers after its own wait:
then everything before that predecessor is done too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

__all__ = ["prefetch_rows", "trigger", "wait"]


@triton.jit
def trigger(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until the kernels before have finished and their writes are visible."""
    if PDL:
        cuda.gdc_wait()


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
