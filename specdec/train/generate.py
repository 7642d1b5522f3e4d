"""Training text in the target's own words: user turns from a `Source`, answers by the target, in shards on disk.

A head is trained to guess what the target says, so its text should be the target's. Shard i depends on the settings and i
alone: a run that was killed makes the last shard again, and ranks need not speak to one another. The text of a shard does not
depend on batch size and drafter where the target keeps logits apart from what shares a forward: native backends do, on a GPU
in forwards of up to 256 tokens (batch size times drafted tokens, and target.prefill_chunk).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specdec.composition import plain_drafter
from specdec.decoding import SamplingParams
from specdec.decoding.chat import Message, encode, template_name
from specdec.drafter import Drafter
from specdec.target import Target
from specdec.train import shards
from specdec.train.turns import Source, Writer

__all__ = ["FORMAT", "Recipe", "Row", "identity", "write_corpus"]

FORMAT = "corpus 1"  # of the folder; a change makes old ones unreadable


@dataclass(frozen=True, slots=True)
class Recipe:
    """How conversations become text. temperatures: of the answers, conversation by conversation in turns."""

    seed: int = 0
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    max_answer: int = 512  # tokens after which an answer is cut; what there is of it is kept
    max_prompt: int = 2048  # tokens; a conversation ends before a turn that makes it longer
    conversations: int = 256  # begun in a shard, which is what a kill loses at most

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        if not self.temperatures:
            raise ValueError("temperatures is empty: name at least one for the answers, such as [0.0]")
        for name in ("max_answer", "max_prompt", "conversations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def seed_of(self, number: int) -> int:
        """Seed of a conversation: 31 bits, all that the decoder takes, and no two alike below 2^31 conversations."""
        return (int.from_bytes(hashlib.sha256(str(self.seed).encode()).digest()[:4]) + number) % (1 << 31)


@dataclass(slots=True)
class Row:
    """One answer and everything before it. A later turn of a conversation is a row of its own, over the whole of it."""

    tokens: list[int]
    answer_start: int
    temperature: float
    conversation: int  # hash of the first user turn: rows with the same one belong together
    number: int


def identity(target: Target) -> dict[str, Any]:
    """What tells a target from another, wherever it lies: sizes, a hash over part of its embedding, and the chat template's."""
    sample = target.embed[:: max(1, target.embed.shape[0] // 256)].to("cpu", torch.bfloat16).contiguous()
    config = target.config
    return {
        "sizes": [config.vocab_size, config.hidden_size, config.num_layers],
        "embedding": hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()[:16],
        "template": template_name(target.tokenizer),
    }


def write_corpus(
    folder: str | Path,
    target: Target,
    source: Source,
    tokens: int,
    recipe: Recipe | None = None,
    drafter: Drafter | None = None,
    batch_size: int = 32,
    rank: int = 0,
    world: int = 1,
    console: Console | None = None,
) -> int:
    """Fill a folder with at least `tokens` tokens (of rows, prompts included) or all a source has; returns how many it holds.

    What is there already is kept. Rank r of `world` makes shards r, r + world, ... until it has its share of the tokens, and
    counts its own. ValueError: the folder was made with other settings, or a shard ends up without a row.
    """
    if tokens < 1 or not 0 <= rank < world:
        raise ValueError(f"tokens={tokens}, rank={rank}, world={world}: need tokens >= 1 and 0 <= rank < world")
    folder, recipe = Path(folder), recipe or Recipe()
    settings = {"format": FORMAT, "target": identity(target), "source": source.settings(), **asdict(recipe)}
    shards.bind(folder, settings)
    writer, share, done = Writer(target, drafter or plain_drafter(), batch_size), -(-tokens // world), 0
    numbers = count() if source.size is None else range(-(-source.size // recipe.conversations))
    with _progress(console) as bar:
        task = bar.add_task("writing text", total=share)
        for index in islice(numbers, rank, None, world):
            if done >= share:
                break
            with FileLock(folder / f".rank-{rank}.lock"):  # another process for this folder waits, then finds it whole
                if not shards.is_whole(folder, index):
                    bar.update(task, description=f"writing shard {index}")
                    _write_shard(folder, index, writer, source, recipe)
            done += shards.read_record(folder, index)["tokens"]
            bar.update(task, completed=done)
    return done


def _progress(console: Console | None) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens")
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=console is None)


def _write_shard(folder: Path, index: int, writer: Writer, source: Source, recipe: Recipe) -> None:
    writer.dropped.clear()
    first, stop = index * recipe.conversations, (index + 1) * recipe.conversations
    rows = sorted(_rows(range(first, min(stop, source.size or stop)), writer, source, recipe), key=lambda r: r.number)
    dropped = dict(sorted((+writer.dropped).items()))
    if not rows:
        raise ValueError(
            f"none of the {stop - first} conversations of shard {index} gave an answer to keep ({dropped}): widen the "
            "limits on turns and answers, or take the turns from a dataset"
        )
    lengths = torch.tensor([len(row.tokens) for row in rows])
    starts = torch.tensor([row.answer_start for row in rows], dtype=torch.int32)
    tensors = {
        "tokens": torch.tensor([token for row in rows for token in row.tokens], dtype=torch.int32),
        "offsets": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        "answer_starts": starts,
        "temperatures": torch.tensor([row.temperature for row in rows]),
        "conversations": torch.tensor([row.conversation for row in rows]),
    }
    facts = {
        "rows": len(rows),
        "tokens": int(lengths.sum()),
        "answer_tokens": int((lengths - starts).sum()),
        "dropped": dropped,
    }
    shards.write_shard(folder, index, tensors, facts)


def _rows(numbers: Sequence[int], writer: Writer, source: Source, recipe: Recipe) -> Iterator[Row]:
    """Conversations turn by turn: all user turns of a round, then all its answers."""
    chats: dict[int, list[Message]] = {number: [] for number in numbers}
    keys: dict[int, int] = {}
    for _ in range(source.rounds):
        seeds = [recipe.seed_of(number) for number in chats]
        turns = source.turns(writer, list(chats), list(chats.values()), seeds)
        asked = {number: turn for number, turn in zip(chats, turns, strict=True) if turn}
        keys = keys or _distinct(asked, writer.dropped)
        chats = {number: [*chats[number], _message("user", asked[number])] for number in asked if number in keys}
        answered = {}
        for row, whole in _answers(chats, keys, writer, recipe):
            yield row
            if whole:
                text = writer.target.tokenizer.decode(row.tokens[row.answer_start : -1], skip_special_tokens=True)
                answered[row.number] = [*chats[row.number], _message("assistant", text)]
        chats = {number: answered[number] for number in chats if number in answered}


def _answers(
    chats: dict[int, list[Message]], keys: dict[int, int], writer: Writer, recipe: Recipe
) -> Iterator[tuple[Row, bool]]:
    """The target's answer to every chat, and whether it is finished; temperature by temperature."""
    prompts = {number: encode(writer.target.tokenizer, chat) for number, chat in chats.items()}
    limit = min(recipe.max_prompt, writer.target.config.max_positions - recipe.max_answer)
    fits = [number for number, ids in prompts.items() if len(ids) <= limit]
    writer.dropped["prompt too long"] += len(prompts) - len(fits)
    for i, temperature in enumerate(recipe.temperatures):
        chosen = [number for number in fits if number % len(recipe.temperatures) == i]
        seeds = [recipe.seed_of(number) for number in chosen]
        sampling = SamplingParams(temperature=temperature)
        answers = writer.write([prompts[number] for number in chosen], recipe.max_answer, sampling, seeds)
        for number, (ids, whole) in zip(chosen, answers, strict=True):
            if len(ids) - whole == 0:
                writer.dropped["answer empty"] += 1
                continue
            prompt = prompts[number]
            yield Row([*prompt, *ids], len(prompt), temperature, keys[number], number), whole


def _distinct(turns: dict[int, str], dropped: Counter[str]) -> dict[int, int]:
    """Hash of every conversation's first turn, int64, case and spacing aside; of equals the first conversation stays."""
    first: dict[int, int] = {}  # hash -> conversation
    for number, turn in turns.items():
        text = " ".join(turn.casefold().split())
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], signed=True)
        dropped["turn repeated"] += key in first
        first.setdefault(key, number)
    return {number: key for key, number in first.items()}


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
