"""Attention of a few tokens over a long cache in one launch: split keys, ordered combine.

B rows, T tokens, H query heads, G KV heads, R = H / G, E head size, C cache slots. Queries come rotated and scaled, keys and
values of this forward lie in their slots (heads.py). A split is SPLIT positions from a multiple of SPLIT on, so keys are
summed in the order of their positions whatever the forward's shape; a tree's nodes lie in other slots than their positions
and are gathered along the path.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.linear import to_fp8
from specdec.kernels.gpu.pdl import wait
from specdec.kernels.reference import FP8
from specdec.types import ModelInputs

ROWS = 16  # query rows of a program: TILE tokens of R heads each, padded
SPLIT = 128  # positions that a program sees


@triton.jit
def fold(best, total, acc, m, t, a):
    """Add one split's result to a running softmax (2205.14135): largest score, weight, and weighted values."""
    higher = tl.maximum(best, m)
    base = tl.where(higher > float("-inf"), higher, 0.0)
    shrink, grow = tl.exp(best - base), tl.exp(m - base)
    return higher, total * shrink + t * grow, acc * shrink[:, None] + a * grow[:, None]


@triton.jit
def load_split(sums, weights, at, mask, E: tl.constexpr):
    """What a program left of its rows; of a split that does not exist nothing is read, and nothing will be added."""
    lane, channel = tl.arange(0, 16), tl.arange(0, E)
    there = mask & (lane * 0 + at >= 0)
    m = tl.load(weights + at * 32 + lane, there, other=float("-inf"), cache_modifier=".cg")
    t = tl.load(weights + at * 32 + 16 + lane, there, other=0.0, cache_modifier=".cg")
    where = (at * 16 + lane)[:, None] * E + channel[None, :]
    return m, t, tl.load(sums + where, there[:, None], other=0.0, cache_modifier=".cg")


