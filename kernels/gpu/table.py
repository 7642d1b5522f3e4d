"""Which tile each product uses. A function of (N, K) and the weights' width alone: the number of tokens must not show."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

PROGRAMS = 64  # that keep the memory busy, where each asks for whole blocks in advance
BLOCK = 512  # bytes of a row in a block: fewer turns for the same weights, whose overhead is what a program waits for
SMALL_BLOCK = 128  # where blocks come through registers, below Hopper, and more would be spilled


@dataclass(frozen=True, slots=True)
class Tile:
    """BN weight rows by BK inputs a turn, K in `splits` parts; warps and pipeline stages of the program."""

    BN: int
    BK: int
    splits: int = 1
    warps: int = 4
    stages: int = 4


TUNED: dict[tuple[str, int, int, int], Tile] = {  # (kind, N, K, bytes a weight) -> tile
    # one rank of eight of Llama 4 Maverick, on an H200
    ("qkv", 896, 5120, 1): Tile(64, 512, 5, stages=3),
    ("add", 5120, 640, 1): Tile(64, 128, stages=6),
    ("norm", 4096, 5120, 1): Tile(64, 512, stages=5),
    ("add", 5120, 2048, 1): Tile(64, 512, stages=4),
    ("norm", 25256, 5120, 2): Tile(64, 256, stages=4),
    ("expert_gate_up", 2048, 5120, 1): Tile(64, 256, stages=5),
    ("expert_down", 5120, 1024, 1): Tile(64, 512, stages=2),
}


@cache
def tile(kind: str, n: int, k: int, width: int, block: int = BLOCK) -> Tile:
    """kind: "burst" (K in one go); "norm", "expert_gate_up", "expert_down" (in turns, all of K); "qkv", "add" (or a part)."""
    if block == BLOCK and (found := TUNED.get((kind, n, k, width))):
        return found
    if kind == "burst":
        rows = next((rows for rows in (64, 32) if n // rows >= 2 * PROGRAMS), 16)
        return Tile(min(rows, 32), k, warps=4, stages=1) if k <= 1024 else Tile(16, k, warps=8, stages=1)
    inputs = block // width
    while inputs > 32 and inputs > k:
        inputs //= 2
    splits = 1
    while kind in ("qkv", "add") and n // 64 * splits < PROGRAMS and k % (2 * splits * inputs) == 0 and splits < 8:
        splits *= 2
    return Tile(64, inputs, splits, stages=4)
