"""Products of a few tokens with a large weight matrix, weights as the row operand of the matrix unit.

M tokens, K inputs, N outputs, P pending partial sums, S parts of K. A program owns BN weight rows and TOKENS columns. Which
tile and split is used depends on (N, K) alone, so the bits of a token's result do not depend on who shares the forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specdec.kernels.gpu.pdl import prefetch_rows, trigger, wait

MIN_SCALE = tl.constexpr(2.0**-100)  # a token of zeros has a scale too
TOKENS = 16  # columns of a program: one shape of the matrix instruction, whatever M is


@triton.jit
def pending_sum(x, pending, at, mask, M, K: tl.constexpr, P: tl.constexpr):
    """Residual stream at `at`, with the partial sums of the last product, f32 [P, M, K], added in order."""
    h = tl.load(x + at, mask, other=0.0)
    for p in tl.static_range(P):
        h += tl.load(pending + p * M * K + at, mask, other=0.0)
    return h


@triton.jit
def swiglu(acc, BN: tl.constexpr, BM: tl.constexpr):
    """silu(gate) * up of interleaved rows: [BN, BM] -> [BN / 2, BM]."""
    pairs = tl.permute(tl.reshape(acc, (BN // 2, 2, BM)), (0, 2, 1))
    gate, up = tl.split(pairs)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def norm_linear_kernel(
    x, pending, norm, weight, out, M, eps,
    N: tl.constexpr, K: tl.constexpr, P: tl.constexpr, SWIGLU: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RMSNorm(x + pending) times weight [N, K]; out f32 [M, N], or silu(gate) * up in the weights' dtype [M, N / 2].

    The norm's factor is applied to the product, so the stream is read once. The stream itself is not changed.
    """
    trigger(PDL)
    row, first = tl.program_id(0) * BN, tl.program_id(1) * BM
    size: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    prefetch_rows(weight, row, K * size, K * size, BN, N, PDL)
    rows, tokens = row + tl.arange(0, BN), first + tl.arange(0, BM)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    squares = tl.zeros((BK, BM), dtype=tl.float32)
    wait(PDL)
    for k in range(0, K, BK):
        cols = k + tl.arange(0, BK)
        inside = (cols < K)[:, None]
        h = pending_sum(x, pending, tokens[None, :] * K + cols[:, None], inside & (tokens < M)[None, :], M, K, P)
        squares += h * h
        h *= tl.load(norm + cols, cols < K, other=0.0)[:, None]
        at = rows[:, None] * K + cols[None, :]
        w = tl.load(weight + at, (rows < N)[:, None] & (cols < K)[None, :], other=0.0)
        acc = tl.dot(w, h.to(w.dtype), acc, input_precision="ieee")
    acc *= tl.rsqrt(tl.sum(squares, 0) / K + eps)[None, :]
    if SWIGLU:
        acc = swiglu(acc, BN, BM)
        rows = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    width: tl.constexpr = N // 2 if SWIGLU else N
    at = tokens[None, :] * width + rows[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), (rows < width)[:, None] & (tokens < M)[None, :])


@triton.jit
def token_scale(x, input_scale, tokens, M, K: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, STATIC: tl.constexpr):
    """FP8 scale of each token: the checkpoint's, or largest magnitude / 448. f32 [BM]."""
    if STATIC:
        return tl.load(input_scale) + tl.zeros((BM,), dtype=tl.float32)
    largest = tl.zeros((BM,), dtype=tl.float32)
    for k in range(0, K, BQ):
        cols = k + tl.arange(0, BQ)
        mask = (cols < K)[:, None] & (tokens < M)[None, :]
        h = tl.load(x + tokens[None, :] * K + cols[:, None], mask, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(h.to(tl.float32)), 0))
    return tl.maximum(largest / 448.0, MIN_SCALE)


@triton.jit
def to_fp8(x):
    """Round to e4m3, saturating. x f32."""
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def linear_kernel(
    x, x_scale, input_scale, weight, weight_scale, stream, pending, out, M,
    N: tl.constexpr, K: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    INPUT: tl.constexpr, SWIGLU: tl.constexpr, ADD: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [M, K] times weight [N, K].

    INPUT: "plain" (weights' dtype), "scaled" (e4m3 with x_scale f32 [M]), "static" or "dynamic" (rounded to e4m3 here).
    SWIGLU: out bf16 [M, N / 2]. ADD: out f32 [S, M, N] partial sums for the residual stream, or with S = 1 straight into it;
    the P partial sums still pending from before are added to the stream on the way. Neither: out f32 [S, M, N].
    """
    trigger(PDL)
    row, part, first = tl.program_id(0) * BN, tl.program_id(1), tl.program_id(2) * BM
    size: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    span: tl.constexpr = K // S
    prefetch_rows(weight.to(tl.pointer_type(tl.uint8)) + part * span * size, row, K * size, span * size, BN, N, PDL)
    rows, tokens = row + tl.arange(0, BN), first + tl.arange(0, BM)
    here = (tokens < M)[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    quantised: tl.constexpr = INPUT == "static" or INPUT == "dynamic"
    wait(PDL)
    if quantised:
        scale = token_scale(x, input_scale, tokens, M, K, BM, BQ, INPUT == "static")
    elif INPUT == "scaled":
        scale = tl.load(x_scale + tokens, tokens < M, other=0.0)
    for k in range(0, span, BK):
        cols = part * span + k + tl.arange(0, BK)
        inside = k + tl.arange(0, BK) < span
        h = tl.load(x + tokens[None, :] * K + cols[:, None], inside[:, None] & here, other=0.0)
        if quantised:
            h = to_fp8(h.to(tl.float32) / scale[None, :])
        w = tl.load(weight + rows[:, None] * K + cols[None, :], (rows < N)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(w, h, acc, input_precision="ieee")
    if INPUT != "plain":
        acc *= tl.load(weight_scale + rows, rows < N, other=0.0)[:, None] * scale[None, :]
    if SWIGLU:
        acc = swiglu(acc, BN, BM)
        rows = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    width: tl.constexpr = N // 2 if SWIGLU else N
    at = tokens[None, :] * width + rows[:, None]
    mask = (rows < width)[:, None] & here
    if ADD and part == 0:
        total = pending_sum(stream, pending, at, mask, M, N, P)
        if S == 1:
            total += acc
        if S == 1 or P > 0:
            tl.store(stream + at, total, mask)
    if S > 1 or not ADD:
        tl.store(out + part * M * width + at, acc.to(out.dtype.element_ty), mask)
