"""Prompt lookup (Saxena 2023; "n-gram" in vLLM): what followed the same words earlier in the text follows now.

Shapes: B rows, L tokens of a row, K draft tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.drafter import Drafter
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

    def propose(self, inputs: DraftInputs) -> DraftTree:
        tokens, last = inputs.tokens, inputs.lengths.long()[:, None] - 1
        suffix = tokens.gather(1, (last - torch.arange(self.max_ngram, device=last.device)).clamp(min=0))
        match_len, match_end = self._longest_match(tokens, suffix, last)
        period = (last - match_end).clamp(min=1)
        steps = torch.arange(self.num_draft_tokens, device=last.device)
        drafts = tokens.gather(1, (match_end + 1 + steps % period).clamp(max=tokens.shape[1] - 1))
        num_drafts = (match_len * self.max_spec_factor).int().clamp(max=self.num_draft_tokens)
        num_drafts = num_drafts * (match_len >= self.min_ngram)
        return DraftTree.chain(suffix[:, 0], drafts, num_drafts.squeeze(1))

    def _longest_match(self, tokens: Tensor, suffix: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Length and end of the best match, int64 [B, 1]. tokens [B, L], suffix [B, n] read backwards, last [B, 1].

        run_i[j] = [tokens[j] = suffix[i]] * (1 + run_{i+1}[j-1]), so run_0[j] counts how many tokens, read backwards
        from j, agree with the end of the text. An n-gram longer than the text itself finds no room in front of it.
        """
        size = tokens.shape[1]
        same = (tokens[:, None] == suffix[:, :, None]).view(torch.uint8)  # [B, n, L]; bytes are cheap to scan
        run = same[:, -1]
        for i in range(self.max_ngram - 2, -1, -1):
            longer, run = run, same[:, i]
            run[:, 1:].addcmul_(run[:, 1:], longer[:, :-1])
        position = torch.arange(size, device=tokens.device)
        run *= position < last
        best = torch.add(position, run, alpha=size).amax(1, keepdim=True)  # the longest match, of equals the latest
        return best // size, best % size
