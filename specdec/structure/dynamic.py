"""Trees that grow where the draft model is sure (EAGLE-2, 2406.16858; with a width of the whole budget OPT-Tree, 2406.17276).

Shapes: B rows, N nodes with the root, K nodes of a level that are run, D depth, V vocabulary, C = K + (D - 1) K^2 candidates.
A node's value is the product of the draft probabilities on its path: the chance that all of it is accepted, if the draft
model is calibrated. It looks at draft laws alone, and drafts are its favourites, not drawn: the target's law is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.structure._base import Forward, RootState, Structure, target_ids
from specdec.types import DraftTree, Law, ModelInputs, Sampling

__all__ = ["Dynamic"]


class Dynamic(Structure):
    """The num_draft_tokens best nodes among the top_k children of each level's top_k best nodes, `depth` levels deep."""

    def __init__(self, num_draft_tokens: int = 16, top_k: int = 4, depth: int = 4) -> None:
        candidates = top_k + (depth - 1) * top_k**2
        if top_k < 1 or depth < 1 or not depth <= num_draft_tokens <= candidates:
            raise ValueError(
                f"a dynamic tree of num_draft_tokens={num_draft_tokens}, top_k={top_k}, depth={depth} has no sense: it chooses "
                f"from top_k + (depth - 1) * top_k^2 = {candidates} candidates, and at least {depth}"
            )
        self.num_draft_tokens, self.top_k, self.depth = num_draft_tokens, top_k, depth
        self.num_slots = 1 + (depth - 1) * top_k

    def draft(
        self,
        forward: Forward,
        root: Tensor,
        prefix_lens: Tensor,
        sampling: Sampling,
        law: Law,
        state: RootState | None = None,
    ) -> DraftTree:
        """Node j of level d is run in slot 1 + (d - 1) K + j behind the prefix."""
        width, batch = self.top_k, len(root)
        if state is None:
            logits, hidden = forward(ModelInputs(root[:, None], prefix_lens[:, None], prefix_lens), None)
        else:
            logits, hidden = state.logits, state.hidden
        values, tokens = favourites(logits, width)  # [B, 1, K]: of the root's children all are run
        scores, names, parents = [values[:, 0]], [tokens[:, 0]], [torch.full_like(tokens[:, 0], -1)]
        score, token = values[:, 0], tokens[:, 0]
        mine = torch.arange(width, device=root.device).expand(batch, -1)  # the candidates that are run
        above = torch.zeros_like(mine)  # which of the run nodes of the level above each hangs on
        slots = prefix_lens.new_zeros(batch, 1, 1).expand(-1, width, -1)  # of the nodes above, from the root
        for d in range(1, self.depth):
            slot = torch.arange(1 + (d - 1) * width, 1 + d * width, dtype=slots.dtype, device=root.device)
            slots = torch.cat([slots, slot[None, :, None].expand(batch, -1, -1)], -1)
            positions = (prefix_lens + d)[:, None].repeat(1, width)
            inputs = ModelInputs(
                target_ids(token, state), positions, prefix_lens, slots.contiguous(), 1 + (d - 1) * width
            )
            logits, hidden = forward(inputs, None if hidden is None else take(hidden, above))
            values, tokens = favourites(logits, width)  # [B, K, K]
            first = width + (d - 1) * width**2  # candidates so far
            scores.append((score[:, :, None] + values).flatten(1))
            names.append(tokens.flatten(1))
            parents.append(mine.repeat_interleave(width, 1))
            if d + 1 < self.depth:
                score, best = scores[-1].topk(width, -1)
                token, above, mine = names[-1].gather(1, best), best // width, first + best
                slots = take(slots, above)
        chosen = torch.cat(scores, 1).argsort(dim=1, descending=True, stable=True)[:, : self.num_draft_tokens]
        return self._tree(root, chosen, target_ids(torch.cat(names, 1), state), torch.cat(parents, 1))

    def _tree(self, root: Tensor, chosen: Tensor, tokens: Tensor, parents: Tensor) -> DraftTree:
        """The chosen of all candidates [B, C] in level order. A parent is worth at least its child and stands before it, so a
        stable order has taken it as well."""
        chosen = chosen.sort(1).values
        node = torch.arange(1, chosen.shape[1] + 1, device=root.device).expand_as(chosen)
        at = torch.zeros_like(tokens).scatter_(1, chosen, node)  # candidate -> node
        parent = parents.gather(1, chosen)
        hangs_on = torch.where(parent < 0, 0, at.gather(1, parent.clamp(min=0)))
        whole = torch.cat([hangs_on.new_full((len(root), 1), -1), hangs_on], 1).to(torch.int32)
        num_nodes = torch.full_like(root, whole.shape[1], dtype=torch.int32)
        return DraftTree(torch.cat([root[:, None], tokens.gather(1, chosen)], 1), whole, num_nodes, self.depth)


def favourites(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, and the logarithm of their probability, never above 0. [B, n, W] -> twice [B, n, count]."""
    values, tokens = logits.topk(count, -1)
    return (values - logits.logsumexp(-1, keepdim=True)).clamp(max=0.0), tokens


def take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, n, X] at index [B, m]: [B, m, X]."""
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[-1]))
