"""What a head sees of its target: the tapped layers and the final norm's output at every token, computed or read from disk.

Shapes: B rows, T tokens, F taps, H hidden size. Target logits are hidden @ lm_head.T. Behind a row's length all is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.target import Target
from specdec.train import shards
from specdec.train.corpus import Batch, Corpus
from specdec.train.generate import identity

__all__ = ["CachedFeatures", "FeatureSource", "Features", "cache_features"]

FORMAT = "features 1"


class FeatureSource(Protocol):
    """Either of the two below."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """taps [B, T, F*H] and hidden [B, T, H], on the device of the target or, from disk, of the batch."""


class Features:
    """Computes them with the target, whose cache it takes; in the target's dtype."""

    def __init__(self, target: Target, taps: Sequence[int]) -> None:
        self.target, self.taps = target, tuple(taps)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        wanted: tuple[int | str, ...] = (*self.taps, "hidden")
        if self.target.lengths.device.type == "cuda" and hasattr(self.target, "read"):
            features = self.target.read(batch.tokens, batch.lengths, wanted)
        else:
            self.target.allocate(len(batch.tokens), batch.tokens.shape[1], 0, wanted)
            features = self.target.prefill(batch.tokens.to(self.target.lengths.device), batch.lengths).features
        assert features is not None
        size = features.shape[-1] // (len(self.taps) + 1)
        return features[..., :-size], features[..., -size:]


def cache_features(
    folder: str | Path, corpus: Corpus, features: Features, batch_size: int = 8, console: Console | None = None
) -> None:
    """Write them for all rows of a corpus, a shard beside each of its shards, in bfloat16: 2 * (F + 1) * H bytes a token.

    Shards that are there and whole are kept. ValueError where the folder belongs to another target, corpus or taps.
    """
    folder = Path(folder)
    shards.bind(folder, _settings(corpus, identity(features.target), features.taps))
    places = range(len(corpus.shards))
    for place in track(places, "computing features", console=console, disable=console is None):
        index, source = corpus.shards[place], corpus.content(place)
        if shards.is_whole(folder, index) and shards.read_record(folder, index)["corpus"] == source:
            continue
        parts = []
        for rows in torch.split(corpus.rows_of_shard(place), batch_size):
            batch = corpus.batch(rows)
            both = torch.cat(features(batch), -1).to("cpu", torch.bfloat16)
            parts += [row[:length] for row, length in zip(both, batch.lengths.tolist(), strict=True)]
        width = features.target.config.hidden_size * (len(features.taps) + 1)
        flat = torch.cat(parts) if parts else torch.zeros(0, width, dtype=torch.bfloat16)
        shards.write_shard(folder, index, {"features": flat}, {"corpus": source, "tokens": len(flat)})


class CachedFeatures:
    """Reads what `cache_features` wrote, row by row from mapped files; a shard's checksum is compared when it is first read.

    ValueError: made for another corpus, target or taps, or a shard that is missing, damaged or stale, and how to make it again.
    """

    def __init__(self, folder: str | Path, corpus: Corpus, taps: Sequence[int]) -> None:
        self.folder, self.corpus = Path(folder), corpus
        self.hidden_size = int(corpus.settings["target"]["sizes"][1])
        shards.compare(self.folder, _settings(corpus, corpus.settings["target"], taps))
        self._open: dict[int, Any] = {}

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = []
        for row, length in zip(batch.rows.tolist(), batch.lengths.tolist(), strict=True):
            place, start = self.corpus.place(row)
            rows.append(self._shard(place)[start : start + length])
        features = pad_sequence(rows, batch_first=True).to(batch.tokens.device)
        return features[..., : -self.hidden_size], features[..., -self.hidden_size :]

    def _shard(self, place: int) -> Any:
        """The features [tokens, (F+1)*H] of a shard, mapped."""
        if place not in self._open:
            index = self.corpus.shards[place]
            path = shards.path_of(self.folder, index)
            remedy = "delete it and run cache_features again, which makes it anew"
            record = shards.verify(self.folder, index, remedy)
            if record["corpus"] != self.corpus.content(place):
                raise ValueError(f"{path} was made from text that has changed since: {remedy}")
            self._open[place] = safe_open(path, "pt").get_slice("features")  # type: ignore[no-untyped-call]
        return self._open[place]


def _settings(corpus: Corpus, target: dict[str, Any], taps: Sequence[int]) -> dict[str, Any]:
    return {"format": FORMAT, "target": target, "seed": corpus.settings["seed"], "taps": list(taps)}
