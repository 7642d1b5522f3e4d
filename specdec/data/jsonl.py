"""Prompts from a JSONL file of Spec-Bench's shape: one object a line with `turns` and `category` and/or `task`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specdec.data.dataset import Conversation, Dataset

__all__ = ["Jsonl"]

# Spec-Bench (Xia et al., 2024) counts these categories as one task, the one it took from MT-bench.
_MT_BENCH = frozenset({"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"})


class Jsonl(Dataset):
    """Reads `path`. Without `task` the category is the task, and MT-bench's eight categories are the task mt_bench."""

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
                    yield _parse(line, f"{self.path}, line {number}")


def _parse(line: str, where: str) -> Conversation:
    """One line as a Conversation."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
    missing = [key for key in ("question_id", "turns") if key not in record]
    if not ("category" in record or "task" in record):
        missing.append("category or task")
    if missing:
        raise ValueError(f"{where}: the field {' and '.join(missing)} is missing; it has {', '.join(sorted(record))}")
    turns = record["turns"]
    if not (isinstance(turns, list) and turns and all(isinstance(turn, str) and turn.strip() for turn in turns)):
        raise ValueError(f"{where}: turns must be a list of one or more non-empty strings, not {turns!r:.60}")
    category = str(record.get("category", record.get("task")))
    task = str(record.get("task", "mt_bench" if category in _MT_BENCH else category))
    return Conversation(str(record["question_id"]), task, category, str(record.get("language", "en")), list(turns))
