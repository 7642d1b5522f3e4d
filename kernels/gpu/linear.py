"""Products of a few tokens with a large weight matrix, which is read once, through the tensor memory accelerator.

M tokens, K inputs, N outputs, P pending partial sums, S parts of K. A program owns BN weight rows and BM token columns.
Which tile and split is used depends on (N, K) alone, so the bits of a token's result do not depend on
who shares the forward. M is never specialised: Triton lays sums out by what it knows of an address. Results are [BM, BN]: the
two rows of a pair, which alternate, then lie in one thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specdec.kernels.gpu.heads import load_places, pairs, store_head
from specdec.kernels.gpu.pdl import wait

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
def to_fp8(x):
    """Round to e4m3, saturating. x f32."""
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def swiglu(acc, BM: tl.constexpr, BN: tl.constexpr):
    """silu(gate) * up of alternating columns: [BM, BN] -> [BM, BN / 2]."""
    gate, up = pairs(acc, BM, BN)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def store_swiglu(
    out,
    largest,
    next_scale,
    acc,
    row,
    tokens,
    mine,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """silu(gate) * up of the rows from `row` on: out [M, N / 2]; if e4m3, rounded by next_scale.

    LARGEST: the largest magnitude by token, too: largest [M, N / BN].
    """
    channel = row // 2 + tl.arange(0, BN // 2)
    at = tokens[:, None] * (N // 2) + channel[None, :]
    mask = mine[:, None] & (channel < N // 2)[None, :]
    y = swiglu(acc, BM, BN)
    if out.dtype.element_ty == tl.float8e4nv:
        y = y.to(tl.bfloat16).to(tl.float32) * (1.0 / tl.load(next_scale))
        tl.store(out + at, to_fp8(y), mask)
    else:
        y = y.to(out.dtype.element_ty)
        tl.store(out + at, y, mask)
        if LARGEST:
            found = tl.max(tl.where(mask, tl.abs(y.to(tl.float32)), 0.0), 1)
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


@triton.jit(do_not_specialize=["M", "extra"])
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
    at = tokens[:, None] * N + rows[None, :]
    mask = (tokens < M)[:, None] & (rows < N)[None, :]
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
    y = tl.trans(tl.sum(acc, 0))
    if PARTS > 0:
        y *= tl.rsqrt(tl.sum(found, 1) / K + eps)[:, None]
    if USE == "store":
        tl.store(extra[0] + at, y, mask)
    if USE == "swiglu":
        store_swiglu(extra[0], extra[0], extra[0], y, row, tokens, tokens < M, N, BM, BN, False)
    if USE == "heads":
        a, b = pairs(y, BM, BN)
        store_head(extra, a, b, c, s, factor, slot, row // E, row, tokens, M, H, G, E, BN // 2)
    if USE == "add" or USE == "ready":
        y += before
        tl.store(extra[0] + at, y, mask)
    if USE == "ready":
        tl.store(extra[1] + at, (y * gain[None, :]).to(extra[1].dtype.element_ty), mask)
        tl.store(extra[3] + tokens * tl.num_programs(0) + tl.program_id(0), tl.sum(y * y, 1), tokens < M)


@triton.jit
def token_scale(largest, tokens, M, PARTS: tl.constexpr):
    """FP8 scale of each token: its largest magnitude / 448. largest f32 [M, PARTS] -> f32 [BM]."""
    part = tl.arange(0, triton.next_power_of_2(PARTS))
    mask = (tokens < M)[:, None] & (part < PARTS)[None, :]
    found = tl.load(largest + tokens[:, None] * PARTS + part[None, :], mask, other=0.0)
    return tl.maximum(tl.max(found, 1) / 448.0, MIN_SCALE)


@triton.jit
def operands(
    x, inverse, weight, row, first, k, end, M,
    N: tl.constexpr, K: tl.constexpr, ROUND: tl.constexpr, TMA: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """BK inputs from `k` on of rows from `row` and tokens from `first` on: [BN, BK] and [BM, BK]; beyond edges and `end` 0.

    TMA: weight [N, K] and, unless ROUND, x [M, K] are descriptors of such blocks. ROUND: x times inverse f32 [BM] becomes e4m3.
    """
    cols = k + tl.arange(0, BK)
    if TMA:
        w = weight.load([row, k])
    else:
        rows = row + tl.arange(0, BN)
        w = tl.load(weight + rows[:, None] * K + cols[None, :], (rows < N)[:, None] & (cols < end)[None, :], other=0.0)
    if TMA and not ROUND:
        h = x.load([first, k])
    else:
        tokens = first + tl.arange(0, BM)
        h = tl.load(x + tokens[:, None] * K + cols[None, :], (tokens < M)[:, None] & (cols < end)[None, :], other=0.0)
        if ROUND:
            h = to_fp8(h.to(tl.float32) * inverse[:, None])
    return w, h


@triton.jit
def product(
    x, inverse, weight, row, first, M, begin,
    N: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, ROUND: tl.constexpr, TMA: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """x [M, K] times weight [N, K], SPAN inputs from `begin` on: f32 [BM, BN]. By descriptor BK must divide a SPAN below K.

    Weight rows are the rows of the matrix unit, which has at least 64.
    """
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for k in range(0, SPAN, BK):
        w, h = operands(x, inverse, weight, row, first, begin + k, begin + SPAN, M, N, K, ROUND, TMA, BN, BK, BM)
        acc = tl.dot(w, tl.trans(h), acc, input_precision="ieee")
    return tl.trans(acc)


@triton.jit(do_not_specialize=["M", "extra"])
def linear_kernel(
    x, x_scale, weight, weight_scale, extra, M, LARGEST: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, P: tl.constexpr, S: tl.constexpr, INPUT: tl.constexpr, USE: tl.constexpr,
    TMA: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [M, K] times weight [N, K] with scale a row for e4m3, in turns of BK inputs; see `operands` for what x and weight are.

    INPUT: "plain" (weights' dtype), e4m3 that is "scaled" by token (x_scale f32 [M]) or "static" (x_scale f32 [1]), or
    "dynamic", rounded to e4m3 here by the largest magnitudes of each token, x_scale f32 [M, LARGEST].
    USE with `extra`: "store" (out f32 [S, M, N]); "swiglu" (out, largest, next_scale of `store_swiglu`), S = 1; "add" (stream
    f32 [M, N], pending f32 [P, M, N], out f32 [S, M, N]): pending sums go into the stream, and so does the product if S = 1;
    the parts of S > 1 are left in out.
    """
    row, part, first = tl.program_id(0) * BN, tl.program_id(1), tl.program_id(2) * BM
    span: tl.constexpr = K // S
    rows, tokens = row + tl.arange(0, BN), first + tl.arange(0, BM)
    at = tokens[:, None] * N + rows[None, :]
    mask = (tokens < M)[:, None] & (rows < N)[None, :]
    if INPUT != "plain":
        row_scale = tl.load(weight_scale + rows, rows < N, other=0.0)
    wait(PDL)
    scale = tl.full((BM,), 1.0, tl.float32)
    if INPUT == "dynamic":
        scale = token_scale(x_scale, tokens, M, LARGEST)
    elif INPUT == "scaled":
        scale = tl.load(x_scale + tokens, tokens < M, other=0.0)
    elif INPUT == "static":
        scale *= tl.load(x_scale)
    if USE == "add" and S == 1:  # asked for before the product, whose time hides it
        total = pending_sum(extra[0], extra[1], at, mask, M, N, P)
    acc = product(x, 1.0 / scale, weight, row, first, M, part * span, N, K, span, INPUT == "dynamic", TMA, BN, BK, BM)
    if INPUT != "plain":
        acc *= scale[:, None] * row_scale[None, :]
    if USE == "store":
        tl.store(extra[0] + part * M * N + at, acc, mask)
    if USE == "swiglu":
        store_swiglu(extra[0], extra[1], extra[2], acc, row, tokens, tokens < M, N, BM, BN, INPUT != "plain")
    if USE == "add":
        if S == 1:
            tl.store(extra[0] + at, total + acc, mask)
        else:
            if part == 0 and P > 0:
                tl.store(extra[0] + at, pending_sum(extra[0], extra[1], at, mask, M, N, P), mask)
            tl.store(extra[2] + part * M * N + at, acc, mask)
