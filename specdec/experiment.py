"""The main job: run methods over a dataset, in turns on one target, and leave a run folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specdec import metrics
from specdec.composition import BASELINE
from specdec.data import Conversation
from specdec.decoding import GenerationResult, SpeculativeDecoder
from specdec.decoding.chat import Prompt, encode, messages, template_name
from specdec.target import ranks
from specdec.tracking.run_folder import Key, RunFolder

Call = tuple[str, list[Prompt], int, int, bool]  # method, prompts, max_new_tokens, seed, ignore_eos
_END: Call | None = None  # what rank 0 shares when all is decoded
CHUNK = 4  # batches of prompts a method decodes before the next takes its turn; rows refill from the queue meanwhile


@dataclass(frozen=True, slots=True)
class Job:
    """What to decode, and how often."""

    conversations: list[Conversation]
    max_new_tokens: int
    seed: int = 0
    passes: int = 1
    ignore_eos: bool = False
    verifier: str = "target_only"
    concurrent: bool = False  # other runs share the machine: no speed of this one means anything


def decode(decoders: dict[str, SpeculativeDecoder], call: Call) -> GenerationResult:
    """One method's answers."""
    name, prompts, max_new_tokens, seed, ignore_eos = call
    return decoders[name].generate(prompts, max_new_tokens, seed, ignore_eos=ignore_eos)


def follow(decoders: dict[str, SpeculativeDecoder]) -> None:
    """What the ranks behind the first do: decode what it decodes, until it has no more."""
    while (call := ranks.share(_END)) is not None:
        decode(decoders, call)


