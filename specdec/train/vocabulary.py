"""The draft vocabulary: a head that knows only the target's frequent tokens costs less and misses little (EAGLE-3, FR-Spec).

Shapes: V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.target import Target

__all__ = ["coverage", "draft_vocabulary", "special_tokens"]


def draft_vocabulary(counts: Tensor, size: int, always: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """The `size` most frequent tokens, those in `always` among them; of equals the lowest ids. counts int64 [V].

    Returns d2t int64 [W], draft id i being target id i + d2t[i] with ids ascending, and t2d bool [V]. ValueError where
    `size` does not fit.
    """
    vocab_size, needed = counts.shape[0], set(always)
    if not 1 <= size <= vocab_size:
        raise ValueError(
            f"a draft vocabulary of {size} tokens does not fit the target's {vocab_size}: choose 1 to {vocab_size}"
        )
    if len(needed) > size:
        raise ValueError(f"{len(needed)} tokens must be in a draft vocabulary of {size}: make it larger")
    if bad := [token for token in needed if not 0 <= token < vocab_size]:
        raise ValueError(f"token {bad[0]} is outside the target's vocabulary of {vocab_size}: wrong tokenizer?")
    rank = counts.clone()
    rank[sorted(needed)] = torch.iinfo(torch.int64).max
    ids = rank.argsort(descending=True, stable=True)[:size].sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[ids] = True
    return ids - torch.arange(size), t2d


def coverage(counts: Tensor, t2d: Tensor) -> float:
    """Share of the counted tokens that a draft vocabulary has; 1 where nothing was counted."""
    total = int(counts.sum())
    return int(counts[t2d].sum()) / total if total else 1.0


def special_tokens(target: Target) -> list[int]:
    """Tokens that end an answer or mark its parts, ids ascending: rare in a count, but a draft must be able to say them."""
    tokenizer = target.tokenizer
    own = [getattr(tokenizer, "eos_token_id", None), *getattr(tokenizer, "all_special_ids", ())]
    ids = {*target.config.eos_token_ids, *(token for token in own if token is not None)}
    return sorted(token for token in ids if token < target.config.vocab_size)
