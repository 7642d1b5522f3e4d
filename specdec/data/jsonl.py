"""Prompts from a JSONL file: one object a line, of Spec-Bench's shape, or with a `prompt`, or with chat `messages`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specdec.data.dataset import Conversation, Dataset, user_turns

__all__ = ["Jsonl"]

# Spec-Bench (Xia et al., 2024) counts these categories as one task, the one it took from MT-bench.
_MT_BENCH = frozenset({"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"})


_PROMPT = ("turns", "prompt", "messages")  # the first that is there holds the user's side


class Jsonl(Dataset):
    """Reads `path`. `turns`, `prompt` or `messages` is a text, a list of texts, or chat messages, of which the user's count.

    question_id: the line number if it is not there. task: else the category, where MT-bench's eight are the task mt_bench;
    with neither, the file's name without its ending.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        """`options` are those of `Dataset`."""
        super().__init__(**options)
        self.path = Path(path).expanduser()

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> Iterator[Conversation]:
        """Conversations line by line, blank lines skipped; ValueError names the line that is wrong."""
        if not self.path.is_file():
            raise ValueError(f"there is no prompt file {self.path}: set dataset.path to a JSONL file")
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._parse(line, number)

    def _parse(self, line: str, number: int) -> Conversation:
        """One line as a Conversation."""
        where = f"{self.path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
        name = next((name for name in _PROMPT if name in record), None)
        if name is None:
            raise ValueError(
                f"{where}: there is no {', '.join(_PROMPT)}, one of which is needed; it has {sorted(record)}"
            )
        turns = user_turns(record[name])
        if turns is None:
            raise ValueError(
                f"{where}: {name} must be a text, a list of texts or chat messages with a user's, not {record[name]!r:.60}"
            )
        category = str(record.get("category", record.get("task", self.path.stem)))
        task = str(record.get("task", "mt_bench" if str(record.get("category")) in _MT_BENCH else category))
        return Conversation(
            str(record.get("question_id", number)), task, category, str(record.get("language", "en")), turns
        )
