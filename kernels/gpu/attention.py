"""Attention of a few tokens over a long cache in one launch: rotary embedding, KV append, split keys, ordered combine.

B rows, T tokens, H query heads, G KV heads, R = H / G, E head size (two halves of E / 2), C cache slots, S parts of the product.
Keys are taken in the order of their positions: a block covers BLOCK positions from a multiple of BLOCK on, a split SPLIT
positions. A tree's nodes lie in other slots than their positions, so their keys are gathered along the path. Keys and
values of this forward come from the product itself, rounded as the cache would round them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specdec.kernels.gpu.pdl import trigger, wait

ROWS = 16  # query rows of a program: TILE tokens of R heads each, padded


@triton.jit
def parts_sum(qkv, at, mask, stride, S: tl.constexpr):
    """Sum of the S parts of the product, in order."""
    x = tl.load(qkv + at, mask, other=0.0)
    for s in tl.static_range(1, S):
        x += tl.load(qkv + s * stride + at, mask, other=0.0)
    return x


@triton.jit
def rotated(
    qkv, row, head, mask, position, cos, sin, norm, stride, eps,
    W: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
    ROPE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Both halves [n, E/2] of one head of the rows [n], normalised and rotated. NORM: "none", "weighted", "unit"."""
    half = tl.arange(0, E // 2)
    at = row[:, None] * W + head[:, None] * E + half[None, :]
    a = parts_sum(qkv, at, mask[:, None], stride, S)
    b = parts_sum(qkv, at + E // 2, mask[:, None], stride, S)
    if NORM == "weighted":
        r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / E + eps)[:, None]
        a = a * r * tl.load(norm + half)[None, :]
        b = b * r * tl.load(norm + E // 2 + half)[None, :]
    if ROPE:
        angle = position[:, None] * (E // 2) + half[None, :]
        c = tl.load(cos + angle, mask[:, None], other=1.0)
        s = tl.load(sin + angle, mask[:, None], other=0.0)
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
    a, c = rotated(qkv, row, head, mask, position, cos, sin, k_norm, stride, eps, W, S, E, ROPE, NORM)
    half = tl.arange(0, E // 2)
    slot = ((b * G + g).to(tl.int64) * C + prefix + offset + token)[:, None] * E + half[None, :]
    tl.store(keys + slot, a.to(keys.dtype.element_ty), mask[:, None])
    tl.store(keys + slot + E // 2, c.to(keys.dtype.element_ty), mask[:, None])
    at = row[:, None] * W + (head + G)[:, None] * E + half[None, :]
    for i in tl.static_range(2):
        v = parts_sum(qkv, at + i * (E // 2), mask[:, None], stride, S)
        tl.store(values + slot + i * (E // 2), v.to(values.dtype.element_ty), mask[:, None])


@triton.jit
def attention_kernel(
    qkv, keys, values, positions, prefix_lens, paths, cos, sin, q_norm, k_norm, sums, weights, arrived, out,
    T, C, offset, width, stride, scale, eps, chunk, temperature, temperature_floor,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, TREE: tl.constexpr,
    ROPE: tl.constexpr, NORM: tl.constexpr, CHUNK: tl.constexpr, TEMPERATURE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """qkv f32 [S, B*T, (H+2G)*E] -> out [B*T, H*E]; a program owns one split of TILE tokens of one KV head.

    keys, values [B, G, C, E]; paths int32 [B, T, width] with TREE (then TILE = 1). sums f32 [programs, 16, E] and weights
    f32 [programs, 2, 16] carry what a split found; the last program to arrive adds the splits in order. `arrived` int32, one
    for each group of splits, is zero before and after.
    """
    trigger(PDL)
    R: tl.constexpr = H // G
    PAD: tl.constexpr = 16 // TILE if not TREE else 16
    W: tl.constexpr = (H + 2 * G) * E
    half = tl.arange(0, E // 2)
    split, g = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(T, TILE)
    b, first = tl.program_id(2) // tiles, tl.program_id(2) % tiles * TILE
    wait(PDL)
    prefix = tl.load(prefix_lens + b)
    lane = tl.arange(0, 16)
    token, head = first + lane // PAD, lane % PAD
    mask = (token < T) & (head < R)
    row = b * T + token
    position = tl.load(positions + row, token < T, other=0)
    oldest = position // chunk * chunk if CHUNK else tl.zeros((16,), tl.int32)
    last = tl.max(tl.where(mask, position, 0), 0)
    low = tl.min(tl.where(mask, oldest, 2147483647), 0) // SPLIT
    high = last // SPLIT
    if split == 0:
        append(
            qkv, keys, values, positions, prefix, cos, sin, k_norm, stride, eps, b, g, first, T, C, offset,
            H, G, E, S, TILE, ROPE, NORM,
        )  # fmt: skip
    if (split < low) | (split > high):
        return
    q1, q2 = rotated(qkv, row, g * R + head, mask, position, cos, sin, q_norm, stride, eps, W, S, E, ROPE, NORM)
    factor = tl.zeros((16,), tl.float32) + scale
    if TEMPERATURE:
        factor *= 1.0 + temperature * tl.log(1.0 + ((position + 1) // temperature_floor).to(tl.float32))
    dtype: tl.constexpr = out.dtype.element_ty
    stored: tl.constexpr = keys.dtype.element_ty
    q1, q2 = (q1 * factor[:, None]).to(dtype), (q2 * factor[:, None]).to(dtype)
    best = tl.full((16,), float("-inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    acc1 = tl.zeros((16, E // 2), tl.float32)
    acc2 = tl.zeros((16, E // 2), tl.float32)
    cache = (b * G + g).to(tl.int64) * C
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, last + 1), BLOCK):
        at = start + tl.arange(0, BLOCK)
        node = at - prefix
        if TREE:
            node = tl.load(paths + (b * T + first) * width + node, (node >= 0) & (node < width), other=-1)
            node = tl.where(at < prefix, at - prefix, node)
        old = (node < offset) & (at <= last)
        slot = (cache + prefix + node)[:, None] * E + half[None, :]
        k1 = tl.load(keys + slot, old[:, None], other=0.0).to(dtype)
        k2 = tl.load(keys + slot + E // 2, old[:, None], other=0.0).to(dtype)
        v1 = tl.load(values + slot, old[:, None], other=0.0).to(dtype)
        v2 = tl.load(values + slot + E // 2, old[:, None], other=0.0).to(dtype)
        if start + BLOCK > prefix + offset:  # some of these keys are this forward's own
            new = (node >= offset) & (at <= last)
            fresh = b * T + node - offset
            heads = tl.zeros((BLOCK,), tl.int32) + H + g
            n1, n2 = rotated(qkv, fresh, heads, new, at, cos, sin, k_norm, stride, eps, W, S, E, ROPE, NORM)
            k1 = tl.where(new[:, None], n1.to(stored).to(dtype), k1)
            k2 = tl.where(new[:, None], n2.to(stored).to(dtype), k2)
            where = fresh[:, None] * W + (H + G + g) * E + half[None, :]
            n1 = parts_sum(qkv, where, new[:, None], stride, S)
            n2 = parts_sum(qkv, where + E // 2, new[:, None], stride, S)
            v1 = tl.where(new[:, None], n1.to(stored).to(dtype), v1)
            v2 = tl.where(new[:, None], n2.to(stored).to(dtype), v2)
        score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
        seen = (at[None, :] <= position[:, None]) & (at[None, :] >= oldest[:, None])
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        base = tl.where(higher > float("-inf"), higher, 0.0)
        p = tl.exp(score - base[:, None])
        shrink = tl.exp(best - base)
        total = total * shrink + tl.sum(p, 1)
        p = p.to(dtype)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
        acc2 = tl.dot(p, v2, acc2 * shrink[:, None], input_precision="ieee")
        best = higher
    count = high - low + 1
    if count > 1:
        splits = tl.num_programs(0)
        group = tl.program_id(2) * G + g
        mine = (group * splits + split) * 16
        tl.store(sums + (mine + lane)[:, None] * E + half[None, :], acc1)
        tl.store(sums + (mine + lane)[:, None] * E + E // 2 + half[None, :], acc2)
        tl.store(weights + mine * 2 + lane, best)
        tl.store(weights + mine * 2 + 16 + lane, total)
        tl.debug_barrier()
        if tl.atomic_add(arrived + group, 1, sem="acq_rel") < count - 1:
            return
        tl.store(arrived + group, 0)
        best = tl.full((16,), float("-inf"), tl.float32)
        total = tl.zeros((16,), tl.float32)
        acc1 = tl.zeros((16, E // 2), tl.float32)
        acc2 = tl.zeros((16, E // 2), tl.float32)
        for s in range(low, high + 1):
            theirs = (group * splits + s) * 16
            m = tl.load(weights + theirs * 2 + lane, cache_modifier=".cg")
            t = tl.load(weights + theirs * 2 + 16 + lane, cache_modifier=".cg")
            a1 = tl.load(sums + (theirs + lane)[:, None] * E + half[None, :], cache_modifier=".cg")
            a2 = tl.load(sums + (theirs + lane)[:, None] * E + E // 2 + half[None, :], cache_modifier=".cg")
            higher = tl.maximum(best, m)
            base = tl.where(higher > float("-inf"), higher, 0.0)
            shrink, grow = tl.exp(best - base), tl.exp(m - base)
            total = total * shrink + t * grow
            acc1 = acc1 * shrink[:, None] + a1 * grow[:, None]
            acc2 = acc2 * shrink[:, None] + a2 * grow[:, None]
            best = higher
    where = row[:, None] * (H * E) + (g * R + head)[:, None] * E + half[None, :]
    tl.store(out + where, (acc1 / total[:, None]).to(dtype), mask[:, None])
    tl.store(out + where + E // 2, (acc2 / total[:, None]).to(dtype), mask[:, None])
