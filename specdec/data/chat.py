"""From text or messages to token ids: the one place where a chat template is applied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, TypedDict, cast

__all__ = ["Message", "Prompt", "encode", "messages", "template_name"]


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
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError("the prompt is empty: give a text, chat messages or token ids")
    if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
        return list(cast("Sequence[int]", prompt))
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


def template_name(tokenizer: Any) -> str:
    """Name of the chat template for logs: the first 12 hex digits of its SHA-256, "none" where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return "none"
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
