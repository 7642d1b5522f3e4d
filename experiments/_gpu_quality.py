"""What FP8 changes: the same texts scored by two targets of one checkpoint.

Shapes: T tokens of a text, V vocabulary. Logarithms are natural; KL in nats a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.types import ModelInputs

CHUNK = 64  # tokens a forward: as many as decoding's arithmetic takes


@torch.inference_mode()
def log_probs(target: Any, ids: Sequence[int], start: int) -> Tensor:
    """Log-probabilities f32 [T - start, V] of the tokens from `start` on, each behind the true text before it."""
    target.allocate(1, len(ids), CHUNK, ())
    text = torch.tensor([list(ids)], device=target.device)
    parts = []
    for first in range(0, len(ids) - 1, CHUNK):
        last = min(first + CHUNK, len(ids) - 1)
        positions = torch.arange(first, last, dtype=torch.int32, device=target.device)[None]
        prefix = torch.full((1,), first, dtype=torch.int32, device=target.device)
        logits = target.forward(ModelInputs(text[:, first:last], positions, prefix)).logits[0]
        parts.append(logits[max(0, start - 1 - first) :].float().log_softmax(-1))
    return torch.cat(parts)


def compare(plain: Any, quantized: Any, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, float]:
    """Sums over the tokens of an answer: both negative log-likelihoods, equal first choices, KL(plain || quantized)."""
    ids = [*prompt, *answer]
    a, b = (log_probs(target, ids, len(prompt)) for target in (plain, quantized))
    at = torch.tensor(list(answer), device=a.device)[:, None]
    return {
        "tokens": len(answer),
        "plain_nll": -float(a.gather(1, at).double().sum()),
        "fp8_nll": -float(b.gather(1, at).double().sum()),
        "agree": int((a.argmax(-1) == b.argmax(-1)).sum()),
        "kl": float((a.double().exp() * (a.double() - b.double())).sum()),
    }


def perplexity(nll: float, tokens: float) -> float:
    """exp(negative log-likelihood a token)."""
    return math.exp(nll / tokens)
