"""Which prompts a benchmark takes, as token ids, and what its results say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _runtimes import Question, digest

from specdec.data import Dataset, Jsonl, Prompts
from specdec.decoding.chat import encode


@dataclass
class DatasetOptions:
    """Which prompts; only the first turn of each conversation is used."""

    path: str | None = None  # a JSONL file of Spec-Bench's shape; null: the prompts that ship with the package
    per_task: int | None = None  # the first n of each task
    tasks: list[str] | None = None
    half: str | None = None  # odd | even question_ids


def read_questions(options: DatasetOptions, tokenizer: Any) -> list[Question]:
    """The prompts as chats of one message."""
    narrow: dict[str, Any] = {"per_task": options.per_task, "tasks": options.tasks, "half": options.half, "turns": 1}
    dataset: Dataset = Prompts(**narrow) if options.path is None else Jsonl(options.path, **narrow)
    return [Question(c.question_id, c.task, encode(tokenizer, c.turns[0])) for c in dataset.load()]


def described(options: DatasetOptions, questions: Sequence[Question]) -> dict[str, Any]:
    """The prompts in a benchmark's setup: a path's last name, how many there are, a digest of their ids."""
    return {
        "dataset": vars(options) | {"path": Path(options.path or "prompts.jsonl").name},
        "prompts": len(questions),
        "prompts_digest": digest([i for question in questions for i in (*question.ids, -1)]),
    }
