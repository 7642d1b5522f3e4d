"""Traversal verification (2505.12398): judges a tree from its leaves up; on a chain it is block verification.

Shapes: B rows, N nodes with the root, V vocabulary. reach [B, N] is the acceptance rate of the path to a node.
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
    normalise,
    pick,
    real_nodes,
    target_laws,
    without,
)


class Traversal(Verifier):
    """Depth first, deepest first: a node is judged after all its children fell, and the first to stand ends the search.

    replacement: siblings are independent draws; else without replacement, as in the paper. Exact either way, since
    only the law of a child given its earlier siblings enters.
    """

    def __init__(self, replacement: bool = False) -> None:
        self.replacement = replacement
        self.law: Law = "iid" if replacement else "distinct"

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        """Give a node its reach on the way down, judge it on the way up; a fallen child rewrites its parent's laws."""
        target_probs = target_laws(logits, sampling)
        draft_probs = draft_laws(tree, target_probs).clone()  # both become state: laws given the children that fell
        u, real = coins(tree, sampling), real_nodes(tree)
        reach = torch.ones_like(u)
        accepted = torch.zeros_like(tree.tokens[:, 0])  # the root stands when nothing else does
        rows = torch.arange(accepted.shape[0], device=accepted.device)
        parents = torch.where(real, tree.parents, 0).clamp(min=0).long()
        tour, opens = _tour(parents)
        for t in range(1, tour.shape[1] - 1):
            node, opening = tour[:, t], opens[:, t]
            parent, token = pick(parents, node), pick(tree.tokens, node)
            target, draft, rate = pick(target_probs, parent), pick(draft_probs, parent), pick(reach, parent)
            law = law_of_child(draft, token)
            judged = pick(real, node) & ~opening & (accepted == 0)
            stands = judged & (pick(u, node) < pick(reach, node))
            falls = judged & ~stands
            accepted = torch.where(stands, node, accepted)

            opened = (rate * mass(target, token) / mass(law, token)).clamp(max=1.0)
            reach[rows, node] = torch.where(opening, opened, pick(reach, node))

            surplus = (rate[:, None] * target - law).relu()
            total = surplus.sum(-1)
            left = (total / (total + (1 - rate))).nan_to_num(1.0)  # 0 / 0: the child took all and cannot have fallen
            reach[rows, parent] = torch.where(falls, left, pick(reach, parent))
            target_probs[rows, parent] = torch.where(falls[:, None], normalise(surplus, target), target)
            if not self.replacement:
                draft_probs[rows, parent] = torch.where(falls[:, None], without(draft, token), draft)
        return emit(tree, accepted, pick(target_probs, accepted), sampling)


def _tour(parents: Tensor) -> tuple[Tensor, Tensor]:
    """The walk around the tree as brackets: the node each of 2N moves opens or closes, int64, and whether it opens.

    A node opens one move after its parent, plus both brackets of everything below its earlier siblings.
    parents int64 [B, N]; the root's is itself.
    """
    batch, num = parents.shape
    index = torch.arange(num, device=parents.device)
    below = (index[:, None] == index).expand(batch, num, num).clone()  # [b, i, j]: i is j or hangs below j
    for i in range(1, num):
        below[:, i] |= pick(below, parents[:, i])
    size = below.sum(1)
    earlier = (parents[:, :, None] == parents[:, None]) & (index[:, None] > index) & (index > 0)
    step = (1 + 2 * (earlier * size[:, None]).sum(-1)) * (index > 0)
    start = (below * step[:, None]).sum(-1)
    moves = torch.cat([start, start + 2 * size - 1], 1)
    nodes = torch.cat([index, index]).expand(batch, 2 * num)
    opens = torch.cat([index >= 0, index < 0]).expand(batch, 2 * num)
    return torch.empty_like(moves).scatter_(1, moves, nodes), torch.empty_like(opens).scatter_(1, moves, opens)
