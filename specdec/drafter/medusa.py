"""Medusa (Cai et al. 2401.10774): heads on the target's last hidden state guess several tokens ahead at once.

Shapes: B rows, n nodes of one level, D heads, H hidden size, W entries of the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from specdec.drafter._medusa import Heads
from specdec.structure import RootState, Structure
from specdec.types import DraftInputs, DraftTree, ModelInputs

__all__ = ["Medusa"]


class Medusa(Heads):
    """Every head guesses its own token whatever the others guess, so a tree costs no more than a chain.

    checkpoint: a folder, or the name of heads that ship.
    """

    sequential = False

    def __init__(
        self, checkpoint: str | Path, num_draft_tokens: int = 4, structure: Structure | Sequence[int] | None = None
    ) -> None:
        super().__init__(checkpoint, num_draft_tokens, structure)

    def propose(self, inputs: DraftInputs) -> DraftTree:
        hidden = self.last_hidden(inputs)
        states = torch.stack([self.model.state(d, hidden) for d in range(self.depth)], 1)  # [B, D, H]
        logits = self.model.logits(states.flatten(0, 1)).view(*states.shape[:2], -1)

        def forward(level: ModelInputs, _: Tensor | None) -> tuple[Tensor, None]:
            depth = level.offset if level.paths is None else level.paths.shape[-1] - 1
            return logits[:, depth, None].expand(-1, level.tokens.shape[1], -1), None

        return self.draft(forward, inputs, RootState(logits[:, :1]))
