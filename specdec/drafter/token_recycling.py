"""Token Recycling (Luo et al. 2408.08696): the target's runners-up of earlier steps become the next drafts.

Shapes: B rows, N tree nodes with the root, V vocabulary, k successors kept for a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.drafter import Drafter
from specdec.structure import TreeShape, likely_paths
from specdec.types import Acceptance, DraftInputs, DraftTree, Law, ModelOutput

__all__ = ["TokenRecycling", "rank_prob", "top_indices"]

BLOCK = 64  # divides the vocabularies in use, so that no logits are copied


def rank_prob(rank: int) -> float:
    """Assumed chance that the successor of this rank is right: 0.4, 0.14, 0.08, ...; only the ratios shape the tree."""
    return float(0.4 * (rank + 1) ** -1.5)


def _usual(num_draft_tokens: int, top_k: int, max_depth: int) -> list[tuple[int, ...]]:
    rates = [rank_prob(rank) for rank in range(top_k)]
    return likely_paths(num_draft_tokens, lambda depth: rates, max_depth)


def top_indices(logits: Tensor, k: int) -> Tensor:
    """Indices of the k largest logits, descending. [..., V] -> int64 [..., k].

    The k best lie in the k blocks with the best maxima; on a CPU that is several times faster than topk over all of V.
    """
    vocab = logits.shape[-1]
    if vocab < 2 * k * BLOCK or vocab % BLOCK:
        return logits.topk(k, dim=-1).indices
    blocks = logits.view(*logits.shape[:-1], -1, BLOCK)
    best = blocks.amax(-1).topk(k, dim=-1).indices
    inside = blocks.gather(-2, best[..., None].expand(*best.shape, BLOCK)).flatten(-2).topk(k, dim=-1).indices
    return best.gather(-1, inside // BLOCK) * BLOCK + inside % BLOCK


class TokenRecycling(Drafter):
    """Fills a static tree from a matrix of the last seen top-k successors of every token.

    The matrix is shared by all rows and outlives requests, as in the paper: what a request drafts, not what it emits,
    depends on those before it. `persistent` keeps it from one generate call to the next too; otherwise each call starts
    cold and repeats exactly. A token never verified has no successors: as the root it proposes nothing.
    """

    successors: Tensor  # int64 [V + 1, k]; -1 = not seen; the last row takes the writes of nodes that do not count
    _last: Tensor  # int64 [V + 1]; scratch: the last node of a step that carries a token

    def __init__(
        self,
        num_draft_tokens: int = 5,
        top_k: int = 8,
        max_depth: int = 6,
        tree: Sequence[Sequence[int]] | None = None,
        persistent: bool = False,
    ) -> None:
        if tree is None and min(num_draft_tokens, top_k, max_depth) < 1:
            raise ValueError(
                f"{num_draft_tokens=}, {top_k=}, {max_depth=} must be positive; drafter=none drafts nothing"
            )
        self._shape = TreeShape(_usual(num_draft_tokens, top_k, max_depth) if tree is None else tree)
        widest = max(self._shape.num_choices, default=0)
        if widest > top_k:
            raise ValueError(f"the tree takes {widest} successors of a token, top_k={top_k} keeps fewer; raise top_k")
        self.top_k = top_k
        self.persistent = persistent
        self.num_draft_tokens = self._shape.num_nodes - 1
        self.depth = self._shape.depth

    def setup(self, target: Any, batch_size: int, max_len: int, law: Law) -> None:
        device, vocab = target.lengths.device, target.config.vocab_size
        if vocab < self.top_k:
            raise ValueError(f"top_k={self.top_k} exceeds the vocabulary of {vocab} tokens; lower top_k")
        self._shape.to(device)
        if self.persistent and hasattr(self, "successors") and self.successors.shape[0] == vocab + 1:
            return
        self.successors = torch.full((vocab + 1, self.top_k), -1, dtype=torch.int64, device=device)
        self._last = torch.full((vocab + 1,), -1, dtype=torch.int64, device=device)

    def prefill(self, inputs: DraftInputs) -> bool:
        return True

    def propose(self, inputs: DraftInputs) -> DraftTree:
        tokens = [inputs.root[:, None]]
        for d in range(self.depth):
            choices = self.successors[tokens[d]].clamp(min=0)
            tokens.append(self._shape.take(choices, d))
        known = self.successors[tokens[0][:, 0], 0] >= 0
        num_nodes = (1 + known * self.num_draft_tokens).int()
        return self._shape.tree(torch.cat(tokens, 1), num_nodes)

    def observe(self, tree: DraftTree, output: ModelOutput, acceptance: Acceptance) -> None:
        """Keep the top-k successors of every verified node; of equal tokens the last node's, so the result is fixed."""
        top = top_indices(output.logits, self.top_k).flatten(0, 1)
        nodes = torch.arange(tree.tokens.shape[1], device=top.device)
        counts = (nodes < tree.num_nodes[:, None]) & (acceptance.num_accepted >= 0)[:, None]
        tokens = torch.where(counts, tree.tokens, self.successors.shape[0] - 1).flatten()
        self._last.index_fill_(0, tokens, -1)
        self._last.scatter_reduce_(0, tokens, torch.arange(tokens.shape[0], device=top.device), "amax")
        self.successors[tokens] = top[self._last[tokens]]
