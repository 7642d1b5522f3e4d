"""Static tree shapes as index tensors.

Shapes: B rows, N nodes with the root, n nodes of one level, c choices at a node, D depth.
A shape is a list of child-index paths (Medusa, 2401.10774): (0, 2) is the third choice after the root's first choice.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from specdec.types import DraftTree, ModelInputs, repeated

__all__ = ["TreeShape", "likely_paths", "regular_paths"]

Path = tuple[int, ...]


def regular_paths(num_children: Sequence[int]) -> list[Path]:
    """Every node of depth d has num_children[d] children: (1, 1, 1) is a chain, (3, 2) SpecInfer's <3, 2>."""
    return [path for d in range(len(num_children)) for path in product(*map(range, num_children[: d + 1]))]


def likely_paths(num_draft_tokens: int, rates: Callable[[int], Sequence[float]], max_depth: int) -> list[Path]:
    """The paths most likely to be accepted when the r-th choice at a node of depth d is right with rates(d)[r].

    Rates must fall with r; then best-first search is optimal (Sequoia, 2402.12374).
    """
    paths: list[Path] = []
    queue: list[tuple[float, Path]] = [(-rates(0)[0], (0,))]
    while queue and len(paths) < num_draft_tokens:
        cost, path = heapq.heappop(queue)
        paths.append(path)
        rank, own = path[-1], rates(len(path) - 1)
        if len(path) < max_depth:
            heapq.heappush(queue, (cost * rates(len(path))[0], (*path, 0)))
        if rank + 1 < len(own):
            heapq.heappush(queue, (cost / own[rank] * own[rank + 1], (*path[:-1], rank + 1)))
    return paths


class TreeShape:
    """Nodes in level order, the root first; per level, where the parents stand and which of their choices are taken.

    Every node's children must be its first choices without a gap: a law without replacement is judged in draw order.
    """

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        nodes: list[Path] = [(), *sorted({tuple(path) for path in paths} - {()}, key=lambda path: (len(path), path))]
        index = {path: i for i, path in enumerate(nodes)}
        for path in nodes[1:]:
            needed = path[:-1] if path[-1] == 0 else (*path[:-1], path[-1] - 1)
            if needed not in index:
                raise ValueError(f"tree path {list(path)} needs {list(needed)} in the tree as well; add it")
        self.num_nodes = len(nodes)
        self.depth = len(nodes[-1])
        self.is_chain = self.depth == self.num_nodes - 1
        self.parents = torch.tensor([-1, *(index[path[:-1]] for path in nodes[1:])], dtype=torch.int32)
        self.starts = [next(i for i, path in enumerate(nodes) if len(path) == d) for d in range(self.depth + 1)]
        self.num_choices = [max(p[-1] for p in nodes if len(p) == d) + 1 for d in range(1, self.depth + 1)]
        self.parent_at: list[Tensor] = []  # per level from 1: the parent's place within the level above, int64 [n]
        self.ranks: list[Tensor] = []  # per level from 1: which of its parent's choices a node is, int64 [n]
        self.slots: list[Tensor] = []  # per level from 0: nodes from the root to the node itself, int32 [n, d+1]
        for d in range(self.depth + 1):
            level = [path for path in nodes if len(path) == d]
            self.slots.append(torch.tensor([[index[p[:j]] for j in range(d + 1)] for p in level], dtype=torch.int32))
            if d:
                parent_at = torch.tensor([index[path[:-1]] - self.starts[d - 1] for path in level])
                self.parent_at.append(parent_at)
                self.ranks.append(torch.tensor([path[-1] for path in level]))

    def to(self, device: torch.device) -> TreeShape:
        """Move the index tensors, in place."""
        self.parents = self.parents.to(device)
        for name in ("parent_at", "ranks", "slots"):
            setattr(self, name, [tensor.to(device) for tensor in getattr(self, name)])
        return self

    def take(self, choices: Tensor, d: int) -> Tensor:
        """The tokens of level d + 1 from the choices of all nodes of level d. [B, n, c] -> [B, n']."""
        return choices[..., 0] if self.is_chain else choices[:, self.parent_at[d], self.ranks[d]]

    def level_inputs(self, tokens: Tensor, prefix_lens: Tensor, d: int) -> ModelInputs:
        """A forward of level d, tokens [B, n], over the levels above it. A chain is plain causal attention."""
        positions = prefix_lens[:, None] + d if self.is_chain else (prefix_lens[:, None] + d).repeat(1, tokens.shape[1])
        paths = None if self.is_chain else self.slots[d].repeat(tokens.shape[0], 1, 1)  # kernels read dense memory
        return ModelInputs(tokens, positions, prefix_lens, paths, self.starts[d])

    def tree(self, tokens: Tensor, num_nodes: Tensor | None = None, probs: Tensor | None = None) -> DraftTree:
        """Dress the shape with tokens [B, N]; num_nodes int32 [B], all nodes when left out."""
        batch = tokens.shape[0]
        if num_nodes is None:
            num_nodes = repeated(self.num_nodes, batch, tokens.device)
        return DraftTree(tokens, self.parents.expand(batch, -1), num_nodes, self.depth, probs)
