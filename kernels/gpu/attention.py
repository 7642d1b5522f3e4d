"""Attention of a few tokens over a long cache: every split of the keys by itself, then their ordered sum.

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
SPLIT = 64  # positions that a program sees
WAYS = 8  # splits whose sums are loaded at once


@triton.jit(do_not_specialize=["T", "C", "offset", "width", "chunk"])
def attention_kernel(
    q, keys, values, positions, prefix_lens, paths, sums, weights, T, C, offset, width, chunk,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    TREE: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q [B*T, H*E] over keys and values [B, G, C, E]; a program owns one split of TILE tokens of one KV head.

    paths int32 [B, T, width] with TREE (then TILE = 1). It leaves sums f32 [programs, 16, E], the values weighted by e to their
    scores less the largest one, and weights f32 [programs, 2, 16], that score and the sum of the exponentials. A split that its
    tokens do not see leaves nothing. Splits that hold none of this forward's keys are loaded before the wait.
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
    if (split < (start // chunk * chunk if CHUNK else 0) // SPLIT) | (split > last // SPLIT):
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
    acc = tl.dot(p.to(dtype), v, input_precision="ieee")
    mine = (tl.program_id(2) * G + g) * tl.num_programs(0) + split
    tl.store(weights + mine * 32 + lane, best)
    tl.store(weights + mine * 32 + 16 + lane, tl.sum(p, 1))
    tl.store(sums + (mine * 16 + lane)[:, None] * E + channel[None, :], acc, mask[:, None])


@triton.jit(do_not_specialize=["T", "splits", "chunk"])
def add_splits_kernel(
    sums, weights, positions, out, largest, next_scale, T, splits, chunk,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, WAYS: tl.constexpr,
    TREE: tl.constexpr, CHUNK: tl.constexpr, LARGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One softmax (2205.14135) of what `attention_kernel` left of one token's head, in the order of splits: out [B*T, H*E].

    WAYS splits are added at once, from multiples of WAYS on, so that the order is a matter of positions. An out in e4m3 is
    rounded by next_scale. LARGEST: the largest magnitude, too: f32 [B*T, H].
    """
    R: tl.constexpr = H // G
    PAD: tl.constexpr = 16 if TREE else 16 // TILE
    row, head = tl.program_id(0), tl.program_id(1)
    b, token = row // T, row % T
    lane = token % TILE * PAD + head % R
    here = ((b * tl.cdiv(T, TILE) + token // TILE) * G + head // R) * splits
    position = tl.load(positions + row)
    low, high = (position // chunk * chunk if CHUNK else 0) // SPLIT, position // SPLIT
    way, channel = tl.arange(0, WAYS), tl.arange(0, E)
    best = tl.max(tl.full((WAYS,), float("-inf"), tl.float32), 0)
    total = tl.sum(tl.zeros((WAYS,), tl.float32), 0)
    acc = tl.zeros((E,), tl.float32)
    wait(PDL)
    for begin in range(low // WAYS * WAYS, high + 1, WAYS):
        split = begin + way
        there = (split >= low) & (split <= high)
        m = tl.load(weights + (here + split) * 32 + lane, there, other=float("-inf"))
        t = tl.load(weights + (here + split) * 32 + 16 + lane, there, other=0.0)
        a = tl.load(sums + ((here + split) * 16 + lane)[:, None] * E + channel[None, :], there[:, None], other=0.0)
        higher = tl.maximum(best, tl.max(m, 0))
        shrink, grow = tl.exp(best - higher), tl.exp(m - higher)
        total = total * shrink + tl.sum(t * grow, 0)
        acc = acc * shrink + tl.sum(a * grow[:, None], 0)
        best = higher
    result = (acc / total).to(out.dtype.element_ty if out.dtype.element_ty != tl.float8e4nv else tl.bfloat16)
    at = row * (H * E) + head * E + channel
    if out.dtype.element_ty == tl.float8e4nv:
        tl.store(out + at, to_fp8(result.to(tl.float32) * (1.0 / tl.load(next_scale))))
    else:
        tl.store(out + at, result)
    if LARGEST:
        tl.store(largest + row * H + head, tl.max(tl.abs(result.to(tl.float32)), 0))


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
    """Launch it: queries [M, H*E] over the cache [B, G, C, E] -> [M, H*E], in e4m3 by a scale; fills largest f32 [M, H]."""
    batch, tokens = inputs.tokens.shape
    _, groups, slots, size = keys.shape
    heads = q.shape[1] // size
    tree = inputs.paths is not None
    tile = 1 if tree else max(1, ROWS // triton.next_power_of_2(heads // groups))
    grid = triton.cdiv(slots, SPLIT), groups, batch * triton.cdiv(tokens, tile)
    programs = grid[0] * grid[1] * grid[2]
    sums = torch.empty((programs, ROWS, size), device=q.device)
    weights = torch.empty((programs, 2, ROWS), device=q.device)
    out = torch.empty_like(q, dtype=q.dtype if scale is None else FP8)
    positions = inputs.positions.contiguous()
    paths = inputs.paths.contiguous() if inputs.paths is not None else inputs.prefix_lens
    shape = {"H": heads, "G": groups, "E": size, "TILE": tile, "SPLIT": SPLIT, "TREE": tree, "CHUNK": chunk > 0}
    attention_kernel[grid](
        q, keys, values, positions, inputs.prefix_lens, paths, sums, weights,
        tokens, slots, inputs.offset, paths.shape[-1], chunk, **shape, num_warps=4, **ops.launch(),
    )  # fmt: skip
    add_splits_kernel[(batch * tokens, heads)](
        sums, weights, positions, out, sums if largest is None else largest, sums if scale is None else scale,
        tokens, grid[0], chunk, **shape, WAYS=WAYS, LARGEST=largest is not None, num_warps=1, **ops.launch(),
    )  # fmt: skip
    return out
