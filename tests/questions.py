"""Prompts of a dataset, in a file as `dataset=jsonl` reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path


def write_questions(path: Path, texts: Iterable[str], tasks: Sequence[str] = ("qa",)) -> Path:
    """A conversation of one turn each, of the tasks in turn."""
    lines = [{"question_id": i, "category": tasks[i % len(tasks)], "turns": [text]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
