"""The target interface: the model whose output law must be kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from specdec.types import Acceptance, DraftTree, ModelInputs, ModelOutput

__all__ = ["Target"]


@runtime_checkable
class Target(Protocol):
    """A causal language model over a cache of `batch_size` rows. Every method and the baseline share one."""

    config: Any  # .vocab_size, .hidden_size, .num_layers, .max_positions, .eos_token_ids
    checkpoint: Path | None  # the folder the weights came from
    tokenizer: Any  # None: prompts must be token ids
    embed: Tensor  # [V, hidden]
    lengths: Tensor  # int32 [B] committed tokens of each row
    graphable: bool  # verify and commit may be captured in a CUDA graph

    @property
    def lm_head(self) -> Tensor:
        """[V, hidden], whole on every rank."""

    def allocate(self, batch_size: int, max_len: int, num_nodes: int, features: Sequence[int | str]) -> None:
        """Empty cache for rows of at most `max_len` tokens and trees of `num_nodes`; choose the layers to tap."""

    def prefill(self, tokens: Tensor, lengths: Tensor) -> ModelOutput:
        """Fill rows whose length is above 0 from empty. tokens int64 [B, L], lengths [B]; logits [B, 1, V] of the last."""

    def verify(self, tree: DraftTree) -> ModelOutput:
        """One forward over the tree behind the prefix. logits [B, N, V], features [B, N, F]."""

    def commit(self, acceptance: Acceptance) -> None:
        """Keep the accepted path of the last tree and advance the lengths by num_accepted + 1."""

    def forward(self, inputs: ModelInputs, layers: int | None = None) -> ModelOutput:
        """A forward of the caller's making, e.g. drafting with the first `layers` in this cache; verify overwrites."""

    def check(self) -> None:
        """Raise what has gone wrong on the device since, of what the host can see without waiting for it."""
