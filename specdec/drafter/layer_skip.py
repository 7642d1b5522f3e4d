"""Self-speculation by early exit (LayerSkip 2404.16710; Draft & Verify 2309.08168): the target's first layers draft.

Shapes: B rows, n nodes of one level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from specdec.drafter import Drafter
from specdec.structure import Structure, as_structure
from specdec.types import DraftInputs, DraftTree, Law, ModelInputs

__all__ = ["LayerSkip"]


class LayerSkip(Drafter):
    """Drafts with the target's first exit_layer layers, its final norm and its head, in the target's own cache.

    No weights and no cache of its own: K/V of drafts stand behind the prefix, where the verification overwrites them.
    """

    def __init__(
        self, exit_layer: int, num_draft_tokens: int = 4, structure: Structure | Sequence[int] | None = None
    ) -> None:
        self.structure = as_structure(structure, num_draft_tokens)
        self.exit_layer = exit_layer
        self.laws, self.depth = self.structure.laws, self.structure.depth
        self.num_draft_tokens = self.structure.num_draft_tokens
        if self.structure.num_slots > self.num_draft_tokens + 1:
            raise ValueError(
                f"the structure runs {self.structure.num_slots} nodes for {self.num_draft_tokens} drafts, and the target's "
                "cache has room for the drafts alone: give it more num_draft_tokens, or less width"
            )

    def setup(self, target: Any, batch_size: int, max_len: int, law: Law) -> None:
        num_layers = target.config.num_layers
        if not 0 < self.exit_layer < num_layers:
            raise ValueError(f"exit_layer={self.exit_layer}: choose 1 to {num_layers - 1}, the target has {num_layers}")
        self._target, self._law = target, law
        self.structure.to(target.lengths.device)

    def prefill(self, inputs: DraftInputs) -> bool:
        return True

    def propose(self, inputs: DraftInputs) -> DraftTree:
        prefix_lens = inputs.lengths - 1
        return self.structure.draft(self._forward, inputs.root, prefix_lens, inputs.sampling, self._law)

    def _forward(self, inputs: ModelInputs, hidden: Tensor | None) -> tuple[Tensor, None]:
        return self._target.forward(inputs, layers=self.exit_layer).logits, None
