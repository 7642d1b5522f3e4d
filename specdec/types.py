"""The shared nouns. Everything that crosses a module border is one of these.

Shapes: B batch rows, T tokens this forward, N tree nodes with the root, D tree depth, F features, V vocabulary, L limit.
Words: the root is the last emitted token, not yet in the target's cache; a chain is a tree in which node i hangs on i - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Law = Literal["any", "iid", "distinct"]


def ascending(first: int, count: int, device: torch.device) -> Tensor:
    """int32 [count] from `first` on. Made once, as on a GPU each is a launch: nobody may write to it."""
    make = _ascending.__wrapped__ if torch._C._len_torch_dispatch_stack() else _ascending  # a fake one must not stay
    return make(first, count, device)


def repeated(value: int, count: int, device: torch.device) -> Tensor:
    """int32 [count] of one value; made once, too."""
    make = _repeated.__wrapped__ if torch._C._len_torch_dispatch_stack() else _repeated
    return make(value, count, device)


@cache  # of any size: graphs keep addresses
def _ascending(first: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.int32, device=device)


@cache
def _repeated(value: int, count: int, device: torch.device) -> Tensor:
    return torch.full((count,), value, dtype=torch.int32, device=device)


@dataclass(slots=True)
class ModelInputs:
    """One forward of a model over its cache. Prefill, drafting and verification differ only in the values."""

    tokens: Tensor  # int64 [B, T]
    positions: Tensor  # int32 [B, T]  prefix + depth
    prefix_lens: Tensor  # int32 [B]  committed tokens, visible to every query
    paths: Tensor | None = (
        None  # int32 [B, T, D+1]  slots behind the prefix a query sees, in order, itself last, -1 padded
    )
    offset: int = 0  # K/V of token t goes to slot prefix + offset + t; with paths=None queries are causal
    begin: int | None = None  # the prefix, where the host knows it and all rows have the same


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The token ids whose logits this rank has, where several share a head: each an equal part, in the order of ranks."""

    first: int  # id of the first of them
    gather: Callable[[Tensor], Tensor]  # [...] of every rank -> [ranks, ...], the same on each

    def whole(self, logits: Tensor) -> Tensor:
        """The logits of all ranks side by side. [..., V / ranks] -> [..., V]."""
        return self.gather(logits).movedim(0, -2).flatten(-2)


@dataclass(slots=True)
class ModelOutput:
    """What a forward gives back."""

    logits: Tensor  # f32 [B, T, V]
    features: Tensor | None = None  # [B, T, F]  the tapped layers, concatenated in the order they were asked for
    vocabulary: Vocabulary | None = None  # set: the logits are this part, f32 [B, T, V / ranks]

    def whole(self) -> ModelOutput:
        """The same with the logits of all tokens; every rank must ask."""
        if self.vocabulary is None:
            return self
        return ModelOutput(self.vocabulary.whole(self.logits), self.features)


