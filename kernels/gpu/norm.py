"""The residual stream between products: add what is pending, normalise, and round for the next product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.linear import MIN_SCALE, pending_sum, to_fp8
from specdec.kernels.gpu.pdl import wait


@dataclass(slots=True, eq=False)
class Ready:
    """A stream as its next product takes it: times the norm's weight, its RMSNorm's factor left to the product."""

    stream: Tensor
    norm: Tensor
    value: Tensor  # compute dtype [M, K]
    squares: Tensor  # f32 [M, parts], which sum to the squares of each token's stream


@triton.jit(do_not_specialize=["M"])
def add_norm_kernel(
    x, pending, norm, plain, squares, quantised, scales, input_scale, M, eps,
    K: tl.constexpr, P: tl.constexpr, PLAIN: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    PARTS: tl.constexpr = 1,
):  # fmt: skip
    """x f32 [M, K] += pending f32 [P, M, K], and what the next product wants of it. A program owns a token.

    PARTS > 1: one of the streams x f32 [PARTS, M, K], which have norms f32 [PARTS, K] and end side by side, as "normed".
    PLAIN "normed": RMSNorm in the compute dtype; "raw": x * norm, with the sum of squares f32 [M] for whoever scales later; or
    "no". QUANTISE: RMSNorm as e4m3, "static" by the checkpoint's scale or "dynamic" by largest magnitude / 448; or "no".
    """
    row = tl.program_id(0)
    part, token = 0, row
    if PARTS > 1:
        part, token = row // M, row % M
    cols = tl.arange(0, BLOCK)
    mask = cols < K
    weight = tl.load(norm + part * K + cols, mask, other=0.0)
    wait(PDL)
    at = row * K + cols
    out = (token * PARTS + part) * K + cols
    h = pending_sum(x, pending, at, mask, M, K, P)
    if P > 0:
        tl.store(x + at, h, mask)
    total = tl.sum(h * h, 0)
    h *= weight
    if PLAIN == "raw":
        tl.store(plain + at, h.to(plain.dtype.element_ty), mask)
        tl.store(squares + token, total)
    else:
        factor = tl.rsqrt(total / K + eps)
        largest = tl.max(tl.abs(h), 0)
        store_normed(plain, quantised, scales, input_scale, h, factor, largest, out, at, mask, token, PLAIN, QUANTISE)


@triton.jit
def store_normed(
    plain, quantised, scales, input_scale, h, factor, largest, out, at, mask, token,
    PLAIN: tl.constexpr, QUANTISE: tl.constexpr,
):  # fmt: skip
    """h * factor of a token whose largest |h| is known: in the compute dtype at `out` and as e4m3 at `at`, as above."""
    most = (largest * factor).to(plain.dtype.element_ty).to(tl.float32)  # rounding keeps the order
    h = (h * factor).to(plain.dtype.element_ty).to(tl.float32)
    if PLAIN == "normed":
        tl.store(plain + out, h.to(plain.dtype.element_ty), mask)
    if QUANTISE == "static":
        scale = tl.load(input_scale)
    else:
        scale = tl.maximum(most / 448.0, MIN_SCALE)
    if QUANTISE != "no":
        tl.store(quantised + at, to_fp8(h * (1.0 / scale)), mask)
        tl.store(scales + token, scale)


@triton.jit(do_not_specialize=["M"])
def embed_kernel(
    tokens, table, norm, x, ready, squares, M, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Rows of the embedding table [V, K] as the stream f32 [M, K], and as the first product takes it ("raw" above)."""
    token = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < K
    weight = tl.load(norm + cols, mask, other=0.0)
    wait(PDL)
    row = tl.load(tokens + token)
    h = tl.load(table + row * K + cols, mask, other=0.0).to(tl.float32)
    tl.store(x + token * K + cols, h, mask)
    tl.store(ready + token * K + cols, (h * weight).to(ready.dtype.element_ty), mask)
    tl.store(squares + token, tl.sum(h * h, 0))


@triton.jit(do_not_specialize=["size", "stride"])
def add_kernel(x, pending, size, stride, P: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x f32 [size] += pending f32 [P, stride], in order: for whoever reads the stream itself."""
    wait(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    h = tl.load(x + at, mask, other=0.0)
    for p in tl.static_range(P):
        h += tl.load(pending + p * stride + at, mask, other=0.0)
    tl.store(x + at, h, mask)


def embed(tokens: Tensor, table: Tensor, norm: Tensor, options: Mapping[str, Any]) -> Ready:
    """Rows of the table [V, K] as a stream f32 [M, K], prepared for the norm that it meets first; tokens int64 [M]."""
    m, k = len(tokens), table.shape[1]
    x = torch.empty((m, k), device=table.device)
    ready = Ready(x, norm, torch.empty_like(x, dtype=table.dtype), x.new_empty((m, 1)))
    embed_kernel[(m,)](
        tokens, table, norm, x, ready.value, ready.squares, m, K=k, BLOCK=triton.next_power_of_2(k),
        num_warps=8 if k > 1024 else 4, **options,
    )  # fmt: skip
    return ready
