"""Sums over ranks inside the kernel that normalises next: each rank writes its part into every rank's memory, and waits there.

M tokens, K channels, P partial sums of this rank. A letter is eight bytes, stored at once: a value, and above it the number of
the turn. So a reader sees on the letter itself that it has come, and there is no flag, fence or barrier (NCCL calls this LL).
Two boxes alternate: who posts in turn n has read all letters of turn n - 1, so everybody had read those of turn n - 2, which
are written over. Ranks add in the same order and agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.norm import store_normed
from specdec.kernels.gpu.pdl import wait

BLOCK = 512
THREADS = tl.constexpr(128)  # of a program
PATIENCE = 1 << 29  # looks into the box, of about a microsecond each, before a rank counts as lost


@triton.jit
def letters(values, turn):
    """f32 values as letters of a turn: int64."""
    return (turn.to(tl.int64) << 32) | (values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def values_of(letters):
    """The f32 values of letters."""
    return letters.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def pair_bits(values, BLOCK: tl.constexpr):
    """Neighbours of f32 [BLOCK], rounded to bf16 and side by side: f32 [BLOCK / 2] in name only."""
    even, odd = tl.split(tl.reshape(values, [BLOCK // 2, 2]))
    low = even.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = odd.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (low | high).to(tl.float32, bitcast=True)


@triton.jit
def receive(box, mask, turn, absent, lost, patience):
    """Letters [rows, columns] at `box` once all of this turn have come, or after `patience` looks, which `absent` then says.

    As many letters as threads, or more: where several threads had one, some could see the old while others see the new.
    """
    nothing = turn.to(tl.int64) << 32
    found = tl.load(box, mask, other=nothing, volatile=True)
    looks = tl.load(absent, volatile=True) * patience  # after one loss nothing is worth waiting for
    while (tl.sum(tl.sum((found >> 32 != turn).to(tl.int32), 1), 0) > 0) & (looks < patience):
        found = tl.load(box, mask, other=nothing, volatile=True)
        looks += 1
        if looks == patience:
            tl.store(absent, 1)
            tl.store(lost, 1)
    return found


@triton.jit(do_not_specialize=["M", "rank", "patience"])
def exchange_norm_kernel(
    x, pending, norm, plain, squares, quantised, scales, input_scale,
    boxes, box, parts, turns, absent, lost, rank, patience, M, eps,
    K: tl.constexpr, P: tl.constexpr, PLAIN: tl.constexpr, QUANTISE: tl.constexpr,
    WORLD: tl.constexpr, ROOM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x f32 [M, K] += what all ranks have pending, f32 [P, M, K] each; then as `add_norm_kernel`. A program has BLOCK channels.

    boxes int64 [WORLD]: where each rank's box is; box: this rank's, [2, WORLD, ROOM, K or K / 2] letters; parts: room for
    letters between a token's programs, [ROOM, programs, 2]; turns int32 [ROOM, programs]. HALF: values travel in bf16, two a
    letter. squares f32 [M, programs]. Programs start in order and wait only for those of their own token, here and elsewhere.
    """
    part, token, count = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    WIDTH: tl.constexpr = K // 2 if HALF else K
    STEP: tl.constexpr = BLOCK // 2 if HALF else BLOCK
    channels = part * BLOCK + tl.arange(0, BLOCK)
    mask = channels < K
    at = token * K + channels
    places = part * STEP + tl.arange(0, STEP)
    inside = places < WIDTH
    weight = tl.load(norm + channels, mask, other=0.0)
    wait(PDL)
    mine = tl.zeros((BLOCK,), dtype=tl.float32)
    for p in tl.static_range(P):
        mine += tl.load(pending + p * M * K + at, mask, other=0.0)
    turn = tl.load(turns + token * count + part) + 1
    if HALF:
        mine = pair_bits(mine, BLOCK)
    letter = letters(mine, turn)
    half = turn % 2 * WORLD
    for step in tl.static_range(1, WORLD + 1):  # itself last: that letter has no way to go
        address = tl.multiple_of(tl.load(boxes + (rank + step) % WORLD), 16)
        there = address.to(tl.pointer_type(tl.int64))
        tl.store(there + ((half + rank) * ROOM + token) * WIDTH + places, letter, inside)
    h = tl.load(x + at, mask, other=0.0)
    tl.static_assert(triton.next_power_of_2(WORLD) * STEP >= THREADS)
    ranks = tl.arange(0, triton.next_power_of_2(WORLD))
    own = box + ((half + ranks[:, None]) * ROOM + token) * WIDTH + places[None, :]
    found = values_of(receive(own, inside[None, :] & (ranks[:, None] < WORLD), turn, absent, lost, patience))
    if HALF:
        bits = found.to(tl.int32, bitcast=True)
        low, high = (bits << 16).to(tl.float32, bitcast=True), (bits >> 16 << 16).to(tl.float32, bitcast=True)
        h += tl.reshape(tl.join(tl.sum(low, 0), tl.sum(high, 0)), [BLOCK])
    else:
        h += tl.sum(found, 0)
    tl.store(x + at, h, mask)
    tl.store(turns + token * count + part, turn)
    total = tl.sum(h * h, 0)
    h *= weight
    if PLAIN == "raw":
        tl.store(plain + at, h.to(plain.dtype.element_ty), mask)
        tl.store(squares + token * count + part, total)
    elif PLAIN != "no" or QUANTISE != "no":
        largest = tl.max(tl.abs(h), 0)
        if K > BLOCK:
            COUNT: tl.constexpr = (K + BLOCK - 1) // BLOCK
            table = parts + token * COUNT * 2
            total, largest = over_programs(table, part, total, largest, turn, absent, lost, patience, COUNT)
        factor = tl.rsqrt(total / K + eps)
        store_normed(plain, quantised, scales, input_scale, h, factor, largest, at, at, mask, token, PLAIN, QUANTISE)