@dataclass(slots=True)
class DraftTree:
    """Proposed tokens as a tree of static size: node 0 is the root, the rest hangs on earlier nodes.

    Nodes from `num_nodes` on are padding: their tokens are valid ids, their parents are smaller than themselves.
    """

    tokens: Tensor  # int64 [B, N]
    parents: Tensor  # int32 [B, N]  parents[:, 0] = -1, parents[:, i] < i; siblings stand in draw order
    num_nodes: Tensor  # int32 [B]  1 = nothing proposed
    depth: int  # static; N - 1 = a chain
    probs: Tensor | None = None  # f32 [B, N, V]  law the children of a node were drawn from; None = deterministic
    _paths: Tensor | None = field(default=None, init=False, repr=False)

    @classmethod
    def chain(
        cls, root: Tensor, drafts: Tensor, num_drafts: Tensor | None = None, probs: Tensor | None = None
    ) -> DraftTree:
        """Tree of one path. root [B], drafts [B, K], num_drafts [B] (all K when left out), probs f32 [B, K or K+1, V]."""
        batch, k = drafts.shape
        device = drafts.device
        parents = ascending(-1, k + 1, device).expand(batch, k + 1)
        if num_drafts is None:
            num_nodes = repeated(k + 1, batch, device)
        else:
            num_nodes = (num_drafts + 1).to(torch.int32)
        if probs is not None and probs.shape[1] == k:  # nobody hangs on the last node: its row is never read
            probs = torch.cat([probs, probs[:, -1:]], dim=1)
        return cls(torch.cat([root[:, None], drafts], dim=1), parents, num_nodes, k, probs)

    @property
    def is_chain(self) -> bool:
        return self.depth == self.tokens.shape[1] - 1

    def node_depths(self) -> Tensor:
        """Depth of every node, root = 0. int32 [B, N]."""
        if self.is_chain:
            return (self.parents + 1).to(torch.int32)
        return (self.paths() >= 0).sum(-1, dtype=torch.int32) - 1

    def paths(self) -> Tensor:
        """Nodes from the root to each node, itself last, -1 padded at the end. int32 [B, N, D+1]; made once."""
        if self._paths is not None:
            return self._paths
        nodes = torch.arange(self.tokens.shape[1], dtype=torch.int32, device=self.tokens.device)
        levels = [nodes.expand_as(self.parents)]
        for _ in range(self.depth):
            parent = self.parents.gather(1, levels[-1].clamp(min=0).long())
            levels.append(torch.where(levels[-1] < 0, levels[-1], parent))
        upward = torch.stack(levels, -1)  # itself, parent, ..., root, -1, ...
        num = (upward >= 0).sum(-1, keepdim=True)
        order = num - 1 - torch.arange(self.depth + 1, device=upward.device)  # reversed, padding kept behind
        self._paths = torch.where(order >= 0, upward.gather(-1, order.clamp(min=0)), -1).to(torch.int32)
        return self._paths

    def trim(self, width: int) -> DraftTree:
        """At least the first `width` nodes; the rest is padding in every row. A branching tree stays one."""
        if not self.is_chain and width > 1:
            width = max(width, self.depth + 2)
        if width >= self.tokens.shape[1]:
            return self
        depth = width - 1 if self.is_chain or width == 1 else self.depth
        probs = None if self.probs is None else self.probs[:, :width]
        return DraftTree(self.tokens[:, :width], self.parents[:, :width], self.num_nodes, depth, probs)


@dataclass(slots=True)
class Sampling:
    """How tokens are chosen, one value a row. All noise is a hash of (seed, position, stream, index): no state."""

    temperature: Tensor  # f32 [B]  0 = greedy
    top_k: Tensor  # int32 [B]  0 = off
    top_p: Tensor  # f32 [B]  1 = off
    seed: Tensor  # int64 [B]
    position: Tensor  # int32 [B]  absolute position of the token that follows the root
    mode: Literal["greedy", "sampled", "warped"] = "greedy"  # static: all rows greedy | no top-k/top-p | anything
    vocabulary: Vocabulary | None = None  # of the logits to choose from, where they are one rank's part


@dataclass(slots=True)
class Acceptance:
    """A verifier's verdict on one tree."""

    path: Tensor  # int32 [B, D+1]  node indices, root first, the last accepted one repeated
    num_accepted: Tensor  # int32 [B]  0..D accepted drafts; -1 = row not running
    next_token: Tensor  # int64 [B]  recovered or bonus token = the next root


@dataclass(slots=True)
class DraftInputs:
    """What a drafter sees before it proposes."""

    tokens: Tensor  # int64 [B, L]  committed tokens, then the root; behind it garbage
    lengths: Tensor  # int32 [B]  their number, root included
    num_new: Tensor  # int32 [B]  committed by the last step (they precede the root); lengths - 1 = a request begins
    max_new: int  # static bound of num_new
    features: Tensor | None  # [B, max_new, F]  target features of those tokens
    sampling: Sampling

    @property
    def root(self) -> Tensor:
        """The last token of every row. int64 [B]."""
        return self.tokens.gather(1, (self.lengths - 1).long()[:, None]).squeeze(1)
