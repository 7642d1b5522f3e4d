"""Memory for what is read at every token: aligned to cache lines, on huge pages where the system grants them."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_PAGE = 1 << 21
_BLOCK = 1 << 26
_block: Tensor | None = None  # what is left of the block that small requests are cut from


def aligned_empty(numel: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised 1-D tensor that starts at a cache line."""
    size = numel * dtype.itemsize
    raw = torch.empty(size + 64, dtype=torch.uint8)
    start = -raw.data_ptr() % 64
    return raw[start : start + size].view(dtype)


def weight_empty(numel: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised 1-D tensor for weights: 64-byte aligned, one after the other in blocks of huge pages.

    Streaming weights through 4 KB pages costs a page walk every 64 cache lines. A block is freed with its last tensor.
    """
    global _block
    size = numel * dtype.itemsize
    size += -size % 64
    if _block is None or _block.numel() < size:
        fresh = _map(max(size, _BLOCK))
        if size >= _BLOCK:
            return fresh[: numel * dtype.itemsize].view(dtype)
        _block = fresh
    taken, _block = _block[: numel * dtype.itemsize], _block[size:]
    return taken.view(dtype)


def _map(size: int) -> Tensor:
    """Anonymous memory from a huge-page border on, uint8."""
    size += -size % _PAGE
    memory = mmap.mmap(-1, size + _PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping alive
    start = -raw.data_ptr() % _PAGE
    return raw[start : start + size]
