"""Products of a few tokens with a large weight matrix, weights as the row operand of the matrix unit.

M tokens, K inputs, N outputs, P pending partial sums, S parts of K. A program owns BN weight rows and TOKENS columns. Which
tile and split is used depends on (N, K) alone, so the bits of a token's result do not depend on who shares the forward. M is
never specialised: Triton lays sums out by what it knows of an address.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specdec.kernels.gpu.heads import halves, load_places, store_head
from specdec.kernels.gpu.pdl import prefetch_rows, wait

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
    gate, up = halves(acc, BN, BM)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def store_swiglu(
    out, largest, acc, row, tokens, mine, N: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, LARGEST: tl.constexpr
):
    """silu(gate) * up of the rows from `row` on: out [M, N / 2]; their largest magnitude by token: largest [M, N / BN]."""
    pairs = row // 2 + tl.arange(0, BN // 2)
    at = tokens[None, :] * (N // 2) + pairs[:, None]
    y = swiglu(acc, BN, BM).to(out.dtype.element_ty)
    tl.store(out + at, y, (pairs < N // 2)[:, None] & mine[None, :])
    if LARGEST:
        found = tl.max(tl.where((pairs < N // 2)[:, None], tl.abs(y.to(tl.float32)), 0.0), 0)
        tl.store(largest + tokens * tl.cdiv(N, BN) + row // BN, found, mine)


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
    x, squares, weight, extra, M, eps,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, USE: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, ROPE: tl.constexpr,
    BN: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, WAYS: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [M, K] times weight [N, K] where a program's weights fit its registers: loaded in one burst before the wait.

    PARTS > 0: x lacks the factor of its RMSNorm, which follows from squares f32 [M, PARTS]. K0 + K1 cover K; WAYS warps
    share it. USE of the product, with `extra`: "store" (out f32 [M, N]); "swiglu" (out [M, N / 2]); "heads" (see heads.py);
    "add" (stream f32 [M, N]); "ready" (stream; stream * norm as the next product wants it; norm f32 [N]; each program's
    share of the stream's squares f32 [M, programs]).
    """
    row = tl.program_id(0) * BN
    rows = row + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    here = (tokens < M)[None, :]
    at = tokens[None, :] * N + rows[:, None]
    mask = (rows < N)[:, None] & here
    w0 = weight_piece(weight, rows, 0, N, K, K0, WAYS)
    if K1 > 0:
        w1 = weight_piece(weight, rows, K0, N, K, K1, WAYS)
    if USE == "heads":
        c, s, factor, slot = load_places(extra, row, tokens, M, E, BN // 2, ROPE)
    if USE == "ready":
        gain = tl.load(extra[2] + rows, rows < N, other=0.0)
    acc = tl.zeros((WAYS, BN, BM), dtype=tl.float32)
    wait(PDL)
    x0 = input_piece(x, tokens, 0, M, K, K0, WAYS)  # all loads first: each would cost its whole latency again
    if K1 > 0:
        x1 = input_piece(x, tokens, K0, M, K, K1, WAYS)
    if PARTS > 0:
        part = tl.arange(0, triton.next_power_of_2(PARTS))
        found = tl.load(
            squares + tokens[:, None] * PARTS + part[None, :], (tokens < M)[:, None] & (part < PARTS)[None, :], 0.0
        )
    if USE == "add" or USE == "ready":
        before = tl.load(extra[0] + at, mask, other=0.0)
    acc = tl.dot(w0, x0, acc, input_precision="ieee")
    if K1 > 0:
        acc = tl.dot(w1, x1, acc, input_precision="ieee")
    y = tl.sum(acc, 0)
    if PARTS > 0:
        y *= tl.rsqrt(tl.sum(found, 1) / K + eps)[None, :]
    if USE == "store":
        tl.store(extra[0] + at, y, mask)
    if USE == "swiglu":
        store_swiglu(extra[0], extra[0], y, row, tokens, tokens < M, N, BN, BM, False)
    if USE == "heads":
        a, b = halves(y, BN, BM)
        store_head(extra, a, b, c, s, factor, slot, row // E, row, tokens, M, H, G, E, BN // 2)
    if USE == "add" or USE == "ready":
        y += before
        tl.store(extra[0] + at, y, mask)
    if USE == "ready":
        tl.store(extra[1] + at, (y * gain[:, None]).to(extra[1].dtype.element_ty), mask)
        tl.store(extra[3] + tokens * tl.num_programs(0) + tl.program_id(0), tl.sum(y * y, 0), tokens < M)


@triton.jit
def token_scale(largest, input_scale, tokens, M, PARTS: tl.constexpr, STATIC: tl.constexpr):
    """FP8 scale of each token: the checkpoint's, or its largest magnitude / 448. largest f32 [M, PARTS] -> f32 [BM]."""
    if STATIC:
        return tl.load(input_scale) + tl.zeros(tokens.shape, dtype=tl.float32)
    part = tl.arange(0, triton.next_power_of_2(PARTS))
    mask = (tokens < M)[:, None] & (part < PARTS)[None, :]
    found = tl.load(largest + tokens[:, None] * PARTS + part[None, :], mask, other=0.0)
    return tl.maximum(tl.max(found, 1) / 448.0, MIN_SCALE)


@triton.jit
def to_fp8(x):
    """Round to e4m3, saturating. x f32."""
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, x_scale, input_scale, weight, weight_scale, extra, M, LARGEST: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, P: tl.constexpr, S: tl.constexpr, INPUT: tl.constexpr, USE: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, ROPE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [M, K] times weight [N, K] with scale a row for e4m3, in turns of BK inputs.

    INPUT: "plain" (weights' dtype), "scaled" (e4m3 with x_scale f32 [M]), or rounded to e4m3 here: "static" by input_scale,
    "dynamic" by the largest magnitudes of each token, x_scale f32 [M, LARGEST]. Then "swiglu" leaves those of its results, too.
    USE with `extra`: "store" (out f32 [S, M, N]); "swiglu" and "heads" as in burst_kernel, S = 1; "add" (stream f32 [M, N],
    pending f32 [P, M, N], out f32 [S, M, N]): pending sums go into the stream, and so does the product if S = 1; the parts of
    S > 1 are left in out.
    """
    row, part, first = tl.program_id(0) * BN, tl.program_id(1), tl.program_id(2) * BM
    size: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    span: tl.constexpr = K // S
    prefetch_rows(weight.to(tl.pointer_type(tl.uint8)) + part * span * size, row, K * size, span * size, BN, N, PDL)
    rows, tokens = row + tl.arange(0, BN), first + tl.arange(0, BM)
    here = (tokens < M)[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    quantised: tl.constexpr = INPUT == "static" or INPUT == "dynamic"
    if USE == "heads":
        c, s, factor, slot = load_places(extra, row, tokens, M, E, BN // 2, ROPE)
    wait(PDL)
    if quantised:
        scale = token_scale(x_scale, input_scale, tokens, M, LARGEST, INPUT == "static")
        inverse = 1.0 / scale
    elif INPUT == "scaled":
        scale = tl.load(x_scale + tokens, tokens < M, other=0.0)
    for k in range(0, span, BK):
        cols = part * span + k + tl.arange(0, BK)
        inside = k + tl.arange(0, BK) < span
        h = tl.load(x + tokens[None, :] * K + cols[:, None], inside[:, None] & here, other=0.0)
        if quantised:
            h = to_fp8(h.to(tl.float32) * inverse[None, :])
        w = tl.load(weight + rows[:, None] * K + cols[None, :], (rows < N)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(w, h, acc, input_precision="ieee")
    if INPUT != "plain":
        acc *= tl.load(weight_scale + rows, rows < N, other=0.0)[:, None] * scale[None, :]
    at = tokens[None, :] * N + rows[:, None]
    mask = (rows < N)[:, None] & here
    if USE == "store":
        tl.store(extra[0] + part * M * N + at, acc, mask)
    if USE == "swiglu":
        store_swiglu(extra[0], extra[1], acc, row, tokens, tokens < M, N, BN, BM, INPUT != "plain")
    if USE == "heads":
        a, b = halves(acc, BN, BM)
        store_head(extra, a, b, c, s, factor, slot, row // E, row, tokens, M, H, G, E, BN // 2)
    if USE == "add":
        if part == 0:
            total = pending_sum(extra[0], extra[1], at, mask, M, N, P)
            if S == 1:
                total += acc
            if S == 1 or P > 0:
                tl.store(extra[0] + at, total, mask)
        if S > 1:
            tl.store(extra[2] + part * M * N + at, acc, mask)
