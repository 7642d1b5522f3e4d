"""What every source of prompts shares: the `Conversation` it yields and the options that choose among them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

__all__ = ["Conversation", "Dataset", "user_turns"]

ALL = "all"  # what tables call the row over all tasks


@dataclass(frozen=True, slots=True)
class Conversation:
    """The user's side of one dialogue; the answers between the turns are the model's own."""

    question_id: str
    task: str  # what results are grouped by
    category: str  # finer than task, or equal to it
    language: str
    turns: list[str]


class Dataset(ABC):
    """Conversations in a fixed order, narrowed by common options. `None` switches an option off.

    limit: conversations in all; per_task: the first n of each task; tasks: only these; turns: at most n of each
    conversation; half: only those with an odd or even question_id, so that tuning and reporting never share a question.
    """

    def __init__(
        self,
        limit: int | None = None,
        per_task: int | None = None,
        tasks: str | Sequence[str] | None = None,
        turns: int | None = None,
        half: Literal["odd", "even"] | None = None,
    ) -> None:
        for name, value in (("limit", limit), ("per_task", per_task), ("turns", turns)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give at least 1, or null for all")
        if half not in (None, "odd", "even"):
            raise ValueError(f"half is {half!r}; give 'odd', 'even' or null for all")
        self.limit, self.per_task, self.turns, self.half = limit, per_task, turns, half
        self.tasks = [tasks] if isinstance(tasks, str) else None if tasks is None else list(tasks)

    @abstractmethod
    def read(self) -> Iterable[Conversation]:
        """All conversations of the source. ValueError on a source that is missing or malformed."""

    def load(self) -> list[Conversation]:
        """The chosen conversations, in the source's order; ValueError when there are none or a filter fits nothing."""
        chosen = [replace(c, turns=c.turns[: self.turns]) for c in islice(self._chosen(), self.limit)]
        if not chosen and self.tasks is None and self.half is None:
            raise ValueError(f"{self} is empty: give it at least one conversation")
        if not chosen:
            raise ValueError(f"{self} has no conversation left: widen tasks={self.tasks} or half={self.half}")
        repeated = [qid for qid, count in Counter(c.question_id for c in chosen).items() if count > 1]
        if repeated:
            raise ValueError(f"{self} has question_id {repeated[0]} more than once: give every conversation its own")
        if named := next((c for c in chosen if c.task == ALL), None):
            raise ValueError(
                f"{self}: the task of question {named.question_id} is called {ALL!r}, as is the row over all tasks: "
                "rename it"
            )
        return chosen

    def _chosen(self) -> Iterator[Conversation]:
        """Conversations that pass tasks, half and per_task."""
        seen: Counter[str] = Counter()
        for conversation in self._of_tasks():
            if self.half is not None and self._number(conversation) % 2 != (self.half == "odd"):
                continue
            seen[conversation.task] += 1
            if self.per_task is None or seen[conversation.task] <= self.per_task:
                yield conversation

    def _of_tasks(self) -> Iterable[Conversation]:
        if self.tasks is None:
            return self.read()  # stays lazy: a limit then ends the reading early
        everything = list(self.read())
        present = sorted({c.task for c in everything})
        unknown = [task for task in self.tasks if task not in present]
        if unknown:
            raise ValueError(f"{self} has no task {', '.join(map(repr, unknown))}; it has {', '.join(present)}")
        return [c for c in everything if c.task in self.tasks]

    def _number(self, conversation: Conversation) -> int:
        if not conversation.question_id.isdecimal():
            raise ValueError(
                f"half={self.half} needs whole-number question_ids, but {self} has {conversation.question_id!r}"
            )
        return int(conversation.question_id)


def user_turns(cell: object) -> list[str] | None:
    """The user's turns in a prompt, a list of turns, or chat messages (role and content); None where there are none."""
    items = [cell] if isinstance(cell, str) else cell
    if not isinstance(items, list):
        return None
    if items and all(isinstance(item, Mapping) for item in items):
        items = [item.get("content") for item in items if item.get("role") == "user"]
    return items if items and all(isinstance(item, str) and item.strip() for item in items) else None
