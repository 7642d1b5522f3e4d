"""What drafters share whose head continues the target's features, with a cache of its own.

Shapes: B rows, n nodes of one level, D depth, F features of a token, H hidden size, W entries of the draft vocabulary.
Entry t of a row joins the features of token t with token t + 1 and predicts token t + 2.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.drafter import Drafter
from specdec.drafter._head import features_of, find_head, read_config
from specdec.kernels.steps import entries
from specdec.nn import KVCache
from specdec.structure import RootState, Structure, as_structure
from specdec.types import DraftInputs, DraftTree, Law, ModelInputs

__all__ = ["FeatureDrafter", "Parsed", "Rename"]

Rename = Callable[[str], str | None]  # a tensor's name in the file to the module's, None to leave it out
Parsed = tuple[Any, Rename, Mapping[str, Any]]  # the head's config, names of its tensors, and what it says of itself


class FeatureDrafter(Drafter):
    """Makes entries, keeps the cache and grows the structure; a subclass parses config.json and loads the head.

    Of the features of what a step committed the head makes entries in its cache, behind the earlier ones; drafts go on from
    the last entry, each from the state of the one before, and their entries are overwritten by the next step's true ones.
    """

    trained = True
    kind: str  # "EAGLE-3", for errors
    config: Any  # of the head; `layer` describes its one layer, `feature_layers` what it reads
    model: Any  # the head, packed: `EagleModel` or one with the same methods

    def __init__(
        self,
        checkpoint: str | Path,
        num_draft_tokens: int = 3,
        structure: Structure | Sequence[int] | None = None,
        prefill_chunk: int = 256,
    ) -> None:
        """prefill_chunk: prompt tokens a pass. ValueError: no head of this kind, or sizes that make no draft."""
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk={prefill_chunk}: the prompt needs chunks of at least one token")
        self.structure = as_structure(structure, num_draft_tokens)
        self.folder = find_head(checkpoint)
        self.config, self.rename, self.card = read_config(self.folder, self.parse, self.kind)
        self.features = self.config.feature_layers
        self.prefill_chunk = prefill_chunk
        self.laws, self.depth = self.structure.laws, self.structure.depth
        self.num_draft_tokens = self.structure.num_draft_tokens
        self._target: Any = None
        self._cache: KVCache | None = None
        self._warned = False

    @classmethod
    @abstractmethod
    def parse(cls, config: Mapping[str, Any]) -> Parsed:
        """What a config.json says; ValueError names the first thing that no head of this kind has."""

    @abstractmethod
    def load(self, target: Any) -> Any:
        """The head's weights for this target, packed; ValueError where it was made for another."""

    def setup(self, target: Any, batch_size: int, max_len: int, law: Law) -> None:
        if self._target is not target:
            self._target, self._cache = None, None
            self.model = self.load(target)
            self._target = target
        self._law = law
        self.structure.to(target.lengths.device)
        self._warn(min(max_len, target.config.max_positions))
        behind = max(self.prefill_chunk, self.depth + 1, self.structure.num_slots)  # what a row writes behind its end
        slots = max_len + behind
        slots += -slots % 256
        cache = self._cache
        if cache is None or cache.values.shape[1] != batch_size or cache.slots < slots:
            table, block = self.model.embedding, self.model.ops.KEY_BLOCK
            self._cache = KVCache(self.config.layer, batch_size, slots, self.model.dtype, table.device, block)
            self.model.set_positions(slots)
        self._rope = self.model.cos, self.model.sin  # a captured graph keeps the tables it was captured with

    def _warn(self, positions: int) -> None:
        """RoPE reaches further than a head was trained for; its guesses may not."""
        if positions > self.config.layer.max_positions and not self._warned:
            self._warned = True
            warnings.warn(
                f"the head in {self.folder} was made for {self.config.layer.max_positions} positions, and {positions} are "
                "asked for: from there on its drafts may be accepted less; shorten prompts or train it on longer text",
                stacklevel=3,
            )

    def prefill(self, inputs: DraftInputs) -> bool:
        self._read(inputs, features_of(inputs, self._target, self.features))
        return True

    def propose(self, inputs: DraftInputs) -> DraftTree:
        last = self._read(inputs, features_of(inputs, self._target, self.features))
        state = RootState(
            self.model.logits(last)[:, None], last[:, None], self.model.token_ids, self.config.layer.vocab_size
        )
        prefix_lens = inputs.lengths - 2  # the last entry stands where the structure expects its root
        return self.structure.draft(self._forward, inputs.root, prefix_lens, inputs.sampling, self._law, state)

    def _read(self, inputs: DraftInputs, features: Tensor) -> Tensor:
        """Make entries of the committed tokens; the state of every row's last one, f32 [B, H].

        Rows start together: what follows a row's own entries is garbage that its drafts overwrite.
        """
        kept: Tensor | None = None
        for first in range(0, inputs.max_new, self.prefill_chunk):
            chunk = features[:, first : first + self.prefill_chunk]
            count = chunk.shape[1]
            following, positions, begin, place = entries(inputs.tokens, inputs.lengths, inputs.num_new, first, count)
            states, _ = self.model(
                ModelInputs(following, positions, begin),
                self.model.fuse(chunk.flatten(0, 1)),
                self._cache,
                logits=False,
            )
            hidden = states.view(len(begin), count, -1)
            found = hidden.gather(1, place[:, None, None].expand(-1, -1, hidden.shape[-1])).squeeze(1)
            kept = found if kept is None else torch.where((inputs.num_new > first)[:, None], found, kept)
        assert kept is not None, "a step commits a token"
        return kept

    def _forward(self, inputs: ModelInputs, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [B, n, W] and states [B, n, H] of one level, from its parents' states [B, n, H]."""
        assert hidden is not None
        states, logits = self.model(inputs, hidden.flatten(0, 1), self._cache)
        return logits.view(*inputs.tokens.shape, -1), states.view(hidden.shape)
