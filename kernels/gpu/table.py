"""Which tile each product uses. A function of (N, K) and the weights' width alone: the number of tokens must not show.

Measured on one H200 with `experiments/gpu_kernels.py --tune`; other shapes follow the same rule of thumb.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

PROGRAMS = 132  # multiprocessors to keep busy


@dataclass(frozen=True, slots=True)
class Tile:
    """BN weight rows by BK inputs a turn, K in `splits` parts; warps and pipeline stages of the program."""

    BN: int
    BK: int
    splits: int = 1
    warps: int = 4
    stages: int = 4


TUNED: dict[tuple[str, int, int, int], Tile] = {  # (kind, N, K, bytes a weight) -> tile
    # one rank of eight of Llama 4 Maverick
    ("qkv", 896, 5120, 1): Tile(64, 128, 10, 4, 4),
    ("add", 5120, 640, 1): Tile(64, 128, 1, 4, 5),
    ("norm", 4096, 5120, 1): Tile(64, 128, 1, 4, 8),
    ("add", 5120, 2048, 1): Tile(64, 128, 2, 4, 8),
    ("norm", 25256, 5120, 2): Tile(64, 128, 1, 4, 4),
    ("expert_gate_up", 2048, 5120, 1): Tile(64, 256, 1, 4, 5),
    ("expert_down", 5120, 1024, 1): Tile(64, 128, 1, 4, 8),
}


@cache
def tile(kind: str, n: int, k: int, width: int) -> Tile:
    """kind: "burst" (K in one go), "norm" and "expert_gate_up" (whole K a program), "qkv", "add", "expert_down" (K split)."""
    if found := TUNED.get((kind, n, k, width)):
        return found
    rows = next((rows for rows in (64, 32) if n // rows >= PROGRAMS), 16)
    if kind == "burst":
        return Tile(min(rows, 32), k, warps=4, stages=1) if k <= 1024 else Tile(16, k, warps=8, stages=1)
    splits = 1
    if kind == "add":
        while n // rows * splits < PROGRAMS and k % (2 * splits) == 0 and k // (2 * splits) >= 256 and splits < 8:
            splits *= 2
    inputs = 256 // width
    while inputs > 32 and inputs > k // splits:
        inputs //= 2
    return Tile(rows, inputs, splits)
