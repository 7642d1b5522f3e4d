"""Hydra heads (Ankner et al. 2402.05109): Medusa's, but each also sees the tokens guessed before it.

Shapes: B rows, n nodes of one level, H hidden size, W entries of the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from specdec.drafter._medusa import Heads
from specdec.structure import RootState, Structure
from specdec.types import DraftInputs, DraftTree

__all__ = ["Hydra"]


class Hydra(Heads):
    """Level by level, every node's head reads the hidden state and the embeddings along its path.

    checkpoint: a folder, or the name of heads that ship.
    """

    sequential = True

    def __init__(
        self, checkpoint: str | Path, num_draft_tokens: int = 4, structure: Structure | Sequence[int] | None = None
    ) -> None:
        super().__init__(checkpoint, num_draft_tokens, structure)

    def propose(self, inputs: DraftInputs) -> DraftTree:
        logits, seen = self._level(inputs.root[:, None], self.last_hidden(inputs)[:, None])
        return self.draft(lambda level, above: self._level(level.tokens, above), inputs, RootState(logits, seen))

    def _level(self, tokens: Tensor, above: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens [B, n] and what their parents' heads read [B, n, w] -> logits [B, n, W] and what these read [B, n, w + H]."""
        assert above is not None
        seen = torch.cat([above, self.embed[tokens].to(above.dtype)], -1)
        depth = seen.shape[-1] // self.config.hidden_size - 2
        states = self.model.state(depth, seen.flatten(0, 1))
        return self.model.logits(states).view(*tokens.shape, -1), seen
