"""Prompt lookup (Saxena 2023; "n-gram" in vLLM): what followed the same words earlier in the text follows now."""

from __future__ import annotations

import torch

from specdec.drafter import Drafter
from specdec.kernels.steps import lookup
from specdec.types import DraftInputs, DraftTree

__all__ = ["NGram"]


class NGram(Drafter):
    """Copies what followed the longest, then most recent, earlier occurrence of the last tokens.

    A match of n tokens (min_ngram <= n <= max_ngram) proposes at most max_spec_factor * n: short matches are weak
    evidence. The copy may run into itself, as in LZ77, so that text with a short period is proposed at full length.
    """

    def __init__(
        self, num_draft_tokens: int = 5, max_ngram: int = 3, min_ngram: int = 1, max_spec_factor: float = 3.0
    ) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"min_ngram={min_ngram}, max_ngram={max_ngram}: need 1 <= min_ngram <= max_ngram")
        if max_ngram > 100:  # match lengths are counted in bytes
            raise ValueError(f"max_ngram={max_ngram}: at most 100; drafter=suffix has no limit")
        if num_draft_tokens < 1 or max_spec_factor <= 0:
            raise ValueError(
                f"num_draft_tokens={num_draft_tokens} and max_spec_factor={max_spec_factor} must be positive; "
                "use drafter=none to propose nothing"
            )
        self.num_draft_tokens = self.depth = num_draft_tokens
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram
        self.max_spec_factor = max_spec_factor

    def prefill(self, inputs: DraftInputs) -> bool:
        return True

    def propose(self, inputs: DraftInputs) -> DraftTree:
        tokens, num_nodes = lookup(
            inputs.tokens,
            inputs.lengths,
            self.num_draft_tokens,
            self.max_ngram,
            self.min_ngram,
            self.max_spec_factor,
        )
        parents = torch.arange(-1, self.num_draft_tokens, dtype=torch.int32, device=tokens.device).expand(tokens.shape)
        return DraftTree(tokens, parents, num_nodes, self.num_draft_tokens)
