"""Static ensemble (DIVERSED, Wang et al. 2604.07622): the mixture of both models is verified in the target's place.

Lossy, with a known law. Speculative cascades (2405.19261) mix too, with a weight that a deferral rule chooses.
Shapes: B rows, N nodes with the root, V vocabulary; K = N - 1 drafts.
"""

from __future__ import annotations

import torch
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


class StaticEnsemble(Verifier):
    """Speculative sampling for the law weight * target + (1 - weight) * draft; the bonus token is the target's.

    Without a draft law there is nothing to mix: greedy rows and deterministic drafts are judged by the target alone.
    """

    lossless = False
    supports_trees = False
    law: Law = "iid"

    def __init__(self, weight: float = 0.7) -> None:
        if not 0 < weight <= 1:
            raise ValueError(f"static_ensemble needs 0 < weight <= 1, the target's share, but got {weight}")
        self.weight = weight

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        """A draft stands with probability min(1, mixture / draft); with weight 1 this is speculative sampling."""
        require_chain("static_ensemble", tree)
        target_probs = self._mixture(tree, target_laws(logits, sampling), sampling)
        draft_probs = chain_laws(tree, target_probs)
        drafts = tree.tokens[:, 1:]
        target_x, draft_x = mass(target_probs[:, :-1], drafts), mass(draft_probs[:, :-1], drafts)
        stands = (coins(tree, sampling)[:, 1:] * draft_x < target_x) & real_nodes(tree)[:, 1:]
        node = stands.cumprod(1).sum(1)
        return emit(tree, node, residual(pick(target_probs, node), pick(draft_probs, node)), sampling)

    def _mixture(self, tree: DraftTree, target_probs: Tensor, sampling: Sampling) -> Tensor:
        """The mixed law after every node that has a draft behind it, elsewhere the target's. f32 [B, N, V]."""
        if tree.probs is None:
            return target_probs
        index = torch.arange(tree.tokens.shape[1], device=target_probs.device)
        mixed = (index < tree.num_nodes[:, None] - 1) & (sampling.temperature > 0)[:, None]
        return torch.lerp(target_probs, tree.probs, torch.where(mixed, 1 - self.weight, 0.0)[..., None])
