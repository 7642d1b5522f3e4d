"""The residual stream between products: add what is pending, normalise, and round for the next product."""

from __future__ import annotations

import triton
import triton.language as tl

from specdec.kernels.gpu.linear import MIN_SCALE, pending_sum, to_fp8
from specdec.kernels.gpu.pdl import trigger, wait


@triton.jit
def add_norm_kernel(
    x, pending, norm, plain, quantised, scales, input_scale, M, eps,
    K: tl.constexpr, P: tl.constexpr, PLAIN: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x f32 [M, K] += pending f32 [P, M, K]; RMSNorm of it as bf16 (PLAIN) and as e4m3 with a scale a token (QUANTISE).

    A program owns a token. QUANTISE: "no", "static" (the checkpoint's scale) or "dynamic" (largest magnitude / 448).
    """
    trigger(PDL)
    token = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < K
    weight = tl.load(norm + cols, mask, other=0.0)
    wait(PDL)
    at = token * K + cols
    h = pending_sum(x, pending, at, mask, M, K, P)
    if P > 0:
        tl.store(x + at, h, mask)
    h *= tl.rsqrt(tl.sum(h * h, 0) / K + eps)
    h = (h * weight).to(plain.dtype.element_ty).to(tl.float32)
    if PLAIN:
        tl.store(plain + at, h.to(plain.dtype.element_ty), mask)
    if QUANTISE != "no":
        if QUANTISE == "static":
            scale = tl.load(input_scale)
        else:
            scale = tl.maximum(tl.max(tl.abs(h), 0) / 448.0, MIN_SCALE)
        tl.store(quantised + at, to_fp8(h / scale), mask)
        tl.store(scales + token, scale)


@triton.jit
def add_kernel(x, pending, size, stride, P: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x f32 [size] += pending f32 [P, stride], in order: for whoever reads the stream itself."""
    trigger(PDL)
    wait(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    h = tl.load(x + at, mask, other=0.0)
    for p in tl.static_range(P):
        h += tl.load(pending + p * stride + at, mask, other=0.0)
    tl.store(x + at, h, mask)