@triton.jit
def over_programs(table, part, total, largest, turn, absent, lost, patience, COUNT: tl.constexpr):
    """The sum of `total` and the largest `largest` of a token's programs, which tell each other by letters [COUNT, 2]."""
    tl.store(table + part * 2, letters(total, turn))
    tl.store(table + part * 2 + 1, letters(largest, turn))
    ROWS: tl.constexpr = max(triton.next_power_of_2(COUNT), THREADS // 2)
    programs, kind = tl.arange(0, ROWS)[:, None], tl.arange(0, 2)[None, :]
    found = receive(table + programs * 2 + kind, (programs < COUNT) & (kind < 2), turn, absent, lost, patience)
    values = values_of(found)
    totals, maxima = tl.where(kind == 0, values, 0.0), tl.where(kind == 1, values, 0.0)
    return tl.sum(tl.sum(totals, 1), 0), tl.max(tl.max(maxima, 1), 0)


@dataclass(slots=True, eq=False)
class Mailbox:
    """What one rank exchanges through. Sizes are those of every forward: `tokens` at most, of `channels`."""

    rank: int
    boxes: Tensor  # int64 [world]: addresses of the ranks' boxes, as this process sees them
    box: Tensor  # int64 [2, world, tokens, letters], this rank's
    parts: Tensor  # int64 [tokens, programs, 2]
    turns: Tensor  # int32 [tokens, programs]
    absent: Tensor  # int32 [1]: a rank's letters did not come
    lost: Tensor  # the same in the host's memory, so that it can look without waiting for the device
    half: bool
    block: int  # channels of a program
    patience: int = PATIENCE

    @classmethod
    def open(
        cls, rank: int, world: int, tokens: int, channels: int, half: bool,
        allocate: Callable[[int], tuple[Tensor, Tensor]], block: int = BLOCK,
    ) -> Mailbox:  # fmt: skip
        """allocate: memory for so many letters that all ranks can write, zeros, and where that of every rank lies."""
        if channels % 2:
            raise ValueError(f"{channels} channels do not pair into letters: a hidden size must be even")
        width, programs = channels // 2 if half else channels, triton.cdiv(channels, block)
        box, boxes = allocate(2 * world * tokens * width)
        device = box.device
        return cls(
            rank, boxes, box.view(2, world, tokens, width),
            torch.zeros(tokens, programs, 2, dtype=torch.int64, device=device),
            torch.zeros(tokens, programs, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda"), half, block,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """The longest forward whose sums fit."""
        return self.box.shape[2]

    @property
    def programs(self) -> int:
        """Of a token; each leaves the squares of its channels."""
        return self.parts.shape[1]

    def add_norm(
        self, x: Tensor, pending: Tensor, norm: Tensor, eps: float, plain: Tensor, squares: Tensor, quantised: Tensor,
        scale: Tensor, input_scale: Tensor, mode: str, quantise: str, options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """The kernel above on x f32 [M, K] and this rank's pending f32 [P, M, K]; squares f32 [M, programs]."""
        m, k = x.shape
        exchange_norm_kernel[(self.programs, m)](
            x, pending, norm, plain, squares, quantised, scale, input_scale,
            self.boxes, self.box, self.parts, self.turns, self.absent, self.lost, self.rank, self.patience, m, eps,
            K=k, P=len(pending), PLAIN=mode, QUANTISE=quantise,
            WORLD=len(self.boxes), ROOM=self.tokens, HALF=self.half, BLOCK=self.block, num_warps=THREADS.value // 32, **options,
        )  # fmt: skip
