"""Prompts in, text out: the one place where a chat template is applied, and text that grows with the tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

__all__ = ["Message", "Prompt", "TextStream", "encode", "encode_all", "messages", "template_name"]


class Message(TypedDict):
    """One entry of a chat, as transformers' chat templates take it."""

    role: str
    content: str


Prompt = str | Sequence[Message] | Sequence[int]  # a user's text, a chat so far, or token ids


def messages(turns: Sequence[str], answers: Sequence[str] = ()) -> list[Message]:
    """The chat up to the next turn to answer: each turn followed by the model's answer, as far as there are answers."""
    if len(answers) >= len(turns):
        raise ValueError(f"{len(answers)} answers to {len(turns)} turns leave nothing to answer: give fewer answers")
    chat: list[Message] = []
    for turn, answer in zip(turns, answers, strict=False):
        chat += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return [*chat, {"role": "user", "content": turns[len(answers)]}]


def encode(tokenizer: Any, prompt: Prompt, template: bool = True) -> list[int]:
    """Token ids of a prompt. A text is one user turn; with `template` off it is taken as it is. Ids pass through.

    `tokenizer` is a transformers tokenizer or whatever has its chat_template, apply_chat_template and encode.
    """
    if not isinstance(prompt, Sequence):
        raise ValueError(f"a prompt is a {type(prompt).__name__}: give a text, chat messages or a list of token ids")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError("the prompt is empty: give a text, chat messages or token ids")
    if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
        return list(cast("Sequence[int]", prompt))
    if not isinstance(prompt, str) and not all(_is_message(item) for item in prompt):
        raise ValueError(f"{prompt!r:.60} is no prompt: give a text, messages with role and content, or token ids")
    if tokenizer is None:
        raise ValueError("the checkpoint folder has no tokenizer: give token ids, or add its tokenizer files")
    if not template:
        if not isinstance(prompt, str):
            raise ValueError("chat messages need the chat template: give a text, or leave the template on")
        ids = tokenizer.encode(prompt)
    else:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer ({type(tokenizer).__name__}) has no chat template: "
                "use an instruction-tuned checkpoint, or switch the template off"
            )
        chat = messages([prompt]) if isinstance(prompt, str) else list(prompt)
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)  # the template writes them itself
    if not ids:
        raise ValueError(f"the prompt {prompt!r:.60} has no tokens: give a longer one")
    return list(ids)


def _is_message(item: object) -> bool:
    return isinstance(item, Mapping) and {"role", "content"} <= item.keys()


def template_name(tokenizer: Any) -> str:
    """Name of the chat template for logs: the first 12 hex digits of its SHA-256, "none" where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return "none"
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def encode_all(tokenizer: Any, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
    """Token ids of every prompt. A text, a list of messages and a list of ids are one prompt each."""
    if not isinstance(prompts, Sequence):
        raise ValueError(
            f"prompts are a {type(prompts).__name__}: give a text, chat messages or ids, or a list of them"
        )
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | Mapping))
    batch = [cast("Prompt", prompts)] if single else list(cast("Sequence[Prompt]", prompts))
    if not batch:
        raise ValueError("no prompts were given: pass a text, chat messages or token ids, or a list of them")
    return [encode(tokenizer, prompt) for prompt in batch]


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
