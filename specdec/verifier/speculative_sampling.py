"""Speculative sampling (Leviathan et al. 2211.17192, alg. 1; Chen et al. 2302.01318, alg. 2).

Shapes: B rows, N nodes with the root, V vocabulary; K = N - 1 drafts.
"""

from __future__ import annotations

from torch import Tensor

from specdec.types import Acceptance, DraftTree, Law, Sampling
from specdec.verifier import Verifier
from specdec.verifier._common import (
    chain_laws,
    coins,
    emit,
    mass,
    pick,
    real_nodes,
    require_chain,
    residual,
    target_laws,
)


class SpeculativeSampling(Verifier):
    """Token by token: keep x if u < target(x) / draft(x), else emit from normalise((target - draft)+) and stop."""

    supports_trees = False
    law: Law = "iid"

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        """A draft stands with probability min(1, target / draft): sum_x min(target, draft) on average."""
        require_chain("speculative_sampling", tree)
        target_probs = target_laws(logits, sampling)
        draft_probs = chain_laws(tree, target_probs)
        drafts = tree.tokens[:, 1:]
        target_x, draft_x = mass(target_probs[:, :-1], drafts), mass(draft_probs[:, :-1], drafts)
        stands = (coins(tree, sampling)[:, 1:] * draft_x < target_x) & real_nodes(tree)[:, 1:]
        node = stands.cumprod(1).sum(1)
        return emit(tree, node, residual(pick(target_probs, node), pick(draft_probs, node)), sampling)
