"""Block verification (Sun et al. 2403.10444, alg. 2): judges a chain as a whole and never accepts less on average.

Shapes: B rows, N nodes with the root, V vocabulary. reach [B, N] is the paper's p_i, surplus [B, N] the sum in its h_i.
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


class Block(Verifier):
    """Keeps the longest prefix i with u_i < h_i, where h_i = surplus_i / (surplus_i + 1 - reach_i)."""

    supports_trees = False
    law: Law = "iid"

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        """Behind the last draft the draft law is zero: h becomes reach, the residual the target law."""
        require_chain("block", tree)
        target_probs = target_laws(logits, sampling)
        draft_probs = chain_laws(tree, target_probs)
        drafts, real = tree.tokens[:, 1:], real_nodes(tree)
        ratio = mass(target_probs[:, :-1], drafts) / mass(draft_probs[:, :-1], drafts)
        ratio = torch.where(real[:, 1:], ratio, 0.0)

        levels = [torch.ones_like(target_probs[:, 0, 0])]
        for i in range(ratio.shape[1]):
            levels.append((levels[-1] * ratio[:, i]).clamp(max=1.0))
        reach = torch.stack(levels, 1)
        scaled = reach[..., None] * target_probs
        surplus = (scaled - draft_probs).relu().sum(-1)
        stands = (coins(tree, sampling) < surplus / (surplus + (1 - reach))) & real

        index = torch.arange(real.shape[1], device=real.device)
        node = torch.where(stands, index, 0).amax(1)  # the root always stands
        return emit(tree, node, residual(pick(scaled, node), pick(draft_probs, node)), sampling)
