"""A run's trace as it lies on disk, as a frame: a row per request and method, or per decode step."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ALL = "all"  # the row over all tasks
METHOD = ["run", "drafter", "verifier"]
KEY = ["drafter", "verifier", "request", "turn", "pass"]  # what makes a trace row unique in its run
COUNT_COLUMNS = ["num_nodes", "draft_depth", "num_accepted", "num_emitted"]
STEP_COLUMNS = [*COUNT_COLUMNS, "step_seconds", "propose_seconds", "verify_seconds", "accept_seconds"]
REQUIRED = [*KEY, "task", "lossless", "equal_to_plain", *STEP_COLUMNS]


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows of a trace.jsonl and the bytes they fill; bytes behind that are a line a killed process left unfinished."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); remove that line to go on") from error
    return rows, whole


def load_trace(run: str | Path) -> pd.DataFrame:
    """One row per request and method of a run folder (or of a trace.jsonl), list columns per step, plus its `run`.

    Warns when the last line was cut off. ValueError: no such run, nothing measured, a missing column, a row that stands twice.
    """
    path = Path(run)
    path = path if path.is_file() else path / "trace.jsonl"
    if not path.is_file():
        raise ValueError(f"there is no {path}: name a run folder, such as runs/NAME")
    rows, whole = read_rows(path)
    if whole < path.stat().st_size:
        warnings.warn(f"{path}: the last line was cut off and is left out; run the same command to go on", stacklevel=2)
    if not rows:
        raise ValueError(f"{path} holds no finished request; run the experiment first")
    frame = pd.DataFrame(rows)
    if missing := [column for column in REQUIRED if column not in frame]:
        raise ValueError(f"{path} lacks {missing}; a trace row needs {REQUIRED}")
    if twice := int(frame.duplicated(KEY).sum()):
        raise ValueError(f"{path}: {twice} rows repeat an earlier {KEY}; keep one of each")
    if (frame["task"] == ALL).any():
        raise ValueError(f"{path}: a task is called {ALL!r}, the name of the row over all tasks; rename the task")
    frame.insert(0, "run", path.parent.name)
    return frame


def steps(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per decode step: the method, task, request, turn, pass, step index and the step columns.

    `whole` is False where a stop or the limit cut the step short (num_emitted < num_accepted + 1).
    ValueError: the frame is no trace, or a damaged one.
    """
    names = [*METHOD, "task", "request", "turn", "pass"]
    if missing := [column for column in [*names, *STEP_COLUMNS] if column not in frame]:
        raise ValueError(
            f"this frame is no trace, it lacks {missing[0]}: give what analysis.load returns, not a summary"
        )
    counts = frame["num_accepted"].map(len).to_numpy()
    for column in STEP_COLUMNS:
        if not np.array_equal(counts, frame[column].map(len)):
            raise ValueError(f"{column} and num_accepted differ in their number of steps; the trace is damaged")
    long = frame[names].loc[frame.index.repeat(counts)].reset_index(drop=True)
    long["step"] = np.arange(len(long)) - np.repeat(np.cumsum(counts) - counts, counts)
    for column in STEP_COLUMNS:
        dtype = np.int64 if column in COUNT_COLUMNS else np.float64
        values = (np.nan if value is None else value for row in frame[column] for value in row)
        long[column] = np.fromiter(values, dtype, counts.sum())
    if (long["num_emitted"] > long["num_accepted"] + 1).any():
        raise ValueError("a step emitted more than num_accepted + 1 tokens; the trace is damaged")
    long["whole"] = long["num_emitted"] == long["num_accepted"] + 1
    return long
