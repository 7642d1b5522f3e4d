"""Products of a few tokens with a large weight matrix, weights as the row operand of the matrix unit.

M tokens, K inputs, N outputs, P pending partial sums, S parts of K. A program owns BN weight rows and TOKENS columns. Which
tile and split is used depends on (N, K) alone, so the bits of a token's result do not depend on who shares the forward. M is
never specialised: Triton lays sums out by what it knows of an address.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specdec.kernels.gpu.pdl import prefetch_rows, wait

MIN_SCALE = tl.constexpr(2.0**-100)  # a token of zeros has a scale too
ROOM = tl.constexpr(64)  # tokens for which there is room where their number must not show in an address
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
def weight_piece(weight, rows, first, N, K, SIZE: tl.constexpr, WAYS: tl.constexpr):
    """SIZE inputs from `first` on of each row, cut in WAYS parts: [WAYS, BN, SIZE / WAYS]."""
    PART: tl.constexpr = SIZE // WAYS
    k = first + tl.arange(0, WAYS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
    return tl.load(weight + rows[None, :, None] * K + k, (rows < N)[None, :, None] & (k < K), other=0.0)


@triton.jit
def input_piece(x, tokens, first, M, K, SIZE: tl.constexpr, WAYS: tl.constexpr):
    """The same inputs of each token: [WAYS, SIZE / WAYS, BM]."""
    PART: tl.constexpr = SIZE // WAYS
    k = first + tl.arange(0, WAYS)[:, None, None] * PART + tl.arange(0, PART)[None, :, None]
    return tl.load(x + tokens[None, None, :] * K + k, (k < K) & (tokens < M)[None, None, :], other=0.0)


@triton.jit(do_not_specialize=["M"])
def burst_kernel(
    x, squares, weight, out, stream, ready, ready_norm, ready_squares, M, eps,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, SWIGLU: tl.constexpr, ADD: tl.constexpr, READY: tl.constexpr,
    BN: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, WAYS: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [M, K] times weight [N, K] where a program's weights fit its registers: loaded in one burst before the wait.

    PARTS > 0: x lacks the factor of its RMSNorm, which follows from squares f32 [PARTS, ROOM]. SWIGLU: out [M, N / 2]. ADD: into
    stream f32 [M, N]; with READY also as the next product wants it: stream * ready_norm in `ready`, each program's share of
    its squares in ready_squares f32 [programs, ROOM]. Neither: out f32 [M, N]. K0 + K1 cover K; WAYS warps share it.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    here = (tokens < M)[None, :]
    width: tl.constexpr = N // 2 if SWIGLU else N
    outputs = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2) if SWIGLU else rows
    at = tokens[None, :] * width + outputs[:, None]
    mask = (outputs < width)[:, None] & here
    w0 = weight_piece(weight, rows, 0, N, K, K0, WAYS)
    if K1 > 0:
        w1 = weight_piece(weight, rows, K0, N, K, K1, WAYS)
    if READY:
        gain = tl.load(ready_norm + rows, rows < N, other=0.0)
    wait(PDL)
    x0 = input_piece(x, tokens, 0, M, K, K0, WAYS)  # all loads first: each would cost its whole latency again
    if K1 > 0:
        x1 = input_piece(x, tokens, K0, M, K, K1, WAYS)
    if PARTS > 0:
        part = tl.arange(0, triton.next_power_of_2(PARTS))
        found = tl.load(squares + part[:, None] * ROOM + tokens[None, :], (part < PARTS)[:, None] & here, other=0.0)
    if ADD:
        before = tl.load(stream + at, mask, other=0.0)
    acc = tl.zeros((WAYS, BN, BM), dtype=tl.float32)
    acc = tl.dot(w0, x0, acc, input_precision="ieee")
    if K1 > 0:
        acc = tl.dot(w1, x1, acc, input_precision="ieee")
    y = tl.sum(acc, 0)
    if PARTS > 0:
        y *= tl.rsqrt(tl.sum(found, 0) / K + eps)[None, :]
    if SWIGLU:
        y = swiglu(y, BN, BM)
    if ADD:
        y += before
        tl.store(stream + at, y, mask)
        if READY:
            tl.store(ready + at, (y * gain[:, None]).to(ready.dtype.element_ty), mask)
            tl.store(ready_squares + tl.program_id(0) * ROOM + tokens, tl.sum(y * y, 0), tokens < M)
    else:
        tl.store(out + at, y.to(out.dtype.element_ty), mask)


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


@triton.jit(do_not_specialize=["M"])
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