@triton.jit(do_not_specialize=["T", "C", "offset", "width", "chunk"])
def attention_kernel(
    q, keys, values, positions, prefix_lens, paths, sums, weights, arrived, out, largest, next_scale,
    T, C, offset, width, chunk,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    TREE: tl.constexpr, CHUNK: tl.constexpr, LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """q [B*T, H*E], keys and values [B, G, C, E] -> out [B*T, H*E]; a program owns one split of TILE tokens of one KV head.

    paths int32 [B, T, width] with TREE (then TILE = 1). sums f32 [programs, 16, E] and weights f32 [programs, 2, 16] carry
    what a split found; the last program to arrive adds the splits in order. `arrived` int32, one for each group of splits, is
    zero before and after. An out in e4m3 is rounded by next_scale. LARGEST: the largest magnitude of each token's results,
    f32 [B*T, G]. Splits that hold none of this
    forward's keys are loaded before the wait.
    """
    R: tl.constexpr = H // G
    PAD: tl.constexpr = 16 if TREE else 16 // TILE
    split, g = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(T, TILE)
    b, first = tl.program_id(2) // tiles, tl.program_id(2) % tiles * TILE
    prefix = tl.load(prefix_lens + b)
    lane, channel = tl.arange(0, 16), tl.arange(0, E)
    token, head = first + lane // PAD, lane % PAD
    mask = (token < T) & (head < R)
    row = b * T + token
    position = tl.load(positions + row, token < T, other=0)
    oldest = position // chunk * chunk if CHUNK else tl.zeros((16,), tl.int32)
    start = tl.load(positions + b * T + first)  # a tile is a piece of a chain, or one token
    last = tl.load(positions + b * T + tl.minimum(first + TILE, T) - 1)
    low = (start // chunk * chunk if CHUNK else 0) // SPLIT
    high = last // SPLIT
    if (split < low) | (split > high):
        wait(PDL)
        return
    at = split * SPLIT + tl.arange(0, SPLIT)
    node = at - prefix
    if TREE:
        on_path = tl.load(paths + (b * T + first) * width + node, (node >= 0) & (node < width), other=-1)
        node = tl.where(at < prefix, node, on_path)
    slot = ((b * G + g).to(tl.int64) * C + prefix + node)[:, None] * E + channel[None, :]
    there = (at <= last)[:, None]
    own = split * SPLIT + SPLIT > (prefix if TREE else prefix + offset)  # a tree's slots say nothing of positions
    if own:
        wait(PDL)
    dtype: tl.constexpr = q.dtype.element_ty
    k = tl.load(keys + slot, there, other=0.0, cache_modifier=".cg").to(dtype)
    v = tl.load(values + slot, there, other=0.0, cache_modifier=".cg").to(dtype)
    if not own:
        wait(PDL)
    where = row[:, None] * (H * E) + (g * R + head)[:, None] * E + channel[None, :]
    score = tl.dot(tl.load(q + where, mask[:, None], other=0.0), tl.trans(k), input_precision="ieee")
    seen = (at[None, :] <= position[:, None]) & (at[None, :] >= oldest[:, None])
    score = tl.where(seen, score, float("-inf"))
    best = tl.max(score, 1)
    p = tl.exp(score - tl.where(best > float("-inf"), best, 0.0)[:, None])
    total = tl.sum(p, 1)
    acc = tl.dot(p.to(dtype), v, input_precision="ieee")
    if high > low:
        group = tl.program_id(2) * G + g
        mine = group * tl.num_programs(0) + split
        tl.store(sums + (mine * 16 + lane)[:, None] * E + channel[None, :], acc)
        tl.store(weights + mine * 32 + lane, best)
        tl.store(weights + mine * 32 + 16 + lane, total)
        tl.debug_barrier()
        if tl.atomic_add(arrived + group, 1, sem="acq_rel") < high - low:
            return
        tl.store(arrived + group, 0)
        best = tl.full((16,), float("-inf"), tl.float32)
        total = tl.zeros((16,), tl.float32)
        acc = tl.zeros((16, E), tl.float32)
        for s in range(low, high + 1, 4):  # four at a time, so that their loads overlap
            theirs = group * tl.num_programs(0) + s
            m0, t0, a0 = load_split(sums, weights, theirs, mask, E)
            m1, t1, a1 = load_split(sums, weights, tl.where(s + 1 <= high, theirs + 1, -1), mask, E)
            m2, t2, a2 = load_split(sums, weights, tl.where(s + 2 <= high, theirs + 2, -1), mask, E)
            m3, t3, a3 = load_split(sums, weights, tl.where(s + 3 <= high, theirs + 3, -1), mask, E)
            best, total, acc = fold(best, total, acc, m0, t0, a0)
            best, total, acc = fold(best, total, acc, m1, t1, a1)
            best, total, acc = fold(best, total, acc, m2, t2, a2)
            best, total, acc = fold(best, total, acc, m3, t3, a3)
    result = (acc / total[:, None]).to(dtype)
    if out.dtype.element_ty == tl.float8e4nv:
        tl.store(out + where, to_fp8(result.to(tl.float32) * (1.0 / tl.load(next_scale))), mask[:, None])
    else:
        tl.store(out + where, result, mask[:, None])
    if LARGEST:
        found = tl.where(mask, tl.max(tl.abs(result.to(tl.float32)), 1), 0.0)
        which = first + tl.arange(0, 16 // PAD)
        tl.store(largest + (b * T + which) * G + g, tl.max(tl.reshape(found, (16 // PAD, PAD)), 1), which < T)


def attention(
    ops: Any,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    inputs: ModelInputs,
    chunk: int,
    largest: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Launch it: queries [M, H*E] over the cache [B, G, C, E] -> [M, H*E], in e4m3 by a scale; fills largest f32 [M, G]."""
    batch, tokens = inputs.tokens.shape
    _, groups, slots, size = keys.shape
    heads = q.shape[1] // size
    tree = inputs.paths is not None
    per_program = 1 if tree else max(1, ROWS // triton.next_power_of_2(heads // groups))
    grid = triton.cdiv(slots, SPLIT), groups, batch * triton.cdiv(tokens, per_program)
    assert grid[1] * grid[2] <= len(ops.arrived), "more groups of splits than counters"
    programs = grid[0] * grid[1] * grid[2]
    sums = torch.empty((programs, ROWS, size), device=q.device)
    weights = torch.empty((programs, 2, ROWS), device=q.device)
    out = torch.empty_like(q, dtype=q.dtype if scale is None else FP8)
    paths = inputs.paths.contiguous() if inputs.paths is not None else inputs.prefix_lens
    attention_kernel[grid](
        q, keys, values, inputs.positions.contiguous(), inputs.prefix_lens, paths, sums, weights, ops.arrived, out,
        sums if largest is None else largest, sums if scale is None else scale,
        tokens, slots, inputs.offset, paths.shape[-1], chunk,
        H=heads, G=groups, E=size, TILE=per_program, SPLIT=SPLIT, TREE=tree, CHUNK=chunk > 0, LARGEST=largest is not None,
        num_warps=4 if size <= 64 else 8, **ops.launch(),
    )  # fmt: skip
    return out
