"""Llama 4's mixture of experts at a few tokens: every distinct expert is read once, and the shared one beside them.

M tokens, H hidden size, X experts, I channels of an expert, N outputs and K inputs of a product. Products run in slots: slot 0
is the shared expert and takes all tokens; slot 1 + m is the expert of token m, and works only if no earlier token chose the
same, then for all tokens that did. A token's sums depend on its expert alone, not on who else is there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.linear import TOKENS, product, store_swiglu, to_fp8, token_scale
from specdec.kernels.gpu.pdl import wait
from specdec.kernels.gpu.table import Tile
from specdec.kernels.gpu.weights import data, descriptor, row_scale, static_scale
from specdec.kernels.reference import FP8, Experts, Fp8Weight, Weight

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


@triton.jit(do_not_specialize=["M"])
def expert_gate_up_kernel(
    x, x_scale, logits, forced, weight, weight_scale, out, largest, next_scale, shared_next, M,
    N: tl.constexpr, K: tl.constexpr, X: tl.constexpr, XP: tl.constexpr,
    QUANTISED: tl.constexpr, STATIC: tl.constexpr, FORCED: tl.constexpr, TMA: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(score * gate) * score * up of rows that alternate: out [2, M, N / 2], routed first; see `store_swiglu`.

    weight [X + 1, N, K] with the shared expert last, or a descriptor of it; weight_scale f32 [X + 1, N].

    x [M, K]; if QUANTISED e4m3 with x_scale f32 [M], and with STATIC both twice: for the shared expert, then for the routed.
    The shared expert goes ahead while the router runs, which does not write its inputs.
    """
    row, slot = tl.program_id(0) * BN, tl.program_id(1)
    own, half = slot * 0 + X, M
    if slot > 0:
        wait(PDL)
        own = tl.sum(choose(logits, forced, slot - 1 + tl.arange(0, 1), M, X, XP, FORCED)[0], 0)
        half = M * 0
    rows, one = row + tl.arange(0, BN), tl.full((BM,), 1.0, tl.float32)
    begin = M * 0  # of the inputs' rows
    if STATIC:
        begin = M - half
    if QUANTISED:
        row_scale = tl.load(weight_scale + own * N + rows, rows < N, other=0.0)
    earlier = 0
    for first in range(0, M, BM):
        tokens = first + tl.arange(0, BM)
        mine, score = tokens < M, one
        if slot > 0:
            chosen, score = choose(logits, forced, tokens, M, X, XP, FORCED)
            mine = mine & (chosen == own)
            earlier += tl.sum((mine & (tokens < slot - 1)).to(tl.int32), 0)
        if (earlier == 0) & (tl.sum(mine.to(tl.int32), 0) > 0):
            acc = own_product(x, one, weight, own, row, begin, first, M, N, K, False, TMA, BN, BK, BM)
            if (slot == 0) & (first == 0):
                wait(PDL)
            if QUANTISED:
                scale = tl.load(x_scale + begin + tokens, mine, other=0.0, cache_modifier=".cg")
                acc *= scale[:, None] * row_scale[None, :]
            scale_at = next_scale
            if slot == 0:
                scale_at = shared_next
            store_swiglu(
                out + half * (N // 2), largest + half * tl.cdiv(N, BN), scale_at, acc * score[:, None], row, tokens, mine,
                N, BM, BN, QUANTISED,
            )  # fmt: skip


@triton.jit
def own_product(
    x, inverse, weight, own, row, begin, first, M,
    N: tl.constexpr, K: tl.constexpr, ROUND: tl.constexpr, TMA: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """`product` of x [2, M, K], whose rows count from `begin` on, with expert `own` of weight [X + 1, N, K]."""
    if TMA and not ROUND:  # rows of both halves and of all experts are counted through
        return product(x, inverse, weight, own * N + row, begin + first, M, 0, N, K, K, ROUND, TMA, BN, BK, BM)
    elif TMA:
        some = x + begin * K
        return product(some, inverse, weight, own * N + row, first, M, 0, N, K, K, ROUND, TMA, BN, BK, BM)
    else:
        some, matrix = x + begin * K, weight + own.to(tl.int64) * (N * K)
        return product(some, inverse, matrix, row, first, M, 0, N, K, K, ROUND, TMA, BN, BK, BM)


@triton.jit(do_not_specialize=["M"])
def expert_down_kernel(
    x, largest, logits, forced, input_scale, shared_input_scale, weight, weight_scale, out, M,
    N: tl.constexpr, K: tl.constexpr, X: tl.constexpr, XP: tl.constexpr,
    INPUT: tl.constexpr, FORCED: tl.constexpr, LARGEST: tl.constexpr, TMA: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [2, M, K] times weight [X + 1, N, K] of each token's expert and of the shared one: out f32 [2, M, N] partial sums.

    INPUT: "plain" (weights' dtype), "static" (e4m3 already), or "dynamic": rounded to e4m3 here, by largest f32
    [2, M, LARGEST]. Routed parts come first. The logits are older than the kernel before, so experts are known before the wait.
    """
    row, slot = tl.program_id(0) * BN, tl.program_id(1)
    rows = row + tl.arange(0, BN)
    inside = rows < N
    own = tl.sum(choose(logits, forced, tl.maximum(slot - 1, 0) + tl.arange(0, 1), M, X, XP, FORCED)[0], 0)
    half = M * 0
    if slot == 0:
        own = own * 0 + X
        half = M
        input_scale = shared_input_scale
    if INPUT != "plain":
        row_scale = tl.load(weight_scale + own * N + rows, inside, other=0.0)
    wait(PDL)
    earlier = 0
    for first in range(0, M, BM):
        tokens = first + tl.arange(0, BM)
        mine = tokens < M
        if slot > 0:
            chosen, _ = choose(logits, forced, tokens, M, X, XP, FORCED)
            mine = mine & (chosen == own)
            earlier += tl.sum((mine & (tokens < slot - 1)).to(tl.int32), 0)
        if (earlier == 0) & (tl.sum(mine.to(tl.int32), 0) > 0):
            scale = tl.full((BM,), 1.0, tl.float32)
            if INPUT == "dynamic":
                scale = token_scale(largest + half * LARGEST, tokens, M, LARGEST)
            if INPUT == "static":
                scale *= tl.load(input_scale)
            rounded: tl.constexpr = INPUT == "dynamic"
            acc = own_product(x, 1.0 / scale, weight, own, row, half, first, M, N, K, rounded, TMA, BN, BK, BM)
            if INPUT != "plain":
                acc *= scale[:, None] * row_scale[None, :]
            at = (half + tokens)[:, None] * N + rows[None, :]
            tl.store(out + at, acc, mine[:, None] & inside[None, :])


def moe(ops: Any, x: Tensor, norm: Tensor, eps: float, experts: Experts) -> None:
    """x f32 [M, H] += the mixture of RMSNorm(x), as partial sums that stay pending; see `reference.moe`.

    The gate and up rows of both kinds of experts alternate. Errors: experts of which only some have FP8 weights, or only
    some have a static input scale.
    """
    gate_up, mode = experts.gate_up, _mode(experts)
    (m, hidden), num_experts = x.shape, len(experts.router)
    h, quantised, scales = _normed(ops, x, norm, eps, experts, mode)
    logits, given = torch.empty((m, num_experts), device=x.device), static_scale(gate_up)
    router_kernel[(num_experts, triton.cdiv(m, ROUTED))](
        h, experts.router, logits, quantised[-1], scales[-1], scales if given is None else given, m,
        X=num_experts, K=hidden, STATIC=mode == "static", BM=ROUTED, BLOCK=triton.next_power_of_2(hidden), num_warps=8,
        **ops.launch(),
    )  # fmt: skip
    rows, static = data(gate_up).shape[1], mode == "static"
    next_scale, shared_next = (static_scale(weight) for weight in (experts.down, experts.shared_down))
    inner = torch.empty((2, m, rows // 2), dtype=FP8 if static else h.dtype, device=x.device)
    t = ops.tile("expert_gate_up", gate_up)
    largest = torch.empty((2, m, triton.cdiv(rows, t.BN)), device=x.device)
    forced = logits if experts.forced is None else experts.forced
    constants = {"X": num_experts, "XP": triton.next_power_of_2(num_experts), "FORCED": experts.forced is not None}
    inputs, weight, options = _operands(h if mode == "plain" else quantised, gate_up, t, False)
    expert_gate_up_kernel[(triton.cdiv(rows, t.BN), m + 1)](
        inputs, scales, logits, forced, weight, row_scale(gate_up),
        inner, largest, largest if next_scale is None else next_scale, largest if shared_next is None else shared_next, m,
        N=rows, K=hidden, QUANTISED=mode != "plain", STATIC=static, **constants, **options, **ops.launch(t),
    )  # fmt: skip
    t = ops.tile("expert_down", experts.down)
    inputs, weight, options = _operands(inner, experts.down, t, mode == "dynamic")
    out = torch.empty((2, m, hidden), device=x.device)
    expert_down_kernel[(triton.cdiv(hidden, t.BN), m + 1)](
        inputs, largest, logits, forced,
        logits if next_scale is None else next_scale, logits if shared_next is None else shared_next,
        weight, row_scale(experts.down), out, m,
        N=hidden, K=rows // 2, INPUT=mode, LARGEST=largest.shape[-1], **constants, **options, **ops.launch(t),
    )  # fmt: skip
    ops.leave(x, out)


def pack_experts(experts: Experts) -> Experts:
    """The shared expert behind the routed ones, [X + 1, N, K], so that kernels take either by its number."""
    gate_up, shared_gate_up = _append(experts.gate_up, experts.shared_gate_up)
    down, shared_down = _append(experts.down, experts.shared_down)
    packed = replace(experts, gate_up=gate_up, down=down, shared_gate_up=shared_gate_up, shared_down=shared_down)
    _mode(packed)
    return packed


def _append(routed: Weight, shared: Weight) -> tuple[Weight, Weight]:
    """Both as one, and the view of the shared part."""
    if isinstance(routed, Tensor) and isinstance(shared, Tensor):
        whole = torch.cat([routed, shared[None]])
        return whole, whole[-1]
    if isinstance(routed, Tensor) or isinstance(shared, Tensor):
        return routed, shared  # refused by _mode
    rows = torch.cat([routed.data.view(torch.uint8), shared.data[None].view(torch.uint8)]).view(FP8)
    scale = torch.cat([routed.scale, shared.scale[None]])
    return Fp8Weight(rows, scale, routed.input_scale), Fp8Weight(rows[-1], scale[-1], shared.input_scale)


def _operands(x: Tensor, weight: Weight, t: Tile, rounded: bool) -> tuple[Any, Any, dict[str, Any]]:
    """x, the weight and the tile as the kernels take them: by descriptor where both are aligned. rounded: x in the kernel."""
    options = {"BN": t.BN, "BK": t.BK, "BM": TOKENS}
    matrix, inputs = descriptor(data(weight), t.BN, t.BK), descriptor(x, TOKENS, t.BK)
    if inputs is None or matrix is None:
        return x, data(weight), {**options, "TMA": False}
    return x if rounded else inputs, matrix, {**options, "TMA": True}


def _normed(
    ops: Any, x: Tensor, norm: Tensor, eps: float, experts: Experts, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised stream [M, H], and for FP8 weights its e4m3 [1 or 2, M, H] with scales f32 [1 or 2, M].

    Static scales may differ: the shared expert's part comes first, that of the routed ones is left to the router.
    """
    m, k = x.shape
    parts = 2 if mode == "static" else 1
    h = torch.empty((m, k), dtype=experts.router.dtype, device=x.device)
    quantised = torch.empty((parts, m, k), dtype=FP8, device=x.device)
    scales = torch.empty((parts, m), device=x.device)
    given = static_scale(experts.shared_gate_up)
    rounded = "no" if mode == "plain" else mode
    ops.add_norm(x, norm, eps, h, scales, quantised, scales, scales if given is None else given, "normed", rounded)
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
