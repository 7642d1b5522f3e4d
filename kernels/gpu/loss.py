"""A draft law judged by the target's: losses, what they are measured by, and the gradient, in one pass over the logits each.

n predictions, V target vocabulary, W draft vocabulary; p the target's law seen from the draft vocabulary, of mass c, and q the
draft's. In torch every term of a loss is a kernel over [n, W], and their memory traffic is most of a training step.

    loss            d loss / d logit i                    (d alpha / d logit i = q_i ([q_i < p_i] - sum over q_j < p_j of q_j))
    kl              c q_i - p_i
    acceptance      -c / alpha * d alpha
    hybrid          lambda (c q_i - p_i) - (1 - lambda) d alpha, lambda = exp(-eta alpha) held constant
    cross_entropy, text                                   q_i - [i is the label], where there is one
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TINY = tl.constexpr(1e-30)  # for a draft vocabulary without any mass
BLOCK = 4096


@triton.jit(do_not_specialize=["V", "W"])
def law_kernel(logits, ids, probs, best, V, W, BLOCK: tl.constexpr):
    """The softmax of logits f32 [n, V] at ids int64 [W]: probs f32 [n, W], and the argmax int64 [n], of equals the first."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    peak, total, place = running(logits + row * V, V, lane, BLOCK)
    tl.store(best + row, place.to(tl.int64))
    for begin in range(0, W, BLOCK):
        inside = begin + lane < W
        token = tl.load(ids + begin + lane, inside, other=0)
        value = tl.load(logits + row * V + token, inside, other=float("-inf"))
        tl.store(probs + row * W + begin + lane, tl.exp(value - peak) / total, inside)


@triton.jit
def running(logits, size, lane, BLOCK: tl.constexpr):
    """Largest of a row of logits, the sum of exponentials below it, and where it stands."""
    first = tl.load(logits + lane, lane < size, other=float("-inf")).to(tl.float32)
    peak, place = tl.max(first, 0), tl.argmax(first, 0)
    total = tl.sum(tl.exp(first - peak), 0)
    for begin in range(BLOCK, size, BLOCK):
        value = tl.load(logits + begin + lane, begin + lane < size, other=float("-inf")).to(tl.float32)
        high = tl.max(value, 0)
        place = tl.where(high > peak, begin + tl.argmax(value, 0), place)
        higher = tl.maximum(peak, high)
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(value - higher), 0)
        peak = higher
    return peak, total, place


@triton.jit(do_not_specialize=["W", "eta"])
def judge_kernel(logits, probs, best, label, found, grad, W, eta, LOSS: tl.constexpr, BLOCK: tl.constexpr):
    """found f32 [n, 3]: loss, alpha and whether the argmax is `best`; grad [n, W] of the loss. logits [n, W], probs f32 [n, W].

    best int64 [n] and label int64 [n] are draft ids, -1 outside the draft vocabulary. alpha is the sum of min(p, q).
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    logits, probs, grad = logits + row * W, probs + row * W, grad + row * W
    peak, total, place = running(logits, W, lane, BLOCK)
    log_total = peak + tl.log(total)
    mass = tl.sum(tl.zeros((BLOCK,), tl.float32), 0)
    alpha, below, divergence = mass, mass, mass
    for begin in range(0, W, BLOCK):
        inside = begin + lane < W
        log_q = tl.load(logits + begin + lane, inside, other=-1e30).to(tl.float32) - log_total
        p, q = tl.load(probs + begin + lane, inside, other=0.0), tl.exp(log_q)
        mass += tl.sum(p, 0)
        alpha += tl.sum(tl.minimum(p, q), 0)
        below += tl.sum(tl.where(q < p, q, 0.0), 0)
        divergence += tl.sum(p * (tl.log(tl.maximum(p, TINY)) - log_q), 0)
    divergence -= mass * tl.log(tl.maximum(mass, TINY))
    share = tl.exp(-eta * alpha)
    target = tl.load(label + row)
    if LOSS == "kl":
        loss, pull, push = divergence, mass * 0 + 1.0, mass * 0
    elif LOSS == "hybrid":
        loss, pull, push = share * divergence + (1 - share) * (1 - alpha), share, 1 - share
    elif LOSS == "acceptance":
        overlap = alpha / tl.maximum(mass, TINY)
        loss, pull = -mass * tl.log(tl.maximum(overlap, 1e-6)), mass * 0
        push = tl.where(overlap > 1e-6, mass / tl.maximum(alpha, TINY), 0.0)
    else:
        chosen = tl.load(logits + tl.maximum(target, 0)).to(tl.float32) - log_total
        loss, pull, push = tl.where(target >= 0, -chosen, 0.0), tl.where(target >= 0, 1.0, 0.0), mass * 0
    tl.store(found + row * 3, loss)
    tl.store(found + row * 3 + 1, alpha)
    tl.store(found + row * 3 + 2, (place == tl.load(best + row)).to(tl.float32))
    for begin in range(0, W, BLOCK):
        inside = begin + lane < W
        q = tl.exp(tl.load(logits + begin + lane, inside, other=float("-inf")).to(tl.float32) - log_total)
        p = tl.load(probs + begin + lane, inside, other=0.0)
        if LOSS == "kl" or LOSS == "hybrid" or LOSS == "acceptance":
            slope = pull * (mass * q - p) - push * q * (tl.where(q < p, 1.0, 0.0) - below)
        else:
            slope = pull * (q - tl.where(begin + lane == target, 1.0, 0.0))
        tl.store(grad + begin + lane, slope.to(grad.dtype.element_ty), inside)


def seen_law(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The target's law at ids int64 [W], f32 [n, W], and its argmax int64 [n], from its logits f32 [n, V]."""
    n, width = len(logits), len(ids)
    probs = torch.empty(n, width, device=logits.device)
    best = torch.empty(n, dtype=torch.int64, device=logits.device)
    if n:
        law_kernel[(n,)](logits, ids, probs, best, logits.shape[1], width, BLOCK=BLOCK, num_warps=8)
    return probs, best


class Judged(torch.autograd.Function):
    """Logits [n, W] against a law: the summed loss, whose gradient is known, and f32 [n, 3]: loss, alpha, hit of each."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, probs: Tensor, best: Tensor, label: Tensor, name: str, eta: float
    ) -> tuple[Tensor, Tensor]:
        found, grad = torch.empty(len(logits), 3, device=logits.device), torch.empty_like(logits)
        if len(logits):
            judge_kernel[(len(logits),)](
                logits, probs, best, label, found, grad, logits.shape[1], eta, LOSS=name, BLOCK=BLOCK, num_warps=8
            )
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(found)
        return found[:, 0].sum(), found

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad.mul_(slope), None, None, None, None, None
