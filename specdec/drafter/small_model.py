"""Speculative decoding with a second, smaller model (2211.17192, 2302.01318) that keeps its own cache.

Shapes: B rows, n nodes of one level, D depth, W token ids of the draft model, S of them that the target has, too (all of them,
where the vocabulary is the same).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.drafter import Drafter
from specdec.drafter._head import find_head
from specdec.drafter._vocabulary import SharedVocabulary, shared_vocabulary
from specdec.structure import RootState, Structure, as_structure
from specdec.types import DraftInputs, DraftTree, Law, ModelInputs
from specdec.weights.checkpoint import read_config

__all__ = ["SmallModel"]


class SmallModel(Drafter):
    """Drafts a chain or tree with any model that has the target's allocate and forward.

    model: such an object, or a function that builds it: then its weights wait for the first request and are kept.
    checkpoint: what such a function loads where it does not name its own: a folder, a model that ships, or one on the Hub.
    The row's committed length says what the cache holds, so no state of its own can run out of step: a step re-runs
    the last D + 2 tokens, at most D + 1 of them new, and a rejected draft is simply overwritten.

    Of a tokenizer of its own it drafts what both spell alike, by its law renormalised over that (TLI, 2502.05202, Alg. 4),
    which is the law that the verifier gets. It reads one token for each of the target's, so positions stay the same: where it
    lacks a word, the word's longest end that it has. That costs acceptance, and never changes the output's law.
    """

    def __init__(
        self,
        model: Any,
        num_draft_tokens: int = 4,
        structure: Structure | Sequence[int] | None = None,
        prefill_chunk: int = 256,
        checkpoint: str | Path | None = None,
    ) -> None:
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk={prefill_chunk}: the prompt needs chunks of at least one token")
        if not hasattr(model, "allocate"):
            if checkpoint is not None and _wants_checkpoint(model):
                folder = find_head(checkpoint)
                self.card = read_config(folder).get("specdec", {})
                self.trained = bool(self.card)  # by `specdec train`, for one target; others say nothing of it
                model = partial(model, checkpoint=folder)
            _check_arguments(model)
        self.structure = as_structure(structure, num_draft_tokens)
        self.model = model
        self.prefill_chunk = prefill_chunk
        self.laws, self.depth = self.structure.laws, self.structure.depth
        self.num_draft_tokens = self.structure.num_draft_tokens
        self._target: Any = None
        self._shared: SharedVocabulary | None = None

    def setup(self, target: Any, batch_size: int, max_len: int, law: Law) -> None:
        if not hasattr(self.model, "allocate"):
            self.model = self.model()
        if self._target is not target:
            self._shared = shared_vocabulary(self.model, target)
            self._target = target
        self._law = law
        # max_len counts room for one tree behind the longest row, which is no position the model must know
        nodes = self.num_draft_tokens + 1
        self.model.allocate(batch_size, max_len - nodes, max(nodes, self.structure.num_slots, self.depth + 2), ())
        self.structure.to(target.lengths.device)

    def prefill(self, inputs: DraftInputs) -> bool:
        """Run each row's last max_new committed tokens; a row that runs on repeats tokens its cache already holds.

        Starting at the same distance from every row's end keeps all writes inside the cache.
        """
        start = (inputs.lengths - 1 - inputs.max_new).clamp(min=0)
        for first in range(0, inputs.max_new, self.prefill_chunk):
            self._run(inputs, start + first, min(self.prefill_chunk, inputs.max_new - first))
        return True

    def propose(self, inputs: DraftInputs) -> DraftTree:
        window = self.depth + 2
        if inputs.max_new >= window:  # more than its own drafts: a prompt, or what another drafter proposed
            self.prefill(inputs)
        start = (inputs.lengths - window).clamp(min=0)
        logits = self._run(inputs, start, window)
        root_at = (inputs.lengths - 1 - start).long()[:, None, None]
        root_logits = logits.gather(1, root_at.expand(-1, -1, logits.shape[-1]))
        ids = None if self._shared is None else self._shared.target_ids
        state = RootState(self._draftable(root_logits), None, ids, self._target.config.vocab_size)
        prefix_lens = inputs.lengths - 1
        return self.structure.draft(self._forward, inputs.root, prefix_lens, inputs.sampling, self._law, state)

    def _run(self, inputs: DraftInputs, start: Tensor, count: int) -> Tensor:
        """Logits [B, count, W] of tokens from start [B] on; behind a row's end the root stands in, to be overwritten."""
        positions = start[:, None] + torch.arange(count, dtype=start.dtype, device=start.device)
        tokens = inputs.tokens.gather(1, torch.minimum(positions, inputs.lengths[:, None] - 1).long())
        return self._logits(ModelInputs(tokens, positions, start))

    def _forward(self, inputs: ModelInputs, hidden: Tensor | None = None) -> tuple[Tensor, None]:
        return self._draftable(self._logits(inputs)), None

    def _logits(self, inputs: ModelInputs) -> Tensor:
        """Logits [B, n, W] behind tokens of the target."""
        if self._shared is not None:
            inputs = replace(inputs, tokens=self._shared.read_as[inputs.tokens])
        logits: Tensor = self.model.forward(inputs).logits
        return logits

    def _draftable(self, logits: Tensor) -> Tensor:
        """Those of the tokens that may be drafted. [B, n, W] -> [B, n, S]."""
        return logits if self._shared is None else logits.index_select(-1, self._shared.draft_ids)


def _wants_checkpoint(model: Any) -> bool:
    """Whether the function that builds the model needs a checkpoint and was given none."""
    parameter = inspect.signature(model).parameters.get("checkpoint")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _check_arguments(model: Any) -> None:
    """Raise ValueError unless the function that builds the model has all it needs, long before it is called."""
    try:
        inspect.signature(model).bind()
    except TypeError as error:
        raise ValueError(f"the draft model is {error}; give it one, as in drafter.model.checkpoint=DIR") from error
