"""What a user may ask of a decoder, checked before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from specdec.drafter import Drafter
from specdec.types import Sampling
from specdec.verifier import Verifier


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen: temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int | float):
                raise ValueError(f"sampling.{name}={value!r} must be a number")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"sampling.temperature={self.temperature} must be 0 (greedy) or above")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise ValueError(f"sampling.top_k={self.top_k} must be a whole number, 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p} must be above 0 and at most 1 (off)")

    def tensors(self, batch: int, device: torch.device) -> Sampling:
        """The same values for every row; seeds and positions are set as requests begin."""
        mode: Literal["greedy", "sampled", "warped"]
        mode = "greedy" if self.temperature == 0 else "sampled" if self.top_k == 0 and self.top_p == 1 else "warped"
        zeros = torch.zeros(batch, device=device)
        return Sampling(
            zeros + self.temperature, zeros.int() + self.top_k, zeros + self.top_p, zeros.long(), zeros.int(), mode
        )


def needs_whole_logits(drafter: Drafter, verifier: Verifier, sampling: Sampling, logprobs: bool = False) -> bool:
    """Whether more of the logits is looked at than which token is chosen, so that no part of the vocabulary will do."""
    observes = type(drafter).observe is not Drafter.observe
    return verifier.reads_logits or observes or sampling.mode == "warped" or logprobs


def check_pair(drafter: Drafter, verifier: Verifier) -> None:
    """ValueError where a verifier cannot judge what a drafter proposes: says what each needs and offers."""
    names = type(drafter).__name__, type(verifier).__name__
    if not verifier.supports_trees and drafter.depth != drafter.num_draft_tokens:
        raise ValueError(
            f"{names[1]} judges chains only, and {names[0]} proposes trees ({drafter.num_draft_tokens} drafts, depth "
            f"{drafter.depth}): use verifier=target_only, rrs or traversal, or a drafter that proposes chains"
        )
    if verifier.law not in drafter.laws | {"any"} and "any" not in drafter.laws:
        raise ValueError(
            f"{names[1]} needs drafts of law {verifier.law!r}, and {names[0]} offers {sorted(drafter.laws)}: use "
            "verifier=target_only or another drafter"
        )
