"""K-SEQ, the draft selection of SpecTr (Sun et al. 2310.15141): one threshold for all independent siblings.

Shapes: B rows, N nodes with the root, V vocabulary; k [B] children of a node that were drawn from its draft law.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.types import Acceptance, DraftTree, Law, Sampling
from specdec.verifier import Verifier
from specdec.verifier._common import coins, draft_laws, emit, pick, real_nodes, residual, target_laws

HALVINGS = 24  # of the interval that holds rho; f32 resolves no more


class KSeq(Verifier):
    """Keeps the first of k siblings with u < target(x) / (rho * draft(x)), else emits from (target - rho * draft)+.

    With k = 1 that is speculative sampling. Children that are point masses are tried one by one behind the drawn ones.
    """

    law: Law = "iid"

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        """One level a turn. Point masses meet the law that the drawn siblings leave, each what the ones before it leave."""
        target_probs = target_laws(logits, sampling)
        draft_probs = draft_laws(tree, target_probs)
        u, real, depths, tokens = coins(tree, sampling), real_nodes(tree), tree.node_depths(), tree.tokens
        index = torch.arange(tokens.shape[1], device=tokens.device)
        twins = (tokens[:, :, None] == tokens[:, None]) & (tree.parents[:, :, None] == tree.parents[:, None])
        repeats = (twins & (index < index[:, None])).any(-1)  # an earlier sibling carries the same token
        halvings = 0 if tree.is_chain or tree.probs is None else HALVINGS  # 0: no node has k > 1

        node, target = torch.zeros_like(tokens[:, 0]), target_probs[:, 0]
        for depth in range(1, tree.depth + 1):
            draft = pick(draft_probs, node)
            children = (tree.parents == node[:, None]) & (depths == depth) & real
            drawn = children & (draft.gather(1, tokens) > 0)
            points = children & ~drawn
            rho = _rho(target, draft, drawn.sum(1), halvings)
            scaled = draft * rho[:, None]
            stands = drawn & (u * scaled.gather(1, tokens) < target.gather(1, tokens))
            rest = residual(target, scaled)

            point = rest.gather(1, tokens) * (points & ~repeats)
            left = (1 - point.cumsum(1) + point).clamp(min=0.0)  # what the points before leave of the law's mass
            stands = torch.where(stands.any(1, keepdim=True), stands, u * left < point)
            rest = residual(rest, torch.zeros_like(rest).scatter_add_(1, tokens, points.to(rest.dtype)))

            child = stands.int().argmax(1)  # the first of them
            found, judged = stands.any(1, keepdim=True), children.any(1, keepdim=True)
            target = torch.where(found, pick(target_probs, child), torch.where(judged, rest, target))
            node = torch.where(found.squeeze(1), child, node)
        return emit(tree, node, target, sampling)


def _rho(target_probs: Tensor, draft_probs: Tensor, k: Tensor, halvings: int) -> Tensor:
    """rho in [1, k] with rho * beta = 1 - (1 - beta)^k, where beta = sum_x min(target / rho, draft); 0 for k = 0. f32 [B].

    There the drawn siblings emit x with probability min(target, rho * draft), so (target - rho * draft)+ is left. The
    left side grows with rho, the right side falls.
    """
    low, high = torch.ones_like(target_probs[:, 0]), k.clamp(min=1).to(target_probs.dtype)
    for _ in range(halvings):
        rho = (low + high) / 2
        beta = torch.minimum(target_probs / rho[:, None], draft_probs).sum(-1).clamp(max=1.0)
        enough = rho * beta >= -torch.expm1(k * torch.log1p(-beta))
        low, high = torch.where(enough, low, rho), torch.where(enough, rho, high)
    return low * (k > 0)
