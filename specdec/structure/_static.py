"""Drafting over a fixed shape, level by level.

Shapes: B rows, N nodes with the root, n nodes of one level, c children drawn at a node, D depth, V vocabulary, W that of the
model that drafts (mostly the same), H its hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.sampling import STREAM_DRAFT, argmax, gumbel, warp
from specdec.structure._base import Forward, RootState, Structure, target_ids
from specdec.structure._shape import TreeShape
from specdec.types import DraftTree, Law, Sampling

__all__ = ["Level", "Static", "spread"]


class Level(NamedTuple):
    """Drafts of one depth, and what they were chosen from."""

    logits: Tensor  # [B, n, W]  of their parents, as the model gave them
    tokens: Tensor  # int64 [B, n']  in the target's ids
    probs: Tensor | None  # f32 [B, n, W]  the parents' laws; None where drafts are deterministic


class Static(Structure):
    """A tree of the same shape in every step."""

    laws: frozenset[Law] = frozenset({"any", "iid", "distinct"})

    def __init__(self, shape: TreeShape) -> None:
        self.shape = shape
        self.num_draft_tokens, self.depth, self.num_slots = shape.num_nodes - 1, shape.depth, shape.num_nodes

    def to(self, device: torch.device) -> None:
        self.shape.to(device)

    def draft(
        self,
        forward: Forward,
        root: Tensor,
        prefix_lens: Tensor,
        sampling: Sampling,
        law: Law,
        state: RootState | None = None,
    ) -> DraftTree:
        shape, tokens, probs = self.shape, [root[:, None]], []
        for level in self.levels(forward, root, prefix_lens, sampling, law, state):
            tokens.append(level.tokens)
            if level.probs is not None:
                probs.append(level.probs)
        if not probs:
            return shape.tree(torch.cat(tokens, 1))
        leaves = shape.num_nodes - sum(level.shape[1] for level in probs)
        probs.append(
            probs[-1][:, -1:].expand(-1, leaves, -1)
        )  # nothing hangs on the last level: its rows are never read
        return shape.tree(torch.cat(tokens, 1), probs=spread(torch.cat(probs, 1), state))

    def levels(
        self,
        forward: Forward,
        root: Tensor,
        prefix_lens: Tensor,
        sampling: Sampling,
        law: Law,
        state: RootState | None,
    ) -> Iterator[Level]:
        """The arguments of `draft`; each level is drafted when it is asked for. Node i keeps its K/V in slot prefix + i.

        Greedy batches need no draws: drafts are deterministic under any law.
        """
        if sampling.mode == "greedy":
            law = "any"
        shape, tokens = self.shape, root[:, None]
        logits, hidden = (None, None) if state is None else (state.logits, state.hidden)
        for d in range(self.depth):
            if d > 0 or logits is None:
                if hidden is not None and not shape.is_chain:
                    hidden = hidden[:, shape.parent_at[d - 1]]
                logits, hidden = forward(shape.level_inputs(tokens, prefix_lens, d), hidden)
            warped = logits if law == "any" else warp(logits, sampling)
            tokens = target_ids(_children(warped, shape, d, sampling, law), state)
            yield Level(logits, tokens, None if law == "any" else warped.softmax(-1))


def spread(probs: Tensor, state: RootState | None) -> Tensor:
    """Laws over the model's ids as laws over the target's. [B, N, W] -> [B, N, V]."""
    if state is None or state.token_ids is None:
        return probs
    return probs.new_zeros(*probs.shape[:2], state.vocab_size).index_copy_(2, state.token_ids, probs)


def _children(logits: Tensor, shape: TreeShape, d: int, sampling: Sampling, law: Law) -> Tensor:
    """Tokens of level d + 1 given their parents' logits, warped unless law is "any". [B, n, V] -> int64 [B, n'].

    Noise is hashed from position and node, so that draws at different nodes are independent: "iid" from the child's
    own index, "distinct" from its parent's (Gumbel top-k = sampling without replacement in draw order; 1903.06059).
    """
    if law == "iid":
        logits = logits[:, shape.parent_at[d]]
        return argmax(logits + _noise(logits, sampling, d, shape.starts[d + 1]))
    if law == "distinct":
        logits = logits + _noise(logits, sampling, d, shape.starts[d])
    count = shape.num_choices[d]
    choices = argmax(logits)[..., None] if count == 1 else logits.topk(count, dim=-1).indices
    return shape.take(choices, d)


def _noise(logits: Tensor, sampling: Sampling, d: int, first_node: int) -> Tensor:
    """Gumbel noise for draws at depth d + 1, a row for each node from first_node on. f32, shaped like logits."""
    node = torch.arange(first_node, first_node + logits.shape[1], device=logits.device)
    position = sampling.position[:, None].long() + d + (node << 20)
    return gumbel(sampling.seed[:, None], position, STREAM_DRAFT, logits.shape[-1])
