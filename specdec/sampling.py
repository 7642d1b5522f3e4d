"""Warping logits and choosing tokens. Stateless: noise is a hash of (seed, position, stream, index).

Shapes: B rows, N nodes, V vocabulary. The same noise meets the same position whatever was drafted, so that a token chosen
during verification equals the token plain decoding would choose there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.kernels.steps import argmax, common_device
from specdec.types import Sampling, Vocabulary

__all__ = ["argmax", "choose", "gumbel", "sample", "uniform", "warp"]

# Streams keep draws at one position independent of each other.
STREAM_TOKEN, STREAM_ACCEPT, STREAM_RESIDUAL, STREAM_DRAFT = 0, 1, 2, 3


def _i32(value: int) -> int:
    """A 32-bit constant as the signed number torch stores."""
    return value - (1 << 32) if value >= 1 << 31 else value


_MUL1, _MUL2 = _i32(0x7FEB352D), _i32(0x846CA68B)


def _mix(x: Tensor) -> Tensor:
    """Bijective 32-bit mixer on int32 ("lowbias32", Wellons 2018); products wrap, shifts are made logical by the masks."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MUL1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _MUL2
    return x ^ ((x >> 16) & 0xFFFF)


def _to_i32(x: Tensor) -> Tensor:
    """Low 32 bits of an integer tensor, as int32 two's complement."""
    x = x.long() & 0xFFFFFFFF
    return torch.where(x >= 1 << 31, x - (1 << 32), x).to(torch.int32)


def uniform(seed: Tensor, position: Tensor, stream: int, index: Tensor) -> Tensor:
    """Uniform noise in (0, 1), f32, broadcast over its arguments (integers); equal arguments give equal noise."""
    seed = seed.long()
    key = _mix(_to_i32(seed) ^ _mix(_to_i32(seed >> 32) + stream + 1))
    key = _mix(key ^ _mix(_to_i32(position) * 4 + stream))
    bits = _mix(_mix(_to_i32(index) + key) ^ key)
    return ((bits.long() & 0xFFFFFFFF).double() + 0.5).mul_(2.0**-32).float().clamp_(max=1 - 2.0**-24)


def gumbel(seed: Tensor, position: Tensor, stream: int, size: int, first: int = 0) -> Tensor:
    """Gumbel noise for token ids from `first` on: [*position.shape, size], f32. seed broadcasts against position."""
    ids = torch.arange(first, first + size, device=position.device)
    u = uniform(seed[..., None], position[..., None], stream, ids)
    return -torch.log(-torch.log1p(-u))  # of 1 - u: finest where the noise is largest


def _rows(value: Tensor, logits: Tensor) -> Tensor:
    """A per-row value, shaped to broadcast over logits [B, ..., V]."""
    return value.view(-1, *[1] * (logits.dim() - 1))


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits after temperature, top-k and top-p (in that order); excluded tokens are -inf. [B, ..., V] -> same, f32.

    A greedy row (temperature 0) keeps only its argmax. Ties at the top-k border go to the lower id.
    """
    logits = logits.float()
    temperature = _rows(sampling.temperature, logits)
    best = argmax(logits)[..., None]
    if sampling.mode == "greedy":
        return torch.full_like(logits, -torch.inf).scatter_(-1, best, 0.0)
    warped = logits / torch.where(temperature > 0, temperature, 1.0)
    if sampling.mode == "warped":
        ordered, order = warped.sort(dim=-1, descending=True, stable=True)
        top_k = _rows(sampling.top_k, logits)
        rank = torch.arange(logits.shape[-1], device=logits.device)
        ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), -torch.inf)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # mass in front of a token; the first token always stays
        top_p = _rows(sampling.top_p, logits)
        ordered = ordered.masked_fill((top_p < 1) & (before >= top_p) & (rank > 0), -torch.inf)
        warped = torch.empty_like(warped).scatter_(-1, order, ordered)
    greedy = torch.full_like(logits, -torch.inf).scatter_(-1, best, 0.0)
    return torch.where(temperature > 0, warped, greedy)


def choose(logits: Tensor, sampling: Sampling, position: Tensor, stream: int = STREAM_TOKEN) -> Tensor:
    """One token per prediction: argmax for greedy rows, an exact sample of the warped law otherwise (Gumbel-max).

    logits [B, N, V]; position int32 [B, N], the absolute position of the chosen token. -> int64 [B, N].
    """
    if sampling.vocabulary is not None:
        return _choose_among_ranks(logits, sampling, position, stream, sampling.vocabulary)
    if sampling.mode == "greedy":
        return argmax(logits)
    fused = _fused(logits, sampling, position)
    if fused is not None:
        token: Tensor = fused(logits, sampling.temperature, sampling.seed, position, stream)
        return token
    noise = gumbel(sampling.seed[:, None], position, stream, logits.shape[-1])
    return argmax(warp(logits, sampling) + noise)


def _choose_among_ranks(
    logits: Tensor, sampling: Sampling, position: Tensor, stream: int, vocabulary: Vocabulary
) -> Tensor:
    """`choose` where every rank has a part of the vocabulary [B, N, V / ranks]: only each one's best token travels.

    Of equals the lowest id, as in the whole: ranks stand in the order of ids. f64 holds score and id exactly.
    """
    assert sampling.mode != "warped", "top-k and top-p need whole logits"
    scores = logits
    if sampling.mode == "sampled":
        noise = gumbel(sampling.seed[:, None], position, stream, logits.shape[-1], vocabulary.first)
        temperature = _rows(sampling.temperature, logits)
        scores = torch.where(temperature > 0, logits / torch.where(temperature > 0, temperature, 1.0) + noise, logits)
    best = argmax(scores)[..., None]
    pair = torch.cat([scores.gather(-1, best).double(), (best + vocabulary.first).double()], -1)
    scores, ids = vocabulary.gather(pair).unbind(-1)
    return ids.gather(0, argmax(scores.movedim(0, -1))[None]).squeeze(0).long()


def _fused(logits: Tensor, sampling: Sampling, position: Tensor) -> Callable[..., Tensor] | None:
    """The kernel that chooses in one pass, if there is one for this call: temperature alone, plain f32 logits."""
    plain = logits.dim() == 3 and logits.dtype == torch.float32 and logits.is_contiguous()
    plain = plain and position.shape == logits.shape[:2] and position.dtype == torch.int32
    if not plain or sampling.mode != "sampled":
        return None
    device = common_device(logits, sampling.temperature, sampling.seed, position)
    if device == "cuda":
        from specdec.kernels.gpu import sampling as gpu_sampling

        return gpu_sampling.choose
    if device == "cpu":
        from specdec.kernels.cpu import sampling as cpu_sampling

        return cpu_sampling.choose
    return None


def sample(probs: Tensor, sampling: Sampling, position: Tensor, stream: int) -> Tensor:
    """A draw from explicit, not necessarily normalised laws. probs [B, V], position [B] -> int64 [B]."""
    noise = gumbel(sampling.seed, position, stream, probs.shape[-1])
    return argmax(probs.log() + noise)
