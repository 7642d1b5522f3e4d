"""Recursive rejection sampling over a tree: SpecInfer (2305.09781, alg. 2), RSD (2402.14160), Sequoia (2402.12374).

Shapes: B rows, N nodes with the root, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.types import Acceptance, DraftTree, Law, Sampling
from specdec.verifier import Verifier
from specdec.verifier._common import (
    coins,
    draft_laws,
    emit,
    law_of_child,
    mass,
    real_nodes,
    residual,
    target_laws,
    without,
)


class RRS(Verifier):
    """Tries siblings in draw order; every rejection leaves the residual as the target law of the next one.

    replacement: siblings are independent draws (SpecInfer), else drawn without replacement (RSD, Sequoia).
    """

    def __init__(self, replacement: bool = True) -> None:
        self.replacement = replacement
        self.law: Law = "iid" if replacement else "distinct"

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        """One pass in node order is the whole descent: siblings stand in draw order, children behind their parents."""
        target_probs = target_laws(logits, sampling)
        draft_probs = draft_laws(tree, target_probs)
        u, real = coins(tree, sampling), real_nodes(tree)
        node = torch.zeros_like(tree.tokens[:, 0])
        target, draft = target_probs[:, 0], draft_probs[:, 0]
        for i in range(1, tree.tokens.shape[1]):
            token = tree.tokens[:, i]
            law = law_of_child(draft, token)
            judged = (tree.parents[:, i] == node) & real[:, i]
            stands = judged & (u[:, i] * mass(law, token) < mass(target, token))
            falls = (judged & ~stands)[:, None]
            target = torch.where(falls, residual(target, law), target)
            if not self.replacement:
                draft = torch.where(falls, without(draft, token), draft)
            target = torch.where(stands[:, None], target_probs[:, i], target)
            draft = torch.where(stands[:, None], draft_probs[:, i], draft)
            node = torch.where(stands, i, node)
        return emit(tree, node, target, sampling)
