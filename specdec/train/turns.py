"""Where the user's side of the training text comes from: written by the target itself, or from a dataset.

The target writes user turns because its chat template, up to the opening of a user turn, is a prompt like any other: what
follows is a sample of what it expects to be asked (Magpie, 2406.08464).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.composition import exact_verifier
from specdec.data import Dataset
from specdec.decoding import SamplingParams, SpeculativeDecoder
from specdec.decoding.chat import Message
from specdec.drafter import Drafter
from specdec.target import Target

__all__ = ["DatasetText", "SelfText", "Source", "Writer", "opening"]

_PLACE = "thetextoftheuser"  # stands in for a user turn, to find what the template puts around it


@dataclass
class Writer:
    """The target writing text: one decoder for every temperature, all on the same weights. Counts what was not kept."""

    target: Target
    drafter: Drafter
    batch_size: int
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> number
    _decoders: dict[SamplingParams, SpeculativeDecoder] = field(default_factory=dict)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        limit: int,
        sampling: SamplingParams,
        seeds: Sequence[int],
        stop: Sequence[int] = (),
    ) -> list[tuple[list[int], bool]]:
        """At most `limit` tokens behind every prompt, and whether they end with a stop token (then the last one)."""
        if not prompts:
            return []
        if sampling not in self._decoders:
            rest = self.target, self.drafter, exact_verifier(), sampling, self.batch_size
            self._decoders[sampling] = SpeculativeDecoder(*rest, refill=-(-self.batch_size // 8))
        result = self._decoders[sampling].generate(prompts, limit, seeds, stop)
        return [(trace.tokens, trace.finish == "stop") for trace in result.trace.requests]


class Source(ABC):
    """Gives the next user turn of conversations that are known by number."""

    rounds: int = 1  # user turns of a conversation, at most
    size: int | None = None  # conversations there are; None = no end

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that decides which turns it gives, as plain values."""

    @abstractmethod
    def turns(
        self, writer: Writer, numbers: Sequence[int], chats: Sequence[Sequence[Message]], seeds: Sequence[int]
    ) -> list[str]:
        """The next user turn of every chat so far; "" where the conversation ends. A drop is counted by the writer."""


class SelfText(Source):
    """User turns that the target writes. min_turn, max_turn: tokens it writes for one; longer ones are dropped unfinished.

    beginnings: texts that first turns begin with, taken one after another by conversations, such as ["", "Translate"], to
    steer what they are about.
    """

    def __init__(
        self,
        rounds: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        min_turn: int = 4,
        max_turn: int = 192,
        beginnings: Sequence[str] = ("",),
    ) -> None:
        if rounds < 1 or not 1 <= min_turn <= max_turn or not beginnings:
            raise ValueError(
                f"rounds={rounds}, min_turn={min_turn}, max_turn={max_turn}, {len(beginnings)} beginnings: need rounds >= 1, "
                '1 <= min_turn <= max_turn and a beginning ("" leaves all to the target)'
            )
        self.rounds, self.min_turn, self.max_turn = rounds, min_turn, max_turn
        self.sampling = SamplingParams(temperature=temperature, top_p=top_p)
        self.beginnings = [beginnings] if isinstance(beginnings, str) else list(beginnings)

    def settings(self) -> dict[str, Any]:
        sampling = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        limits = {"rounds": self.rounds, "min_turn": self.min_turn, "max_turn": self.max_turn}
        return {"name": "self", **limits, **sampling, "beginnings": self.beginnings}

    def turns(
        self, writer: Writer, numbers: Sequence[int], chats: Sequence[Sequence[Message]], seeds: Sequence[int]
    ) -> list[str]:
        tokenizer = writer.target.tokenizer
        starts = [
            self.beginnings[n % len(self.beginnings)] if not chat else ""
            for n, chat in zip(numbers, chats, strict=True)
        ]
        pieces = [opening(tokenizer, chat, start) for chat, start in zip(chats, starts, strict=True)]
        room = writer.target.config.max_positions - self.max_turn - 1
        fits = [i for i, (ids, _) in enumerate(pieces) if len(ids) <= room]
        writer.dropped["no room for a turn"] += len(chats) - len(fits)
        prompts, stop = [pieces[i][0] for i in fits], sorted({end for _, end in pieces})
        written = writer.write(prompts, self.max_turn + 1, self.sampling, [seeds[i] for i in fits], stop)
        texts = [""] * len(chats)
        for i, (ids, whole) in zip(fits, written, strict=True):
            texts[i] = self._text(tokenizer, starts[i], ids, whole, writer.dropped)
        return texts

    def _text(self, tokenizer: Any, start: str, ids: list[int], whole: bool, dropped: Counter[str]) -> str:
        """The turn as text, or "" where it is not one."""
        ids = ids[:-1] if whole else ids
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        reason = (
            "turn not finished" if not whole
            else "turn empty" if not text.strip()
            else "turn too short" if len(ids) < self.min_turn
            else "turn with special tokens" if text != tokenizer.decode(ids)
            else ""
        )  # fmt: skip
        if reason:
            dropped[reason] += 1
            return ""
        return (start + text).strip()


class DatasetText(Source):
    """The turns of a dataset's conversations, in its order; the answers between them are written anew."""

    def __init__(self, dataset: Dataset) -> None:
        self.conversations = dataset.load()
        self.size = len(self.conversations)
        self.rounds = max(len(conversation.turns) for conversation in self.conversations)

    def settings(self) -> dict[str, Any]:
        turns = json.dumps([conversation.turns for conversation in self.conversations])
        return {"name": "dataset", "turns": hashlib.sha256(turns.encode()).hexdigest()}

    def turns(
        self, writer: Writer, numbers: Sequence[int], chats: Sequence[Sequence[Message]], seeds: Sequence[int]
    ) -> list[str]:
        asked = [sum(message["role"] == "user" for message in chat) for chat in chats]
        rest = (self.conversations[number].turns[done:] for number, done in zip(numbers, asked, strict=True))
        return [turns[0] if turns else "" for turns in rest]


def opening(tokenizer: Any, chat: Sequence[Message], start: str = "") -> tuple[list[int], int]:
    """Token ids of the chat and the first words of the next user turn, and the token with which the template ends a turn.

    ValueError for a tokenizer without chat template, or one that does not show a user's text as it is.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer ({type(tokenizer).__name__}) has no chat template, and without one the target cannot write "
            "what it is asked: use an instruction-tuned checkpoint"
        )
    marked = [*chat, {"role": "user", "content": _PLACE}]
    text: str = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    before, *behind = text.split(_PLACE)
    ids = list(tokenizer.encode(before + start, add_special_tokens=False))
    ends = list(tokenizer.encode(behind[0], add_special_tokens=False)) if behind else []
    if len(behind) != 1 or not ids or not ends:
        raise ValueError(
            f"the chat template of {type(tokenizer).__name__} shows a user's text {len(behind)} times, or with nothing "
            "before or behind it, so where a turn begins and ends is unknown: take the turns from a dataset"
        )
    return ids, ends[0]
