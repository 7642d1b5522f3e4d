"""Prompts in, text out: one prompt or many, and text that grows with the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from specdec.data.chat import Prompt, encode as encode_one


def encode(tokenizer: Any, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
    """Token ids of every prompt. A text, a list of messages and a list of ids are one prompt each."""
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, dict)))
    batch = [cast("Prompt", prompts)] if single else list(cast("Sequence[Prompt]", prompts))
    if not batch:
        raise ValueError("no prompts were given: pass a text, chat messages or token ids, or a list of them")
    return [encode_one(tokenizer, prompt) for prompt in batch]


class TextStream:
    """Turns tokens into text piece by piece; bytes of an incomplete character wait for the rest."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._done = 0  # characters given out

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that these tokens add. Without a tokenizer: nothing."""
        if self._tokenizer is None:
            return ""
        self._tokens += tokens
        text = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        if text.endswith("�") and not last:
            return ""
        fresh, self._done = text[self._done :], len(text)
        return fresh
