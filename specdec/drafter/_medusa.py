"""What drafters with heads on the target's last hidden state share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.drafter import Drafter
from specdec.drafter._head import features_of, find_head, last_features, load_head, operations, read_config
from specdec.nn.medusa import MedusaConfig, MedusaModel
from specdec.structure import Forward, RootState, Structure, as_structure
from specdec.types import DraftInputs, DraftTree, Law

__all__ = ["Heads"]


class Heads(Drafter):
    """Loads the heads and grows the structure; a subclass says what a level reads."""

    features = ("hidden",)
    trained = True
    sequential: bool

    def __init__(
        self, checkpoint: str | Path, num_draft_tokens: int, structure: Structure | Sequence[int] | None
    ) -> None:
        kind = type(self).__name__
        self.structure = as_structure(structure, num_draft_tokens)
        self.folder = find_head(checkpoint)
        self.config, self.card = read_config(self.folder, _parse, kind)
        self.laws, self.depth = self.structure.laws, self.structure.depth
        self.num_draft_tokens = self.structure.num_draft_tokens
        if self.config.sequential != self.sequential:
            raise ValueError(
                f"{self.folder} holds {'Hydra' if self.config.sequential else 'Medusa'} heads, not {kind}'s"
            )
        if self.depth > self.config.num_heads:
            raise ValueError(
                f"{self.folder} holds {self.config.num_heads} heads, which draft as many tokens in a row, and {self.depth} are "
                "asked for: lower drafter.num_draft_tokens, or train more heads (training.head.depth)"
            )
        self._target: Any = None

    def setup(self, target: Any, batch_size: int, max_len: int, law: Law) -> None:
        if self._target is not target:
            self.config.check(target.config)
            self.model = load_head(MedusaModel, self.config, self.folder, target)
            self.model.pack(operations(target, target.config), target.lm_head)
            self.embed: Tensor = target.embed
            self._target = target
        self._law = law
        self.structure.to(target.lengths.device)

    def prefill(self, inputs: DraftInputs) -> bool:
        return True  # heads look at the last token's state alone

    def last_hidden(self, inputs: DraftInputs) -> Tensor:
        """The hidden state before every row's root [B, H]."""
        return last_features(inputs, features_of(inputs, self._target, self.features))

    def draft(self, forward: Forward, inputs: DraftInputs, state: RootState) -> DraftTree:
        """Grow the tree in the target's ids."""
        state = replace(state, token_ids=self.model.token_ids, vocab_size=self.config.vocab_size)
        return self.structure.draft(forward, inputs.root, inputs.lengths - 1, inputs.sampling, self._law, state)


def _parse(config: Mapping[str, Any]) -> tuple[MedusaConfig, Mapping[str, Any]]:
    """config.json, and what it says of itself."""
    return MedusaConfig.from_dict(config), config.get("specdec", {})
