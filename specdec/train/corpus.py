"""Reading the text that `generate` wrote: rows, the split into training and held-out text, batches, counts.

Shapes: R rows, B rows of a batch, T tokens of its longest row, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from specdec.train import shards
from specdec.train.generate import FORMAT

__all__ = ["Batch", "Corpus", "Split"]

Split = Literal["train", "heldout"]
_WINDOW = 32  # batches whose rows are sorted by length together: little padding, and the order stays random
_BUCKETS = 1 << 20  # how finely the hash of a conversation is looked at
_REMEDY = "write the text again with the same settings, which makes it anew, or delete the shard with its record"


class Batch(NamedTuple):
    """Rows padded at the end with token 0."""

    tokens: Tensor  # int64 [B, T]
    lengths: Tensor  # int32 [B]
    loss_mask: Tensor  # bool [B, T]  tokens to be learnt
    rows: Tensor  # int64 [B]  which rows of the corpus these are


class Corpus:
    """Rows of a folder in memory. A conversation that an earlier shard has too is left out.

    heldout: share of the conversations kept from training. Which ones is decided by a hash of the first user turn, so it
    is the same in every run, however many shards there are. tokens: take the first shards that hold so many, whatever else
    has been written since; None: take all. ValueError names a shard that is missing or damaged.
    """

    def __init__(self, folder: str | Path, heldout: float = 0.03, tokens: int | None = None) -> None:
        self.folder = Path(folder)
        if not 0 <= heldout < 1:
            raise ValueError(f"heldout={heldout} must be at least 0 and below 1, such as 0.03")
        self.settings = shards.read_settings(self.folder)
        if self.settings["format"] != FORMAT:
            raise ValueError(
                f"{self.folder} holds {self.settings['format']!r}, and {FORMAT!r} is read here: write the text again"
            )
        self.shards = shards.indices(self.folder)  # their numbers
        if not self.shards:
            raise ValueError(f"{self.folder} holds no text yet: write some with write_corpus")
        self._tokens: list[Tensor] = []  # int32, a shard each
        self.checksums: list[str] = []  # of the shards
        parts: dict[str, list[Tensor]] = {"shard": [], "row": [], "start": [], "stop": [], "answer": [], "key": []}
        seen, held = torch.zeros(0, dtype=torch.int64), 0
        for place, index in enumerate(self.shards):
            if tokens is not None and held >= tokens:
                self.shards = self.shards[:place]
                break
            record = shards.verify(self.folder, index, _REMEDY)
            held += record["tokens"]
            self.checksums.append(record["sha256"])
            data = load_file(shards.path_of(self.folder, index))
            fresh = (~torch.isin(data["conversations"], seen)).nonzero()[:, 0]
            seen = torch.cat([seen, data["conversations"]])
            self._tokens.append(data["tokens"])
            parts["shard"].append(torch.full_like(fresh, place))
            parts["row"].append(fresh)
            parts["start"].append(data["offsets"][:-1][fresh])
            parts["stop"].append(data["offsets"][1:][fresh])
            parts["answer"].append(data["answer_starts"].long()[fresh])
            parts["key"].append(data["conversations"][fresh])
        self._shard, self._row, self._start, stop, self.answer_starts, key = (torch.cat(parts[name]) for name in parts)
        self.lengths = stop - self._start  # int64 [R]
        self.is_heldout = key % _BUCKETS < heldout * _BUCKETS  # bool [R]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """Tells whether it is the same text: 16 hex digits over the shards' checksums."""
        return hashlib.sha256("".join(self.checksums).encode()).hexdigest()[:16]

    def name(self, row: int) -> str:
        """Where a row lies, for messages."""
        return f"shard {self.shards[int(self._shard[row])]}, row {int(self._row[row])}"

    def place(self, row: int) -> tuple[int, int]:
        """Place of a row's shard among those here, and how many tokens of the shard's rows here stand before it."""
        place = int(self._shard[row])
        first = int(torch.searchsorted(self._shard, place))
        return place, int(self.lengths[first:row].sum())

    def content(self, place: int) -> str:
        """Tells what rows the corpus has of the shard at `place`: SHA-256 over its checksum and their numbers."""
        rows = self._row[self._shard == place].tolist()
        return hashlib.sha256(f"{self.checksums[place]} {rows}".encode()).hexdigest()

    def tokens(self, row: int) -> Tensor:
        """The tokens of one row, int32 [length]."""
        start = int(self._start[row])
        return self._tokens[int(self._shard[row])][start : start + int(self.lengths[row])]

    def rows(self, split: Split, max_len: int | None = None) -> Tensor:
        """Row ids of a split, int64; those whose answer begins within max_len tokens."""
        wanted = self.is_heldout if split == "heldout" else ~self.is_heldout
        if max_len is not None:
            wanted = wanted & (self.answer_starts < max_len)
        return wanted.nonzero()[:, 0]

    def rows_of_shard(self, place: int) -> Tensor:
        """Row ids of the shard that stands at `place` among those here, int64, in the shard's order."""
        return (self._shard == place).nonzero()[:, 0]

    def prompts(self, split: Split = "heldout", limit: int | None = None) -> list[list[int]]:
        """What the answers of a split's rows answer, as token ids."""
        return [self.tokens(row)[: int(self.answer_starts[row])].tolist() for row in self.rows(split)[:limit].tolist()]

    def counts(self, vocab_size: int, split: Split = "train") -> Tensor:
        """How often each token stands in the answers, int64 [V]; what a draft vocabulary is chosen by."""
        total = torch.zeros(vocab_size, dtype=torch.int64)
        for place in range(len(self.shards)):
            rows = self.rows_of_shard(place)
            chosen = rows[self.is_heldout[rows] == (split == "heldout")].tolist()
            answers = [self.tokens(row)[int(self.answer_starts[row]) :] for row in chosen]
            total += torch.bincount(torch.cat(answers or [torch.zeros(0, dtype=torch.int32)]), minlength=vocab_size)
        return total

    def steps(self, batch_size: int, max_len: int, world: int = 1, split: Split = "train") -> int:
        """Batches of an epoch for each rank; rows left over wait for another epoch's order. ValueError if there are none."""
        rows, needed = len(self.rows(split, max_len)), batch_size * world
        if rows < needed:
            raise ValueError(
                f"{self.folder} has {rows} rows for {split} with answers that begin within max_len={max_len}, fewer than a "
                f"batch of {batch_size} on {world} ranks: write more text, or take smaller batches"
            )
        return rows // needed

    def batches(
        self,
        batch_size: int,
        max_len: int,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        split: Split = "train",
        learn: Literal["answers", "all"] = "answers",
    ) -> Iterator[Batch]:
        """This rank's batches of one epoch from `start_step` on, in an order that (seed, epoch) decides.

        Ranks share out what one rank with batches of batch_size * world would see. Rows are cut at max_len tokens.
        """
        steps = self.steps(batch_size, max_len, world, split)
        order = self._order(self.rows(split, max_len), batch_size * world, seed, epoch)
        for step in range(start_step, steps):
            yield self.batch(order[step][rank::world], max_len, learn)

    def _order(self, rows: Tensor, size: int, seed: int, epoch: int) -> Tensor:
        """Row ids [steps, size]: shuffled, sorted by length within windows, and the batches shuffled again."""
        mixed = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7])
        generator = torch.Generator().manual_seed(mixed)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        rows = torch.cat([part[self.lengths[part].argsort(stable=True)] for part in torch.split(rows, _WINDOW * size)])
        steps = len(rows) // size
        return rows[: steps * size].view(steps, size)[torch.randperm(steps, generator=generator)]

    def batch(self, rows: Tensor, max_len: int | None = None, learn: Literal["answers", "all"] = "answers") -> Batch:
        """These rows of the corpus, padded to the longest of them."""
        lengths = self.lengths[rows] if max_len is None else self.lengths[rows].clamp(max=max_len)
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for i, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
            tokens[i, :length] = self.tokens(row)[:length]
        position = torch.arange(tokens.shape[1])
        first = self.answer_starts[rows] if learn == "answers" else torch.zeros_like(rows)
        loss_mask = (position >= first[:, None]) & (position < lengths[:, None])
        return Batch(tokens, lengths.to(torch.int32), loss_mask, rows)
