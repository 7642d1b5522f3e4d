"""What the trainer asks of a draft head, whatever its kind.

Shapes: B rows, T positions, H hidden size, V target vocabulary, W draft vocabulary, J predictions of a position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TrainableHead"]


class TrainableHead(nn.Module, ABC):
    """A head in plain torch, f32, with autograd, whose state_dict has the names of its checkpoint.

    Standing at position t it has seen the target's features of the tokens up to t and the token t + 1, and predicts the
    tokens t + 2 to t + 1 + J. Prediction j is judged by the target's law at position t + 1 + j.
    """

    depth: int  # J
    taps: Sequence[int | str]  # target layers whose features it reads; "hidden", the final norm's output, stands last
    d2t: Tensor | None  # int64 [W]  target id minus draft id; None: the target's vocabulary
    t2d: Tensor | None  # bool [V]
    ids: Tensor | None  # int64 [W]  target ids of the draft vocabulary
    index: Tensor | None  # int64 [V]  the way back, -1 outside

    def set_vocabulary(self, d2t: Tensor | None, t2d: Tensor | None) -> None:
        """Keep the two tables in the checkpoint, where there are any, and derive the way back beside it."""
        self.register_buffer("d2t", d2t)
        self.register_buffer("t2d", t2d)
        ids = index = None
        if d2t is not None and t2d is not None:
            ids = d2t + torch.arange(len(d2t), device=d2t.device)
            index = torch.full((len(t2d),), -1, device=d2t.device)
            index[ids] = torch.arange(len(d2t), device=d2t.device)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("index", index, persistent=False)

    @abstractmethod
    def forward(self, tokens: Tensor, features: Tensor, embed: Tensor) -> list[Tensor]:
        """J states [B, T, H] from tokens int64 [B, T], features [B, T, taps * H] and the target's table [V, H].

        Where a state would need tokens behind the row's end its content does not matter.
        """

    @abstractmethod
    def logits(self, depth: int, states: Tensor) -> Tensor:
        """States [n, H] of prediction `depth`, from 0, to logits [n, W]."""

    def augment(self, features: Tensor, keys: Tensor) -> Tensor:
        """What `forward` reads in training instead of features [B, T, taps * H]: with noise, say, drawn by keys int64 [B].

        A key belongs to (seed, epoch, row), so that micro-batches, processes and a resumed run see the same noise.
        """
        return features

    def objective(self, loss: Tensor, states: Tensor, hidden: Tensor) -> Tensor:
        """What is minimised, from the summed loss of n predictions: a head may weigh that, and add terms of its own.

        hidden [n, H]: what the target's final norm gives where it makes the prediction of states [n, H].
        """
        return loss

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The config.json of its checkpoint."""
