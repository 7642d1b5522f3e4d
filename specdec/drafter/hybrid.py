"""Two drafters in one: lookup where the text repeats itself, a model elsewhere (as in SuffixDecoding, 2411.04975, section 4).

Shapes: B rows, N nodes with the root.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from specdec.drafter import Drafter
from specdec.kernels.steps import common_device
from specdec.types import Acceptance, DraftInputs, DraftTree, Law, ModelOutput, ascending

__all__ = ["Hybrid"]


class Hybrid(Drafter):
    """A row takes the drafts of `first` where there are at least min_drafts of them, else those of `second`.

    Lookup proposes more the more it trusts a match, so min_drafts says when it is trusted more than a model. Drafts are
    deterministic. On a GPU both propose in every step; on the CPU the second only follows the text while the first serves all
    rows, which costs a head that reads the target's features next to nothing.
    """

    def __init__(self, first: Drafter, second: Drafter, min_drafts: int = 5) -> None:
        """ValueError: min_drafts that `first` never proposes, or two drafters that both tap the target's layers."""
        if not 1 <= min_drafts <= first.num_draft_tokens:
            raise ValueError(
                f"min_drafts={min_drafts} must be 1 to {first.num_draft_tokens}, the most that {type(first).__name__} proposes"
            )
        self.first, self.second, self.min_drafts = first, second, min_drafts
        self.parts = (first, second)
        self.depth = max(part.depth for part in self.parts)
        self.num_draft_tokens = max(part.num_draft_tokens for part in self.parts)
        self._chains = all(part.depth == part.num_draft_tokens for part in self.parts)
        if not self._chains and self.num_draft_tokens == self.depth:
            self.num_draft_tokens += 1  # as many nodes as levels would say that it is a chain
        self.graphable = first.graphable and second.graphable
        self._share_features()

    def _share_features(self) -> None:
        if self.first.features and self.second.features:
            names = " and ".join(type(part).__name__ for part in self.parts)
            raise ValueError(f"{names} both read the target's features: only one of the two drafters can")
        self.features = self.first.features or self.second.features

    def setup(self, target: Any, batch_size: int, max_len: int, law: Law) -> None:
        for part in self.parts:  # max_len counts room for this drafter's tree; a part expects its own there
            own = max_len - self.num_draft_tokens + part.num_draft_tokens
            part.setup(target, batch_size, own, "any")
        self._share_features()  # a head may know its layers only now

    def prefill(self, inputs: DraftInputs) -> bool:
        return self.first.prefill(inputs) and self.second.prefill(inputs)

    def propose(self, inputs: DraftInputs) -> DraftTree:
        first = self.first.propose(inputs)
        enough = first.num_nodes > self.min_drafts
        served = enough | (inputs.num_new == 0)  # rows that do not run need nothing
        if common_device(served) == "cpu" and bool(served.all()):
            self.second.prefill(inputs)
            return self._fit(first)
        second = self._fit(self.second.propose(inputs))
        first = self._fit(first)
        tokens = torch.where(enough[:, None], first.tokens, second.tokens)
        parents = torch.where(enough[:, None], first.parents, second.parents)
        return DraftTree(tokens, parents, torch.where(enough, first.num_nodes, second.num_nodes), self.depth)

    def _fit(self, tree: DraftTree) -> DraftTree:
        """The same tree among as many nodes as either has; what is added is padding."""
        nodes = self.num_draft_tokens + 1
        more = nodes - tree.tokens.shape[1]
        tokens = torch.cat([tree.tokens, tree.tokens[:, :1].expand(-1, more)], 1)
        if self._chains:
            parents = ascending(-1, nodes, tokens.device).expand(len(tokens), nodes)
        else:
            parents = F.pad(tree.parents, (0, more))
        return DraftTree(tokens, parents, tree.num_nodes, self.depth)

    def observe(self, tree: DraftTree, output: ModelOutput, acceptance: Acceptance) -> None:
        for part in self.parts:
            part.observe(tree, output, acceptance)
