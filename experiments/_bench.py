"""What benchmarks share: a journal that survives interruption, interleaved timing, intervals, Markdown tables."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from specdec.metrics import RESAMPLES, read_rows
from specdec.tracking.environment import environment

PATHS = ("dataset.path", "checkpoint", "text", "heads", "results")  # options recorded by the last name of their value


class Journal:
    """Rows of a run, one JSON line each, on disk before the next is measured; the same command goes on with them.

    The first line holds the setup. ValueError when the file belongs to another setup: its rows could not be compared.
    """

    def __init__(self, path: Path, setup: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        lines, whole = read_rows(path)
        os.truncate(path, whole)  # a line that a killed process left unfinished
        self.path = path
        self.rows = lines[1:]
        self.keys = {row["key"] for row in self.rows}
        if not lines:
            self._write({"setup": setup})
        elif lines[0]["setup"] != (wanted := json.loads(json.dumps(setup))):
            old = lines[0]["setup"]
            differ = ", ".join(f"{k} ({old.get(k)} there, {v} here)" for k, v in wanted.items() if old.get(k) != v)
            raise ValueError(
                f"{path} was begun with other settings: {differ}; delete it or give another results folder"
            )

    def measure(self, key: str, function: Callable[[], dict[str, Any]]) -> bool:
        """Add the row that `function` measures, unless it is there already; whether it was measured now."""
        if key in self.keys:
            return False
        self.add({"key": key, **function()})
        return True

    def add(self, row: dict[str, Any]) -> None:
        """Append a row with a `key` of its own."""
        self._write(row)
        self.rows.append(row)
        self.keys.add(row["key"])

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def session(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Where and with what one session measured; no path of this machine. load: processes running as it began."""
    shown = [script]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        shown.append(f"{name}={Path(value).name}" if equals and name in PATHS else argument)
    return {**environment([]), "command": f"python {shlex.join(shown)}", "load": os.getloadavg()[0]}


def with_facts(facts: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row: what is known of it, then what is measured."""
    return {**facts, **measure()}


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, in turns, so that a slow moment meets all; a round before is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            begin = perf_counter()
            function()
            if number:
                seconds[name].append(perf_counter() - begin)
    return seconds


def reader(megabytes: int = 512) -> tuple[Callable[[], object], int]:
    """A sum over more memory than any cache holds, and its bytes: the reading that bandwidth is measured by."""
    memory = torch.ones(megabytes * 2**18)
    return memory.sum, memory.numel() * 4


def median_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median and its 95% percentile bootstrap interval over the values; NaN bounds below two values."""
    data = np.asarray(values, dtype=float)
    if len(data) == 0:
        return float("nan"), float("nan"), float("nan")
    if len(data) == 1:
        return float(data[0]), float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.quantile(np.median(data[draws], axis=1), [0.025, 0.975])
    return float(np.median(data)), float(low), float(high)


def ratio(value: float) -> str:
    """Two decimals; a dash where nothing was measured."""
    return "–" if np.isnan(value) else f"{value:.2f}"


def ratios(values: Sequence[float]) -> str:
    """`1.52 [1.47, 1.58]`: the median of ratios with its interval."""
    median, low, high = median_interval(values)
    return ratio(median) if np.isnan(low) else f"{median:.2f} [{low:.2f}, {high:.2f}]"


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"
