"""The verifier interface: the acceptance rule. It never sees the target, only logits, and never a drafter's name."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from specdec.types import Acceptance, DraftTree, Law, Sampling

__all__ = ["Verifier"]


class Verifier(ABC):
    """Decides which drafts stand. Deterministic drafts (`tree.probs is None`) are point masses to every verifier."""

    lossless: bool = True  # the emitted tokens have exactly the target's law
    coupled: bool = False  # sampled output equals plain sampled output of the same seed, token for token
    supports_trees: bool = True
    reads_logits: bool = True  # False: accept sees them through `sampling.choose` alone, which takes one rank's part
    law: Law = "any"  # how siblings must have been drawn: "any" | "iid" | "distinct"

    @abstractmethod
    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        """Judge a tree. logits f32 [B, N, V]: row i is the target's prediction after node i."""
