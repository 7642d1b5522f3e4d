"""RUN/train.jsonl: what training measured, a JSON object a line. Tables, curves and W&B are made from it.

Shapes: J predictions of a position.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from specdec import metrics
from specdec.tracking.run_folder import write_atomic
from specdec.train.checkpoint import Standing

__all__ = ["COUNT", "HIT", "LOSS", "RATE", "TrainLog", "averages"]

LOSS, RATE, HIT, COUNT = range(4)  # columns of the sums over predictions: the loss, alpha, greedy hits, their number


def averages(sums: Tensor) -> dict[str, Any]:
    """Sums f64 [J, 4] as means a prediction, a list over depths each, and the mean loss over all."""
    means = sums[:, :COUNT] / sums[:, COUNT:].clamp(min=1)
    total = float(sums[:, LOSS].sum() / sums[:, COUNT].sum().clamp(min=1))
    lists = {name: means[:, at].tolist() for name, at in (("losses", LOSS), ("alpha", RATE), ("accuracy", HIT))}
    return {"loss": total, **lists}


class TrainLog:
    """Appends lines; what an interrupted run wrote behind its last checkpoint is cut off first. Only rank 0 writes."""

    def __init__(self, path: Path, standing: Standing, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        rows = metrics.read_rows(path)[0] if path.exists() else []
        kept = [row for row in rows if row["step"] <= standing.step]
        self.evaluated = {row["step"] for row in kept if "tau" in row}
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._restart()

    def _restart(self) -> None:
        self.sums: Tensor | None = None
        self.tokens, self.begun = 0, perf_counter()

    def add(self, sums: Tensor, tokens: int) -> None:
        """Count a step: sums f64 [J, 4] and the tokens it read."""
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens += tokens

    def step(self, learning_rate: float, norm: float, standing: Standing) -> dict[str, Any]:
        """Write down the means since the last line, and begin new ones."""
        assert self.sums is not None
        speed = self.tokens / (perf_counter() - self.begun)
        row = {
            "step": standing.step,
            "epoch": standing.epoch,
            "tokens": standing.tokens,
            **averages(self.sums),
            "learning_rate": learning_rate,
            "grad_norm": norm,
            "tokens_per_second": round(speed, 1),
        }
        self.write(row)
        self._restart()
        return row

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line; one with acceptance lengths, under "tau", says that its step was evaluated."""
        if "tau" in row:
            self.evaluated.add(row["step"])
            self.begun = perf_counter()  # the evaluation's time is not training's
        if self.writes:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
