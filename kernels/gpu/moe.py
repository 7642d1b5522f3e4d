"""Llama 4's mixture of experts at a few tokens: every distinct expert is read once, and the shared one beside them.

M tokens, H hidden size, X experts, I channels of an expert, N outputs and K inputs of a product, S parts of K. Products run in
slots: slot 0 is the shared expert and takes all tokens; slot 1 + m is the expert of token m, and works only if no
earlier token chose the same, then for all tokens that did. A token's sums depend on its expert alone, not on its column.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.linear import TOKENS, store_swiglu, to_fp8, token_scale
from specdec.kernels.gpu.norm import add_norm_kernel
from specdec.kernels.gpu.pdl import prefetch_rows, wait
from specdec.kernels.gpu.table import tile
from specdec.kernels.gpu.weights import data, input_scale, row_scale
from specdec.kernels.reference import FP8, Experts

ROUTED = 4  # tokens of a router program


@triton.jit(do_not_specialize=["M"])
def router_kernel(
    h, router, logits, quantised, scales, input_scale, M,
    X: tl.constexpr, K: tl.constexpr, STATIC: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h [M, K] times router [X, K]: logits f32 [M, X]. A program owns one expert's row, in registers before the wait.

    STATIC: the routed experts' inputs have a scale of their own, so h is rounded with it: e4m3 [M, K], scales f32 [M].
    """
    row, first = tl.program_id(0), tl.program_id(1) * BM
    cols, tokens = tl.arange(0, BLOCK), first + tl.arange(0, BM)
    w = tl.load(router + row * K + cols, cols < K, other=0.0).to(tl.float32)
    wait(PDL)
    x = tl.load(h + tokens[:, None] * K + cols[None, :], (tokens < M)[:, None] & (cols < K)[None, :], other=0.0)
    tl.store(logits + tokens * X + row, tl.sum(x.to(tl.float32) * w[None, :], 1), tokens < M)
    if STATIC:
        scale = tl.load(input_scale)
        for token in range(first + row, tl.minimum(first + BM, M), X):
            rounded = to_fp8(tl.load(h + token * K + cols, cols < K, other=0.0).to(tl.float32) * (1.0 / scale))
            tl.store(quantised + token * K + cols, rounded, cols < K)
            tl.store(scales + token, scale)


@triton.jit
def choose(logits, forced, tokens, M, X: tl.constexpr, XP: tl.constexpr, FORCED: tl.constexpr):
    """Expert of each token, of equal logits the first, and the sigmoid of its logit: int32 [n], f32 [n]."""
    ids = tl.arange(0, XP)
    mask = (tokens < M)[:, None] & (ids < X)[None, :]
    z = tl.load(logits + tokens[:, None] * X + ids[None, :], mask, other=float("-inf"), cache_modifier=".cg")
    if FORCED:
        chosen = tl.load(forced + tokens, tokens < M, other=0)
    else:
        chosen = tl.argmax(z, 1, tie_break_left=True)
    logit = tl.sum(tl.where(ids[None, :] == chosen[:, None], z, 0.0), 1)
    return chosen, 1.0 / (1.0 + tl.exp(-logit))


