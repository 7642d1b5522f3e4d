"""Attention of a few tokens over a long cache in one launch: rotary embedding, KV append, split keys, ordered combine.

B rows, T tokens, H query heads, G KV heads, R = H / G, E head size (two halves of E / 2), C cache slots, S parts of the
product. A split is SPLIT positions from a multiple of SPLIT on, so keys are summed in the order of their positions whatever
the forward's shape; a tree's nodes lie in other slots than their positions and are gathered along the path. Keys and values
of this forward come from the product itself, rounded as the cache would round them; the others are loaded before the wait.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.pdl import wait
from specdec.kernels.reference import AttentionRule
from specdec.types import ModelInputs

ROWS = 16  # query rows of a program: TILE tokens of R heads each, padded
SPLIT = 128  # positions that a program sees


@triton.jit
def parts_sum(qkv, at, mask, stride, S: tl.constexpr):
    """Sum of the S parts of the product, in order."""
    x = tl.load(qkv + at, mask, other=0.0)
    for s in tl.static_range(1, S):
        x += tl.load(qkv + s * stride + at, mask, other=0.0)
    return x


@triton.jit
def load_head(qkv, row, head, mask, stride, W: tl.constexpr, S: tl.constexpr, E: tl.constexpr):
    """Both halves [n, E/2] of one head of the rows [n]."""
    at = row[:, None] * W + head[:, None] * E + tl.arange(0, E // 2)[None, :]
    return parts_sum(qkv, at, mask[:, None], stride, S), parts_sum(qkv, at + E // 2, mask[:, None], stride, S)


@triton.jit
def load_angles(cos, sin, position, mask, E: tl.constexpr, ROPE: tl.constexpr):
    """cos and sin [n, E/2] of the positions [n]."""
    angle = position[:, None] * (E // 2) + tl.arange(0, E // 2)[None, :]
    c = tl.zeros(angle.shape, tl.float32)
    s = tl.zeros(angle.shape, tl.float32)
    if ROPE:
        c = tl.load(cos + angle, mask[:, None], other=1.0)
        s = tl.load(sin + angle, mask[:, None], other=0.0)
    return c, s


@triton.jit
def rotated(a, b, c, s, norm, eps, E: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr):
    """Halves [n, E/2] of heads, normalised and rotated. NORM: "none", "weighted" before, "unit" after the rotation."""
    half = tl.arange(0, E // 2)
    if NORM == "weighted":
        r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / E + eps)[:, None]
        a = a * r * tl.load(norm + half)[None, :]
        b = b * r * tl.load(norm + E // 2 + half)[None, :]
    if ROPE:
        a, b = a * c - b * s, b * c + a * s
    if NORM == "unit":
        r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / E + eps)[:, None]
        a, b = a * r, b * r
    return a, b


@triton.jit
def append(
    qkv, keys, values, positions, prefix, cos, sin, k_norm, stride, eps, b, g, first, T, C, offset,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr,
    ROPE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Write the keys and values of TILE tokens from `first` on into their slots behind the prefix."""
    W: tl.constexpr = (H + 2 * G) * E
    token = first + tl.arange(0, TILE)
    mask = token < T
    row = b * T + token
    position = tl.load(positions + row, mask, other=0)
    head = tl.zeros((TILE,), tl.int32) + H + g
    a, c = load_head(qkv, row, head, mask, stride, W, S, E)
    v1, v2 = load_head(qkv, row, head + G, mask, stride, W, S, E)
    cosine, sine = load_angles(cos, sin, position, mask, E, ROPE)
    a, c = rotated(a, c, cosine, sine, k_norm, eps, E, ROPE, NORM)
    half = tl.arange(0, E // 2)
    slot = ((b * G + g).to(tl.int64) * C + prefix + offset + token)[:, None] * E + half[None, :]
    tl.store(keys + slot, a.to(keys.dtype.element_ty), mask[:, None])
    tl.store(keys + slot + E // 2, c.to(keys.dtype.element_ty), mask[:, None])
    tl.store(values + slot, v1.to(values.dtype.element_ty), mask[:, None])
    tl.store(values + slot + E // 2, v2.to(values.dtype.element_ty), mask[:, None])


@triton.jit
def fold(best, total, acc1, acc2, m, t, a1, a2):
    """Add one split's result to a running softmax (2205.14135): largest score, weight, and weighted values in halves."""
    higher = tl.maximum(best, m)
    base = tl.where(higher > float("-inf"), higher, 0.0)
    shrink, grow = tl.exp(best - base), tl.exp(m - base)
    acc1 = acc1 * shrink[:, None] + a1 * grow[:, None]
    acc2 = acc2 * shrink[:, None] + a2 * grow[:, None]
    return higher, total * shrink + t * grow, acc1, acc2


@triton.jit
def load_split(sums, weights, at, E: tl.constexpr):
    """What a program left: of a split that does not exist nothing is read, and nothing will be added."""
    lane, half = tl.arange(0, 16), tl.arange(0, E // 2)
    there = lane * 0 + at >= 0
    m = tl.load(weights + at * 32 + lane, there, other=float("-inf"), cache_modifier=".cg")
    t = tl.load(weights + at * 32 + 16 + lane, there, other=0.0, cache_modifier=".cg")
    where = (at * 16 + lane)[:, None] * E + half[None, :]
    a1 = tl.load(sums + where, there[:, None], other=0.0, cache_modifier=".cg")
    a2 = tl.load(sums + where + E // 2, there[:, None], other=0.0, cache_modifier=".cg")
    return m, t, a1, a2


@triton.jit(do_not_specialize=["T", "C", "offset", "width", "stride", "chunk", "temperature_floor"])
def attention_kernel(
    qkv, keys, values, positions, prefix_lens, paths, cos, sin, q_norm, k_norm, sums, weights, arrived, out,
    T, C, offset, width, stride, scale, eps, chunk, temperature, temperature_floor,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    TREE: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, CHUNK: tl.constexpr, TEMPERATURE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """qkv f32 [S, B*T, (H+2G)*E] -> out [B*T, H*E]; a program owns one split of TILE tokens of one KV head.

    The first programs of each tile append keys and values [B, G, C, E] instead. paths int32 [B, T, width] with TREE (then TILE
    = 1). sums f32 [programs, 16, E] and weights f32 [programs, 2, 16] carry what a split found; the last program to arrive
    adds the splits in order. `arrived` int32, one for each group of splits, is zero before and after.
    """
    R: tl.constexpr = H // G
    PAD: tl.constexpr = 16 if TREE else 16 // TILE
    W: tl.constexpr = (H + 2 * G) * E
    split, g = tl.program_id(0) - 1, tl.program_id(1)
    tiles = tl.cdiv(T, TILE)
    b, first = tl.program_id(2) // tiles, tl.program_id(2) % tiles * TILE
    prefix = tl.load(prefix_lens + b)
    if split < 0:
        wait(PDL)
        append(
            qkv, keys, values, positions, prefix, cos, sin, k_norm, stride, eps, b, g, first, T, C, offset,
            H, G, E, S, TILE, ROPE, NORM,
        )  # fmt: skip
        return
    half, lane = tl.arange(0, E // 2), tl.arange(0, 16)
    token, head = first + lane // PAD, lane % PAD
    mask = (token < T) & (head < R)
    row = b * T + token
    position = tl.load(positions + row, token < T, other=0)
    oldest = position // chunk * chunk if CHUNK else tl.zeros((16,), tl.int32)
    last = tl.max(tl.where(mask, position, 0), 0)
    low = tl.min(tl.where(mask, oldest, 2147483647), 0) // SPLIT
    high = last // SPLIT
    if (split < low) | (split > high):
        wait(PDL)
        return
    dtype: tl.constexpr = out.dtype.element_ty
    stored: tl.constexpr = keys.dtype.element_ty
    at = split * SPLIT + tl.arange(0, SPLIT)
    node = at - prefix
    if TREE:
        on_path = tl.load(paths + (b * T + first) * width + node, (node >= 0) & (node < width), other=-1)
        node = tl.where(at < prefix, node, on_path)
    old = ((node < offset) & (at <= last))[:, None]
    slot = ((b * G + g).to(tl.int64) * C + prefix + node)[:, None] * E + half[None, :]
    k1 = tl.load(keys + slot, old, other=0.0, cache_modifier=".cg").to(dtype)
    k2 = tl.load(keys + slot + E // 2, old, other=0.0, cache_modifier=".cg").to(dtype)
    v1 = tl.load(values + slot, old, other=0.0, cache_modifier=".cg").to(dtype)
    v2 = tl.load(values + slot + E // 2, old, other=0.0, cache_modifier=".cg").to(dtype)
    cosine, sine = load_angles(cos, sin, position, mask, E, ROPE)
    own = split * SPLIT + SPLIT > prefix + offset  # some of these keys are this forward's own
    new = (node >= offset) & (at <= last)
    key_cosine, key_sine = load_angles(cos, sin, at, new, E, ROPE)
    wait(PDL)
    q1, q2 = load_head(qkv, row, g * R + head, mask, stride, W, S, E)
    if own:
        fresh = b * T + node - offset
        heads = tl.zeros((SPLIT,), tl.int32) + H + g
        n1, n2 = load_head(qkv, fresh, heads, new, stride, W, S, E)
        u1, u2 = load_head(qkv, fresh, heads + G, new, stride, W, S, E)
        n1, n2 = rotated(n1, n2, key_cosine, key_sine, k_norm, eps, E, ROPE, NORM)
        k1 = tl.where(new[:, None], n1.to(stored).to(dtype), k1)
        k2 = tl.where(new[:, None], n2.to(stored).to(dtype), k2)
        v1 = tl.where(new[:, None], u1.to(stored).to(dtype), v1)
        v2 = tl.where(new[:, None], u2.to(stored).to(dtype), v2)
    q1, q2 = rotated(q1, q2, cosine, sine, q_norm, eps, E, ROPE, NORM)
    factor = tl.zeros((16,), tl.float32) + scale
    if TEMPERATURE:
        factor *= 1.0 + temperature * tl.log(1.0 + ((position + 1) // temperature_floor).to(tl.float32))
    q1, q2 = (q1 * factor[:, None]).to(dtype), (q2 * factor[:, None]).to(dtype)
    score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
    seen = (at[None, :] <= position[:, None]) & (at[None, :] >= oldest[:, None])
    score = tl.where(seen, score, float("-inf"))
    best = tl.max(score, 1)
    p = tl.exp(score - tl.where(best > float("-inf"), best, 0.0)[:, None])
    total = tl.sum(p, 1)
    p = p.to(dtype)
    acc1 = tl.dot(p, v1, input_precision="ieee")
    acc2 = tl.dot(p, v2, input_precision="ieee")
    if high > low:
        splits = tl.num_programs(0) - 1
        group = tl.program_id(2) * G + g
        mine = group * splits + split
        where = (mine * 16 + lane)[:, None] * E + half[None, :]
        tl.store(sums + where, acc1)
        tl.store(sums + where + E // 2, acc2)
        tl.store(weights + mine * 32 + lane, best)
        tl.store(weights + mine * 32 + 16 + lane, total)
        tl.debug_barrier()
        if tl.atomic_add(arrived + group, 1, sem="acq_rel") < high - low:
            return
        tl.store(arrived + group, 0)
        best = tl.full((16,), float("-inf"), tl.float32)
        total = tl.zeros((16,), tl.float32)
        acc1 = tl.zeros((16, E // 2), tl.float32)
        acc2 = tl.zeros((16, E // 2), tl.float32)
        for s in range(low, high + 1, 4):  # four at a time, so that their loads overlap
            theirs = group * splits + s
            ma, ta, a1, a2 = load_split(sums, weights, theirs, E)
            mb, tb, b1, b2 = load_split(sums, weights, tl.where(s + 1 <= high, theirs + 1, -1), E)
            mc, tc, c1, c2 = load_split(sums, weights, tl.where(s + 2 <= high, theirs + 2, -1), E)
            md, td, d1, d2 = load_split(sums, weights, tl.where(s + 3 <= high, theirs + 3, -1), E)
            best, total, acc1, acc2 = fold(best, total, acc1, acc2, ma, ta, a1, a2)
            best, total, acc1, acc2 = fold(best, total, acc1, acc2, mb, tb, b1, b2)
            best, total, acc1, acc2 = fold(best, total, acc1, acc2, mc, tc, c1, c2)
            best, total, acc1, acc2 = fold(best, total, acc1, acc2, md, td, d1, d2)
    where = row[:, None] * (H * E) + (g * R + head)[:, None] * E + half[None, :]
    tl.store(out + where, (acc1 / total[:, None]).to(dtype), mask[:, None])
    tl.store(out + where + E // 2, (acc2 / total[:, None]).to(dtype), mask[:, None])


def attention(
    ops: Any,
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    inputs: ModelInputs,
    cos: Tensor,
    sin: Tensor,
    rule: AttentionRule,
) -> Tensor:
    """Launch it: qkv f32 [M, (H+2G)*E], or parts of it [S, M, ...] -> compute dtype [M, H*E]; cache [B, G, C, E]."""
    batch, tokens = inputs.tokens.shape
    _, groups, slots, size = keys.shape
    heads = qkv.shape[-1] // size - 2 * groups
    tree = inputs.paths is not None
    per_program = 1 if tree else max(1, ROWS // triton.next_power_of_2(heads // groups))
    grid = 1 + triton.cdiv(slots, SPLIT), groups, batch * triton.cdiv(tokens, per_program)
    assert grid[1] * grid[2] <= len(ops.arrived), "more groups of splits than counters"
    programs = grid[0] * grid[1] * grid[2]
    sums = torch.empty((programs, ROWS, size), device=qkv.device)
    weights = torch.empty((programs, 2, ROWS), device=qkv.device)
    dtype = keys.dtype if keys.dtype.itemsize > 1 else torch.bfloat16
    out = torch.empty((batch * tokens, heads * size), dtype=dtype, device=qkv.device)
    norm = "unit" if rule.unit_norm and rule.rope else "none" if rule.q_norm is None else "weighted"
    paths = inputs.paths.contiguous() if inputs.paths is not None else inputs.prefix_lens
    attention_kernel[grid](
        qkv, keys, values, inputs.positions.contiguous(), inputs.prefix_lens, paths, cos, sin,
        cos if rule.q_norm is None else rule.q_norm, cos if rule.k_norm is None else rule.k_norm,
        sums, weights, ops.arrived, out,
        tokens, slots, inputs.offset, paths.shape[-1], batch * tokens * qkv.shape[-1], size**-0.5, rule.eps,
        rule.chunk, rule.temperature_scale, rule.temperature_floor,
        H=heads, G=groups, E=size, S=1 if qkv.dim() == 2 else qkv.shape[0], TILE=per_program,
        SPLIT=SPLIT, TREE=tree, ROPE=rule.rope, NORM=norm,
        CHUNK=rule.chunk > 0, TEMPERATURE=rule.temperature_scale > 0, num_warps=8, **ops.launch(),
    )  # fmt: skip
    return out
