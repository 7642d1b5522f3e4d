"""Prompts from any dataset on the Hugging Face Hub, or from local json, parquet or csv files by the same loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError

from specdec.data.dataset import Conversation, Dataset, user_turns

__all__ = ["HuggingFace"]


class HuggingFace(Dataset):
    """Rows of one split. `column` holds a prompt, a list of turns, or chat messages (of which the user's are taken).

    Local files: name json, parquet or csv with data_files. question_id is the row number. Every row belongs to
    `task` (the dataset's last name if null), unless `task_column` names a column that says it.
    """

    def __init__(
        self,
        name: str,
        column: str,
        config: str | None = None,
        split: str = "train",
        data_files: str | Sequence[str] | None = None,
        task: str | None = None,
        task_column: str | None = None,
        language: str = "en",
        **options: Any,
    ) -> None:
        """`options` are those of `Dataset`."""
        super().__init__(**options)
        self.name, self.column, self.config, self.split = name, column, config, split
        self.data_files = list(data_files) if data_files is not None and not isinstance(data_files, str) else data_files
        self.task, self.task_column, self.language = task or name.rsplit("/", 1)[-1], task_column, language

    def __str__(self) -> str:
        return f"dataset {self.name} ({self.data_files or self.config or 'default'}, split {self.split})"

    def read(self) -> Iterator[Conversation]:
        """Rows in order. ValueError when the dataset cannot be had, lacks a column, or a cell holds no prompt."""
        try:
            rows = load_dataset(self.name, self.config, split=self.split, data_files=self.data_files)
        except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError) as error:
            raise ValueError(f"{self} cannot be loaded: {error}") from error
        for column in (self.column, self.task_column):
            if column is not None and column not in rows.column_names:
                raise ValueError(f"{self} has no column {column!r}; it has {', '.join(rows.column_names)}")
        for number, row in enumerate(rows):
            turns = user_turns(row[self.column])
            if turns is None:
                raise ValueError(
                    f"{self}, row {number}: column {self.column!r} must hold a text, a list of texts "
                    f"or chat messages, not {row[self.column]!r:.60}"
                )
            task = self.task if self.task_column is None else str(row[self.task_column])
            yield Conversation(str(number), task, task, self.language, turns)
