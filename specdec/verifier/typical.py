"""Typical acceptance (Medusa, Cai et al. 2401.10774, sec. 2.3.1). Lossy: the output does not have the target's law.

Shapes: B rows, N nodes with the root, D depth, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.sampling import argmax
from specdec.types import Acceptance, DraftTree, Sampling
from specdec.verifier import Verifier
from specdec.verifier._common import longest_path, mass, path_to, pick, real_nodes, target_laws


class Typical(Verifier):
    """Keeps a draft whose target probability exceeds min(epsilon, delta * exp(-entropy)); the next token is greedy."""

    lossless = False

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3) -> None:
        if not (0 < epsilon < 1 and 0 < delta < 1):  # from 1 on, greedy rows would reject the argmax
            raise ValueError(f"typical needs 0 < epsilon < 1 and 0 < delta < 1, but got {epsilon} and {delta}")
        self.epsilon, self.delta = epsilon, delta

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        """The longest path of typical tokens; among equals the likeliest, then the first."""
        target_probs = target_laws(logits, sampling)
        entropy = torch.special.entr(target_probs).sum(-1)
        threshold = (self.delta * torch.exp(-entropy)).clamp(max=self.epsilon)
        parents = tree.parents.clamp(min=0).long()
        probs = mass(target_probs.gather(1, parents[..., None].expand_as(target_probs)), tree.tokens)
        typical = (probs > threshold.gather(1, parents)) & real_nodes(tree)
        node = longest_path(tree, typical, probs)
        path, num_accepted = path_to(tree, node)
        return Acceptance(path, num_accepted, argmax(pick(logits, node)))