@triton.jit
def product(
    x, scale, weight, rows, tokens, mine, begin,
    N: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, ROUND: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """weight [N, K] times x [M, K], SPAN inputs from `begin` on, for the columns that are `mine`: f32 [BN, BM]."""
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for k in range(0, SPAN, BK):
        inside = k + tl.arange(0, BK) < SPAN
        cols = begin + k + tl.arange(0, BK)
        h = tl.load(
            x + tokens[None, :] * K + cols[:, None], inside[:, None] & mine[None, :], other=0.0, cache_modifier=".cg"
        )
        if ROUND:
            h = to_fp8(h.to(tl.float32) * (1.0 / scale)[None, :])
        w = tl.load(weight + rows[:, None] * K + cols[None, :], (rows < N)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(w, h, acc, input_precision="ieee")
    return acc


@triton.jit
def activation(
    x, x_scale, weight, weight_scale, out, largest, row, tokens, mine, score,
    N: tl.constexpr, K: tl.constexpr, QUANTISED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """silu(score * gate) * score * up of BN alternating rows, for the columns that are `mine`: out [M, N / 2]."""
    rows = row + tl.arange(0, BN)
    acc = product(x, score, weight, rows, tokens, mine, 0, N, K, K, False, BN, BK, BM)
    if QUANTISED:
        scale = tl.load(x_scale + tokens, mine, other=0.0, cache_modifier=".cg")
        acc *= tl.load(weight_scale + rows, rows < N, other=0.0)[:, None] * scale[None, :]
    store_swiglu(out, largest, acc * score[None, :], row, tokens, mine, N, BN, BM, QUANTISED)


@triton.jit(do_not_specialize=["M"])
def expert_gate_up_kernel(
    x, x_scale, logits, forced, weight, weight_scale, shared, shared_scale, experts, out, largest, M,
    N: tl.constexpr, K: tl.constexpr, X: tl.constexpr, XP: tl.constexpr,
    QUANTISED: tl.constexpr, STATIC: tl.constexpr, FORCED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(score * gate) * score * up of rows that alternate: out [2, M, N / 2], routed first; experts int32 [M].

    x [M, K]; if QUANTISED e4m3 with x_scale f32 [M], and with STATIC both twice: for the shared expert, then for the routed.
    weight [X, N, K] with weight_scale f32 [X, N], shared [N, K] with shared_scale f32 [N]. The shared expert, whose inputs the
    router does not write, goes ahead while the router runs.
    """
    row, slot = tl.program_id(0) * BN, tl.program_id(1)
    size: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    if slot == 0:
        prefetch_rows(shared, row, K * size, K * size, BN, N, PDL)
        score = tl.full((BM,), 1.0, tl.float32)
        for first in range(0, M, BM):
            tokens = first + tl.arange(0, BM)
            half, most = out + M * (N // 2), largest + M * tl.cdiv(N, BN)
            activation(
                x, x_scale, shared, shared_scale, half, most, row, tokens, tokens < M, score, N, K, QUANTISED, BN, BK, BM
            )  # fmt: skip
        wait(PDL)
    else:
        wait(PDL)
        own = tl.sum(choose(logits, forced, slot - 1 + tl.arange(0, 1), M, X, XP, FORCED)[0], 0)
        weight += own.to(tl.int64) * (N * K)
        prefetch_rows(weight, row, K * size, K * size, BN, N, PDL)
        if row == 0:
            tl.store(experts + slot - 1, own)
        if STATIC:
            x += M * K
            x_scale += M
        earlier = 0
        for first in range(0, M, BM):
            tokens = first + tl.arange(0, BM)
            chosen, score = choose(logits, forced, tokens, M, X, XP, FORCED)
            mine = (tokens < M) & (chosen == own)
            earlier += tl.sum((mine & (tokens < slot - 1)).to(tl.int32), 0)
            if (earlier == 0) & (tl.sum(mine.to(tl.int32), 0) > 0):
                scales = weight_scale + own * N
                activation(
                    x, x_scale, weight, scales, out, largest, row, tokens, mine, score, N, K, QUANTISED, BN, BK, BM
                )


@triton.jit(do_not_specialize=["M"])
def expert_down_kernel(
    x, largest, logits, forced, experts, input_scale, shared_input_scale, weight, weight_scale, shared, shared_scale, out, M,
    N: tl.constexpr, K: tl.constexpr, S: tl.constexpr, X: tl.constexpr, XP: tl.constexpr,
    INPUT: tl.constexpr, FORCED: tl.constexpr, LARGEST: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [2, M, K] times weight [X, N, K] of each token's expert and shared [N, K]: out f32 [2 S, M, N] partial sums.

    INPUT: "plain" (weights' dtype), or rounded to e4m3 here: "static", or "dynamic" by largest f32 [2, M, LARGEST]. Routed
    parts come first. The logits are older than the kernel before, so that the expert's rows are asked for while it runs.
    """
    row, part, slot = tl.program_id(0) * BN, tl.program_id(1), tl.program_id(2)
    size: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    span: tl.constexpr = K // S
    own = 0
    if slot > 0:
        own = tl.sum(choose(logits, forced, slot - 1 + tl.arange(0, 1), M, X, XP, FORCED)[0], 0)
        shared = weight + own.to(tl.int64) * (N * K)
        shared_scale = weight_scale + own * N
        shared_input_scale = input_scale
    prefetch_rows(shared + part * span, row, K * size, span * size, BN, N, PDL)
    wait(PDL)
    x += tl.where(slot > 0, 0, M * K)
    largest += tl.where(slot > 0, 0, M * LARGEST)
    out += (tl.where(slot > 0, 0, S) + part) * M * N
    rows = row + tl.arange(0, BN)
    earlier = 0
    for first in range(0, M, BM):
        tokens = first + tl.arange(0, BM)
        mine = tokens < M
        if slot > 0:
            mine = mine & (tl.load(experts + tokens, mine, other=-1) == own)
            earlier += tl.sum((mine & (tokens < slot - 1)).to(tl.int32), 0)
        if (earlier == 0) & (tl.sum(mine.to(tl.int32), 0) > 0):
            scale = tl.full((BM,), 1.0, tl.float32)
            if INPUT != "plain":
                scale = token_scale(largest, shared_input_scale, tokens, M, LARGEST, INPUT == "static")
            acc = product(x, scale, shared, rows, tokens, mine, part * span, N, K, span, INPUT != "plain", BN, BK, BM)
            if INPUT != "plain":
                acc *= tl.load(shared_scale + rows, rows < N, other=0.0)[:, None] * scale[None, :]
            tl.store(out + tokens[None, :] * N + rows[:, None], acc, (rows < N)[:, None] & mine[None, :])


def moe(ops: Any, x: Tensor, norm: Tensor, eps: float, experts: Experts) -> None:
    """x f32 [M, H] += the mixture of RMSNorm(x), as partial sums that stay pending; see `reference.moe`.

    The gate and up rows of both kinds of experts alternate. Errors: experts of which only some have FP8 weights, or only
    some have a static input scale.
    """
    gate_up, mode = experts.gate_up, _mode(experts)
    (m, hidden), num_experts = x.shape, len(experts.router)
    h, quantised, scales = _normed(ops, x, norm, eps, experts, mode)
    logits = torch.empty((m, num_experts), device=x.device)
    router_kernel[(num_experts, triton.cdiv(m, ROUTED))](
        h, experts.router, logits, quantised[-1], scales[-1], input_scale(gate_up, scales), m,
        X=num_experts, K=hidden, STATIC=mode == "static", BM=ROUTED, BLOCK=triton.next_power_of_2(hidden), num_warps=8,
        **ops.launch(),
    )  # fmt: skip
    rows = data(gate_up).shape[1]
    inner = torch.empty((2, m, rows // 2), dtype=h.dtype, device=x.device)
    chosen = torch.empty(m, dtype=torch.int32, device=x.device)
    t = tile("expert_gate_up", rows, hidden, data(gate_up).element_size())
    largest = torch.empty((2, m, triton.cdiv(rows, t.BN)), device=x.device)
    expert_gate_up_kernel[(triton.cdiv(rows, t.BN), m + 1)](
        h if mode == "plain" else quantised, scales, logits, chosen if experts.forced is None else experts.forced,
        data(gate_up), row_scale(gate_up), data(experts.shared_gate_up), row_scale(experts.shared_gate_up),
        chosen, inner, largest, m,
        N=rows, K=hidden, X=num_experts, XP=triton.next_power_of_2(num_experts),
        QUANTISED=mode != "plain", STATIC=mode == "static", FORCED=experts.forced is not None,
        BN=t.BN, BK=t.BK, BM=TOKENS, **ops.launch(t),
    )  # fmt: skip
    ops.pending = (x, _down(ops, inner, largest, logits, chosen, experts, mode))


def _down(
    ops: Any, inner: Tensor, largest: Tensor, logits: Tensor, chosen: Tensor, experts: Experts, mode: str
) -> Tensor:
    """Partial sums f32 [2 S, M, H] of inner [2, M, I]."""
    (m, k), (num_experts, n, _) = inner.shape[1:], data(experts.down).shape
    t = tile("expert_down", n, k, data(experts.down).element_size())
    out = torch.empty((2 * t.splits, m, n), device=inner.device)
    expert_down_kernel[(triton.cdiv(n, t.BN), t.splits, m + 1)](
        inner, largest, logits, chosen if experts.forced is None else experts.forced, chosen,
        input_scale(experts.down, logits), input_scale(experts.shared_down, logits),
        data(experts.down), row_scale(experts.down), data(experts.shared_down), row_scale(experts.shared_down), out, m,
        N=n, K=k, S=t.splits, X=num_experts, XP=triton.next_power_of_2(num_experts),
        INPUT=mode, FORCED=experts.forced is not None,
        LARGEST=largest.shape[-1], BN=t.BN, BK=t.BK, BM=TOKENS, **ops.launch(t),
    )  # fmt: skip
    return out


def _normed(
    ops: Any, x: Tensor, norm: Tensor, eps: float, experts: Experts, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised stream [M, H], and for FP8 weights its e4m3 [1 or 2, M, H] with scales f32 [1 or 2, M].

    Static scales may differ: the shared expert's part comes first, that of the routed ones is left to the router.
    """
    (m, k), (pending, count) = x.shape, ops.pending_parts(x)
    parts = 2 if mode == "static" else 1
    h = torch.empty((m, k), dtype=experts.router.dtype, device=x.device)
    quantised = torch.empty((parts, m, k), dtype=FP8, device=x.device)
    scales = torch.empty((parts, m), device=x.device)
    add_norm_kernel[(m,)](
        x, pending, norm, h, scales, quantised, scales, input_scale(experts.shared_gate_up, scales), m, eps,
        K=k, P=count, PLAIN="normed", QUANTISE="no" if mode == "plain" else mode, BLOCK=triton.next_power_of_2(k),
        num_warps=8, **ops.launch(),
    )  # fmt: skip
    return h, quantised, scales


def _mode(experts: Experts) -> str:
    """How inputs are rounded: "plain" (not at all), "static" or "dynamic"."""
    modes = set()
    for weight in (experts.gate_up, experts.down, experts.shared_gate_up, experts.shared_down):
        if isinstance(weight, Tensor):
            modes.add("plain")
        else:
            modes.add("dynamic" if weight.input_scale is None else "static")
    if len(modes) > 1:
        found = " and ".join(sorted(modes))
        raise ValueError(
            f"the experts of one layer take {found} inputs: keep all their weights in FP8 or none, and give all or none "
            "of them an input scale"
        )
    return modes.pop()
