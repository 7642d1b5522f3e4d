"""What a user asks of `generate` as ids: prompts, seeds and stop tokens, checked against the target."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.decoding.chat import Prompt, encode_all
from specdec.decoding.params import check_seed, check_whole
from specdec.target import Target

__all__ = ["Request", "make_requests", "stop_ids"]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to answer."""

    index: int
    ids: list[int]
    seed: int  # of the noise


def make_requests(
    target: Target, prompts: Prompt | Sequence[Prompt], max_new_tokens: int, seed: int | Sequence[int]
) -> list[Request]:
    """One request a prompt, in their order. ValueError for what cannot be answered."""
    check_whole("max_new_tokens", max_new_tokens, 1)
    encoded = encode_all(target.tokenizer, prompts)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(encoded)
    for one in seeds:
        check_seed(one)
    if len(seeds) != len(encoded):
        raise ValueError(f"{len(seeds)} seeds for {len(encoded)} prompts: give one seed, or one a prompt")
    for ids in encoded:
        _check_ids(target, ids)
    return [Request(i, ids, _noise_seed(s, ids)) for i, (ids, s) in enumerate(zip(encoded, seeds, strict=True))]


def stop_ids(target: Target, stop: Sequence[int | str], ignore_eos: bool) -> Tensor:
    """Tokens that end an answer, int64 [S]: those asked for and, unless ignored, the model's own; -1 pads."""
    tokenizer = target.tokenizer
    own = [] if ignore_eos else list(target.config.eos_token_ids)
    if not ignore_eos and tokenizer is not None and tokenizer.eos_token_id is not None:
        own.append(tokenizer.eos_token_id)
    ids: list[int] = []
    for item in [stop] if isinstance(stop, int | str) else stop:
        ids += [item] if isinstance(item, int) else _encode_stop(tokenizer, item)
    _check_ids(target, ids)
    ids += own
    unused = [-1] * (-len(set(ids)) % 8)  # so that graphs fit whatever the number
    return torch.tensor(sorted(set(ids)) + unused, dtype=torch.int64, device=target.lengths.device)


def _check_ids(target: Target, ids: Sequence[int]) -> None:
    """ValueError for a token id that the target does not have."""
    vocabulary = target.config.vocab_size
    bad = next((i for i in ids if not 0 <= i < vocabulary), None)
    if bad is not None:
        raise ValueError(f"token id {bad} is outside the target's vocabulary of {vocabulary}: wrong tokenizer?")


def _noise_seed(seed: int, ids: list[int]) -> int:
    """Seed of a request's noise, 63 bits: differs between prompts, not between batches."""
    return int(seed) << 32 | zlib.crc32(repr(ids).encode())


def _encode_stop(tokenizer: Any, text: str) -> list[int]:
    """The one token a stop string is, or a ValueError."""
    if tokenizer is None:
        raise ValueError(f"the stop string {text!r} needs a tokenizer, and the checkpoint has none: stop on a token id")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"the stop string {text!r} is {len(ids)} tokens, not 1: stop on a token id")
    return list(ids)
