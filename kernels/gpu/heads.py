"""From the rows of the QKV product to rotated queries and to keys and values in their slots of the cache.

B rows, T tokens, M = B * T, H query heads, G KV heads, E head size, C cache slots. Within a head the weight rows alternate: row
2i is channel i, row 2i + 1 channel i + E/2, the two that the rotary embedding turns, so a program always holds both.
`where` bundles what the tokens need: (queries [M, H*E], keys, values [B, G, C, E], positions int32 [M], prefix_lens int32 [B],
cos, sin f32 [positions, E/2], T, C, offset, softmax scale, temperature scale, temperature floor).
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

Where = tuple[Any, ...]


@triton.jit
def pairs(y, BM: tl.constexpr, BN: tl.constexpr):
    """Columns [BM, BN] that alternate -> both halves [BM, BN / 2]."""
    return tl.split(tl.reshape(y, (BM, BN // 2, 2)))


@triton.jit
def load_places(where, row, tokens, M, E: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr):
    """What does not depend on the product: cos, sin [BM, HALF] (1 and 0 unless TURN), query factor and slot of each token."""
    positions, prefix_lens, cos, sin, T = where[3], where[4], where[5], where[6], where[7]
    offset, scale, temperature, floor = where[9], where[10], where[11], where[12]
    position = tl.load(positions + tokens, tokens < M, other=0)
    b = tokens // T
    slot = tl.load(prefix_lens + b, tokens < M, other=0) + offset + tokens % T
    factor = scale * (1.0 + temperature * tl.log(1.0 + ((position + 1) // floor).to(tl.float32)))
    angle = position[:, None] * (E // 2) + (row // 2 % (E // 2) + tl.arange(0, HALF))[None, :]
    c = tl.full(angle.shape, 1.0, tl.float32)
    s = tl.zeros(angle.shape, tl.float32)
    if TURN:
        c = tl.load(cos + angle, (tokens < M)[:, None], other=1.0)
        s = tl.load(sin + angle, (tokens < M)[:, None], other=0.0)
    return c, s, factor, slot


@triton.jit
def store_head(
    where, a, b, c, s, factor, slot, head, row, tokens, M,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate a, b [BM, HALF], channels of one head, and put them where they belong: query, key or value."""
    queries, keys, values, T, C = where[0], where[1], where[2], where[7], where[8]
    channel = (row // 2 % (E // 2) + tl.arange(0, HALF))[None, :]
    mask = (tokens < M)[:, None]
    group = (tokens // T * G).to(tl.int64)
    if head < H:
        query = tokens[:, None] * (H * E) + head * E + channel
        tl.store(queries + query, ((a * c - b * s) * factor[:, None]).to(queries.dtype.element_ty), mask)
        tl.store(queries + query + E // 2, ((b * c + a * s) * factor[:, None]).to(queries.dtype.element_ty), mask)
    elif head < H + G:
        key = ((group + head - H) * C + slot)[:, None] * E + channel
        tl.store(keys + key, (a * c - b * s).to(keys.dtype.element_ty), mask)
        tl.store(keys + key + E // 2, (b * c + a * s).to(keys.dtype.element_ty), mask)
    else:
        value = ((group + head - H - G) * C + slot)[:, None] * E + channel
        tl.store(values + value, a.to(values.dtype.element_ty), mask)
        tl.store(values + value + E // 2, b.to(values.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M", "where"])
def rotate_kernel(
    qkv, where, q_norm, k_norm, M, eps,
    S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr,
    BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """qkv f32 [S, M, (H+2G)*E], parts to be added; a program owns one head of BM tokens.

    NORM: "weighted" by q_norm and k_norm f32 [E] before the rotation, "unit" without weight behind it, or "none".
    """
    head, tokens = tl.program_id(1), tl.program_id(0) * BM + tl.arange(0, BM)
    mask = (tokens < M)[:, None]
    row, channel = head * E, tl.arange(0, E // 2)
    c, s, factor, slot = load_places(where, row, tokens, M, E, E // 2, ROPE)
    wait(PDL)
    at = tokens[:, None] * ((H + 2 * G) * E) + row + 2 * channel[None, :]
    a, b = tl.load(qkv + at, mask, other=0.0), tl.load(qkv + at + 1, mask, other=0.0)
    for part in tl.static_range(1, S):
        more = qkv + part * M * ((H + 2 * G) * E) + at
        a += tl.load(more, mask, other=0.0)
        b += tl.load(more + 1, mask, other=0.0)
    if head < H + G:
        if NORM == "weighted":
            gain = q_norm
            if head >= H:
                gain = k_norm
            r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / E + eps)[:, None]
            a *= r * tl.load(gain + channel)[None, :]
            b *= r * tl.load(gain + E // 2 + channel)[None, :]
        if NORM == "unit":  # a rotation keeps the length
            r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / E + eps)[:, None]
            a *= r
            b *= r
    else:
        c = tl.full(c.shape, 1.0, tl.float32)
        s = tl.zeros(s.shape, tl.float32)
    store_head(where, a, b, c, s, factor, slot, head, row, tokens, M, H, G, E, E // 2)


def places(
    queries: Tensor, keys: Tensor, values: Tensor, inputs: ModelInputs, cos: Tensor, sin: Tensor, rule: AttentionRule
) -> Where:
    """The bundle that the kernels take."""
    size = keys.shape[-1]
    return (
        queries, keys, values, inputs.positions.contiguous(), inputs.prefix_lens, cos, sin,
        inputs.tokens.shape[1], keys.shape[2], inputs.offset, size**-0.5,
        float(rule.temperature_scale), rule.temperature_floor,
    )  # fmt: skip


def rotate(ops: Any, qkv: Tensor, where: Where, rule: AttentionRule, heads: int, groups: int) -> None:
    """Launch it over qkv f32 [M, (H+2G)*E], or parts of it [S, M, ...]."""
    size, m, parts = where[1].shape[-1], qkv.shape[-2], 1 if qkv.dim() == 2 else len(qkv)
    norm = "unit" if rule.unit_norm and rule.rope else "none" if rule.q_norm is None else "weighted"
    rotate_kernel[(triton.cdiv(m, 16), heads + 2 * groups)](
        qkv, where, qkv if rule.q_norm is None else rule.q_norm, qkv if rule.k_norm is None else rule.k_norm, m, rule.eps,
        S=parts, H=heads, G=groups, E=size, ROPE=rule.rope, NORM=norm, BM=16, **ops.launch(),
    )  # fmt: skip


def compute_dtype(cache: Tensor) -> torch.dtype:
    """Dtype of queries over a cache: the cache's own, or bf16 over FP8."""
    return cache.dtype if cache.dtype.itemsize > 1 else torch.bfloat16