class Experiment:
    """Interleaves decoders, prompt by prompt; every finished request is on disk before the next begins.

    All methods answer the same prompts: later turns stand on the baseline's answers (the first method's without one).
    """

    def __init__(self, decoders: dict[str, SpeculativeDecoder], job: Job, folder: RunFolder) -> None:
        self.decoders, self.job, self.folder = decoders, job, folder
        self.first = next(iter(decoders.values()))
        rows, _ = metrics.read_rows(folder.path / "trace.jsonl")
        self._check_questions(rows)
        folder.write_answers((self._answer(row) for row in rows), anew=True)  # a kill may have come between both files
        self.tokens: dict[Key, list[int]] = {
            (row["drafter"], row["verifier"], row["request"], row["turn"], row["pass"]): row["tokens"] for row in rows
        }

    def run(self, console: Console) -> pd.DataFrame:
        """Do what is not done yet, with a progress bar; returns the summary."""
        self._check_lengths()
        pending = sum(len(c.turns) for c in self.job.conversations) * len(self.decoders) * self.job.passes
        done = len(self.tokens)
        bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console,
            disable=self.job.concurrent,  # two bars cannot share a terminal
        )  # fmt: skip
        with bar:
            task = bar.add_task("warming up", total=pending, completed=done)
            if done < pending:
                self._warm_up()
            for name, label, number in self._work():
                bar.update(task, description=f"{name:<16.32} {label:<14}", advance=number)
            bar.update(task, description="done")
        ranks.share(_END)
        return self.folder.finish()

    def _check_questions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """ValueError where the part that was interrupted had other questions: a file may change under the same path."""
        asked = {(i, c.question_id, turn) for i, c in enumerate(self.job.conversations) for turn in range(len(c.turns))}
        for row in rows:
            if (row["request"], row["question_id"], row["turn"]) not in asked:
                raise ValueError(
                    f"{self.folder.path} holds turn {row['turn']} of question {row['question_id']}, which is no longer the "
                    f"dataset's question number {row['request']}: put the dataset back, or give another run_dir"
                )

    def _check_lengths(self) -> None:
        """ValueError for a question that cannot fit the model, before hours are spent on those in front of it."""
        limit = self.first.target.config.max_positions
        for conversation in self.job.conversations:
            tokens = len(encode(self.first.tokenizer, messages(conversation.turns[:1])))
            if tokens + self.job.max_new_tokens > limit:
                raise ValueError(
                    f"question {conversation.question_id} has {tokens} tokens, which with max_new_tokens="
                    f"{self.job.max_new_tokens} exceeds the model's {limit} positions: leave it out or lower the limit"
                )

    def _warm_up(self) -> None:
        """Touch the weights and compile what compiles, with each method, before anything is timed."""
        for name in self.decoders:
            self._generate((name, [[1, 2, 3, 1, 2, 3, 1]], 4, 0, True))

    def _generate(self, call: Call) -> GenerationResult:
        """With the other ranks, if there are any."""
        ranks.share(call)
        return decode(self.decoders, call)

    def _work(self) -> Iterator[tuple[str, str, int]]:
        """Yields (method, task, requests) as groups of requests are finished."""
        conversations, batch = self.job.conversations, self.first.batch_size
        size = 1 if batch == 1 else CHUNK * batch
        for number in range(self.job.passes):
            for start in range(0, len(conversations), size):
                group = list(enumerate(conversations))[start : start + size]
                for turn in range(max(len(c.turns) for _, c in group)):
                    present = [(i, c) for i, c in group if turn < len(c.turns)]
                    for name in self.decoders:
                        todo = [(i, c) for i, c in present if self._key(name, i, turn, number) not in self.tokens]
                        if todo:
                            yield name, todo[0][1].task, 0
                            self._decode(name, todo, turn, number)
                            yield name, todo[0][1].task, len(todo)

    def _key(self, name: str, request: int, turn: int, number: int) -> Key:
        return name, self.job.verifier, request, turn, number

    def _decode(self, name: str, todo: Sequence[tuple[int, Conversation]], turn: int, number: int) -> None:
        """One method's answers to one turn of some conversations, written down."""
        decoder, job = self.decoders[name], self.job
        prompts: list[Prompt] = [messages(c.turns[: turn + 1], self._answers(i, turn, number)) for i, c in todo]
        try:
            result = self._generate((name, prompts, job.max_new_tokens, job.seed + number, job.ignore_eos))
        except ValueError as error:
            raise ValueError(f"question {', '.join(c.question_id for _, c in todo)}: {error}") from error
        for at, (i, conversation) in enumerate(todo):
            key = self._key(name, i, turn, number)
            self.tokens[key] = result.tokens[at]
            row = self._row(key, conversation, decoder, result, at)
            self.folder.append(row)
            self.folder.write_answers([self._answer(row)])

    def _answers(self, request: int, turn: int, number: int) -> list[str]:
        """The answers that later turns stand on: the first method's."""
        source = next(iter(self.decoders))
        tokens = [self.tokens[self._key(source, request, t, number)] for t in range(turn)]
        return [str(self.first.tokenizer.decode(ids, skip_special_tokens=True)) for ids in tokens]

    def _answer(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What output.jsonl says of a row of the trace."""
        names = ("question_id", "task", "drafter", "verifier", "turn", "pass")
        return {
            **{name: row[name] for name in names},
            "prompt": self.job.conversations[row["request"]].turns[row["turn"]],
            "text": self.first.tokenizer.decode(row["tokens"], skip_special_tokens=True),
            "finish": row["finish"],
            "num_tokens": len(row["tokens"]),
        }

    def _row(
        self, key: Key, conversation: Conversation, decoder: SpeculativeDecoder, result: GenerationResult, at: int
    ) -> dict[str, Any]:
        name, verifier, request, turn, number = key
        plain = self.tokens.get(self._key(BASELINE, request, turn, number))
        comparable = decoder.verifier.coupled or decoder.sampling.temperature == 0
        return {
            "drafter": name,
            "verifier": verifier,
            "lossless": decoder.verifier.lossless,
            "request": request,
            "question_id": conversation.question_id,
            "task": conversation.task,
            "category": conversation.category,
            "language": conversation.language,
            "template": template_name(decoder.tokenizer),
            "turn": turn,
            "pass": number,
            "batch_size": decoder.batch_size,
            "concurrent": self.job.concurrent,
            "equal_to_plain": result.tokens[at] == plain if comparable and plain is not None else None,
            **result.trace.requests[at].as_row(),
        }
