"""Typical acceptance (Medusa, Cai et al. 2401.10774, sec. 2.3.1). Lossy: the output does not have the target's law.

Shapes: B rows, N nodes with the root, D depth, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.sampling import argmax
from specdec.types import Acceptance, DraftTree, Sampling
from specdec.verifier import Verifier
from specdec.verifier._common import mass, path_to, pick, real_nodes, target_laws


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

        paths = tree.paths()
        steps = paths[..., 1:].clamp(min=0).long().flatten(1)
        padding = paths[..., 1:] < 0
        stands = (typical.gather(1, steps).view_as(padding) | padding).all(-1)
        stands[:, 0] = True
        likelihood = probs.log().gather(1, steps).view_as(padding).masked_fill(padding, 0.0).sum(-1)
        depths = (~padding).sum(-1).masked_fill(~stands, -1)
        deepest = depths == depths.amax(1, keepdim=True)
        node = likelihood.masked_fill(~deepest, -torch.inf).argmax(1)
        path, num_accepted = path_to(tree, node)
        return Acceptance(path, num_accepted, argmax(pick(logits, node)))
