"""The structure interface: which tokens of a draft model become a tree. See `specdec.structure`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.types import DraftTree, Law, ModelInputs, Sampling

__all__ = ["Forward", "RootState", "Structure", "target_ids"]

# (inputs [B, n], states of the level's parents [B, n, H] or None) -> logits [B, n, W] and states of the level, or None
Forward = Callable[[ModelInputs, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(slots=True)
class RootState:
    """What is known behind the root before drafting, of a model that has run it."""

    logits: Tensor  # [B, 1, W]
    hidden: Tensor | None = None  # [B, 1, H]  what its children's forward takes
    token_ids: Tensor | None = None  # int64 [W]  the target's id of each of its ids; None: the same
    vocab_size: int = 0  # V, where there are token_ids


class Structure(ABC):
    """Grows a draft tree with any model that drafts token by token; orthogonal to what that model is."""

    num_draft_tokens: int  # static
    depth: int  # static
    num_slots: int  # slots behind the prefix in which drafting keeps K/V, the root's included
    laws: frozenset[Law] = frozenset({"any"})

    def to(self, device: torch.device) -> None:
        """Move what it has to the device."""

    @abstractmethod
    def draft(
        self,
        forward: Forward,
        root: Tensor,
        prefix_lens: Tensor,
        sampling: Sampling,
        law: Law,
        state: RootState | None = None,
    ) -> DraftTree:
        """A tree behind root int64 [B], which stands in slot prefix_lens int32 [B] of the draft model's cache.

        forward runs one level; without `state` the root too. No host reads.
        """


def target_ids(tokens: Tensor, state: RootState | None) -> Tensor:
    """The draft model's ids as the target's."""
    return tokens if state is None or state.token_ids is None else state.token_ids[tokens]
