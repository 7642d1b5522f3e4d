"""Questions to a finished run: which drafter for which task, how many drafts, where the time goes.

>>> frame = load("runs/today")
>>> best_drafter(summary(frame))
>>> best_num_drafts(expected_speedup(frame))
>>> summary(load_sweep("runs/sweep")).query("task == 'all'")
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from specdec import metrics
from specdec.metrics import (
    ALL,
    BASELINE,
    METHOD,
    acceptance_by_position,
    acceptance_length,
    breakdown,
    load_trace,
    method_labels,
    shared_runs,
    speedup,
    steps,
)
from specdec.plots import plot_acceptance, plot_breakdown, plot_length, plot_speedup, plot_steps

__all__ = [
    "acceptance_by_position",
    "acceptance_length",
    "best_drafter",
    "best_num_drafts",
    "breakdown",
    "expected_speedup",
    "load",
    "load_sweep",
    "picture",
    "plot_acceptance",
    "plot_breakdown",
    "plot_length",
    "plot_speedup",
    "plot_steps",
    "speedup",
    "steps",
    "summary",
]

CELLS = "cells.jsonl"  # in a sweep's folder, a line per cell of the last command that swept there
# columns of traces and summaries: no setting is called so
TAKEN = {*metrics.REQUIRED, "tokens", "category", "language", "template", "turns", "logprobs"}


def load(runs: str | Path | Sequence[str | Path]) -> pd.DataFrame:
    """The traces of one or more run folders in one frame; their `run` keeps them apart, so names must differ.

    ValueError: no folder, one without a trace, or a sweep's.
    """
    folders = [runs] if isinstance(runs, str | Path) else list(runs)
    if not folders:
        raise ValueError("no run folder was given: name at least one, such as runs/NAME")
    if sweeps := [str(folder) for folder in folders if (Path(folder) / CELLS).exists()]:
        raise ValueError(f"{sweeps[0]} is the folder of a sweep: analysis.load_sweep reads its cells")
    frames = [load_trace(folder) for folder in folders]
    names = [str(frame["run"].iloc[0]) for frame in frames]
    if len(set(names)) < len(names):
        raise ValueError(f"runs are told apart by folder name, and {names} repeat; rename a folder")
    return pd.concat(frames, ignore_index=True)


def sweep_cells(folder: str | Path) -> pd.DataFrame:
    """A row per cell of a sweep, in its order: run (the swept settings in words), cell (its folder), done, and each swept key.

    A key is a column under the last part of its name, where that says enough. ValueError: no sweep was run there.
    """
    place = Path(folder) / CELLS
    if not place.exists():
        raise ValueError(f"{place} does not exist: name the folder of a sweep, or give its `specdec -m` command again")
    lines = sorted((json.loads(line) for line in place.read_text().splitlines()), key=lambda line: int(line["number"]))
    cells = pd.DataFrame([{"cell": line["cell"], "done": line["done"]} for line in lines])
    settings = pd.DataFrame([line["settings"] for line in lines], dtype=object)
    settings = settings.loc[:, settings.astype(str).nunique() > 1]
    settings = settings.rename(columns=_short_names(settings.columns.tolist()))
    words = [" ".join(f"{name}={value}" for name, value in row.items()) for _, row in settings.iterrows()]
    cells.insert(0, "run", [said or cell for said, cell in zip(words, cells["cell"], strict=True)])
    cells = cells.join(settings[[name for name in settings if name not in TAKEN]])  # a row says its drafter anyway
    return cells.drop_duplicates("cell", ignore_index=True)


def _short_names(keys: list[str]) -> dict[str, str]:
    """Key -> its last part, unless that is another's too, or a column's of traces and summaries."""
    last = {key: re.split("[.@]", key)[-1] for key in keys}
    names = list(last.values())
    return {key: key if names.count(name) > 1 or name in TAKEN else name for key, name in last.items()}


def load_sweep(folder: str | Path) -> pd.DataFrame:
    """The traces of a sweep's finished cells in one frame: `run` is what was swept, and each swept key is a column.

    Warns of cells that are not done. ValueError: no sweep was run there, or no cell is done.
    """
    cells = sweep_cells(folder)
    if missing := cells.loc[~cells["done"], "run"].tolist():
        warnings.warn(f"{folder}: cells that are not done are left out: {', '.join(missing)}", stacklevel=2)
    if len(missing) == len(cells):
        raise ValueError(f"{folder}: none of {len(cells)} cells is done; give the sweep's command again")
    keys = cells.columns[3:].tolist()
    finished = cells[cells["done"]].to_dict("records")
    frames = [
        load_trace(Path(folder) / cell["cell"]).assign(run=cell["run"], **{key: cell[key] for key in keys})
        for cell in finished
    ]
    frame = pd.concat(frames, ignore_index=True)
    frame.attrs["swept"] = keys
    return frame


def summary(frame: pd.DataFrame, baseline: str = BASELINE, seed: int = 0) -> pd.DataFrame:
    """`metrics.summary`, and of a sweep the swept keys behind `run`."""
    table = metrics.summary(frame, baseline, seed)
    settings = frame.drop_duplicates("run").set_index("run")
    for key in reversed(frame.attrs.get("swept", [])):
        table.insert(1, key, table["run"].map(settings[key]))
    return table


def best_drafter(table: pd.DataFrame, baseline: str = BASELINE, lossless_only: bool = True) -> pd.DataFrame:
    """The fastest method per run and task of a summary, the baseline included, and how sure that is.

    beats_plain: its interval lies above 1; beats_runner_up: its interval lies above the next drafter's. Both err on the
    side of doubt, and are pd.NA where an interval is missing. A lossy method competes only when asked to, as it changes
    the output.
    """
    table = table[table["speedup"].notna() & (table["lossless"] | (not lossless_only))]
    table = table.assign(method=method_labels(table))
    rows = []
    for (run, task), group in table.groupby(["run", "task"], sort=False):
        ranked = group.sort_values("speedup", ascending=False, kind="stable")
        best = ranked.iloc[0]
        rivals = ranked.iloc[1:]
        rivals = rivals[rivals["drafter"] != baseline]
        row = {"run": run, "task": task, "drafter": best["method"], "turns": best["turns"]}
        row |= {name: best[name] for name in ("speedup", "speedup_low", "speedup_high")}
        row["beats_plain"] = best["drafter"] != baseline and _above(best["speedup_low"], 1.0)
        row |= {"runner_up": None, "runner_up_speedup": np.nan, "beats_runner_up": True}
        if len(rivals):
            second = rivals.iloc[0]
            row |= {"runner_up": second["method"], "runner_up_speedup": second["speedup"]}
            row["beats_runner_up"] = _above(best["speedup_low"], second["speedup_high"])
        rows.append(row)
    sure = ["beats_plain", "beats_runner_up"]
    return pd.DataFrame(rows).astype({name: "boolean" for name in sure if rows})


def _above(low: float, other: float) -> Any:
    """Whether `low` is the larger one; pd.NA where either is not known."""
    return pd.NA if np.isnan(low) or np.isnan(other) else bool(low > other)


def _slope(counts: pd.Series, seconds: pd.Series) -> float:
    """Seconds per unit of `counts`: a line through the median of every count, weighted by its steps; not below 0."""
    points = seconds.groupby(counts).agg(["median", "size"])
    if len(points) < 2:
        return 0.0
    line = np.polyfit(points.index.to_numpy(float), points["median"], 1, w=np.sqrt(points["size"]))
    return max(float(line[0]), 0.0)


def _propose_slope(long: pd.DataFrame) -> float:
    """Seconds per draft position. A drafter of fixed depth shows one point only: its cost is taken as proportional."""
    if long["draft_depth"].nunique() > 1:
        return _slope(long["draft_depth"], long["propose_seconds"])
    return float(long["propose_seconds"].median() / max(int(long["draft_depth"].iloc[0]), 1))


def expected_speedup(frame: pd.DataFrame, baseline: str = BASELINE) -> pd.DataFrame:
    """What every draft depth k up to the measured one would give: METHOD, task, num_drafts, tau, step_seconds, speedup.

    tau(k) = 1 + sum of the survival s_i for i <= k = mean of min(num_accepted, k) + 1 over steps not cut short; s_i is
    the product of alpha_1..i where every step drafts that deep. A step's cost is the measured one, less the fitted cost
    per tree node (over all methods of the run) and per draft position (of this drafter) for what k leaves out. k = 0 is
    the baseline as measured. "all" pools steps. Columns also tokens_per_second = tau / step_seconds.
    """
    if shared := shared_runs(frame):
        raise ValueError(f"runs {shared} shared their machine, so their times say nothing; measure one run at a time")
    long = steps(frame)
    if long.empty:
        raise ValueError("every answer ended with its prefill, so no step was measured; raise max_new_tokens")
    parts = []
    for _, run in long.groupby("run", sort=False):
        per_node = _slope(run["num_nodes"], run["verify_seconds"])
        for (_, drafter, _), method in run.groupby(METHOD, sort=False):
            per_draft = _propose_slope(method)
            verifier = method["verifier"].iloc[0]
            plain = run[(run["drafter"] == baseline) & (run["verifier"] == verifier)]
            if drafter == baseline:
                continue
            for task in [*method["task"].unique(), ALL]:
                ours, theirs = (part if task == ALL else part[part["task"] == task] for part in (method, plain))
                parts.append(_by_depth(ours, theirs, per_node, per_draft).assign(task=task))
    if not parts:
        raise ValueError(f"the trace holds no drafter but {baseline!r}; run one that drafts")
    table = pd.concat(parts, ignore_index=True)
    return table[[*METHOD, "task", "num_drafts", "tau", "step_seconds", "tokens_per_second", "speedup"]]


def _by_depth(method: pd.DataFrame, plain: pd.DataFrame, per_node: float, per_draft: float) -> pd.DataFrame:
    """The rows of `expected_speedup` of one method's steps, beside the baseline's steps on the same task."""
    depth = method["draft_depth"]
    nodes_per_depth = (method["num_nodes"] - 1) / depth.clip(lower=1)
    whole = method.loc[method["whole"], "num_accepted"]
    plain_seconds = plain["step_seconds"].mean()  # NaN without a baseline
    rows = [(0, 1.0, plain_seconds)] if len(plain) else []
    for k in range(1, int(depth.max()) + 1):
        left_out = depth - depth.clip(upper=k)
        saved = per_node * (nodes_per_depth * left_out).mean() + per_draft * left_out.mean()
        rows.append((k, whole.clip(upper=k).mean() + 1, method["step_seconds"].mean() - saved))
    table = pd.DataFrame(rows, columns=["num_drafts", "tau", "step_seconds"])
    table["tokens_per_second"] = table["tau"] / table["step_seconds"]
    table["speedup"] = table["tokens_per_second"] * plain_seconds
    return table.assign(**{name: method[name].iloc[0] for name in METHOD})


def best_num_drafts(expected: pd.DataFrame) -> pd.DataFrame:
    """The row of `expected_speedup` with the most tokens per second for every method and task; 0 = do not draft."""
    best = expected.groupby([*METHOD, "task"], sort=False)["tokens_per_second"].idxmax()
    return expected.loc[best].reset_index(drop=True)


def picture(run: str | Path) -> Path:
    """Draw RUN/results.png: speed-up by task, acceptance rate by position, time of a step. Returns its path.

    A run without speeds (no baseline, or a shared machine) shows acceptance lengths and accepted drafts instead.
    """
    folder = Path(run)
    frame = load_trace(folder)
    table = summary(frame)
    methods = frame.drop_duplicates(METHOD).shape[0]
    height = 1.2 + table["task"].nunique() * max(0.42, 0.15 * methods)
    figure = Figure(figsize=(11, height + 4.2), dpi=140)
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    axes = figure.subplot_mosaic([["speed", "speed"], ["rate", "time"]], height_ratios=[height, 3.6])
    timed = table["speedup"].notna().any()
    (plot_speedup if timed else plot_length)(table, ax=axes["speed"])
    plot_acceptance(frame, ax=axes["rate"])
    (plot_breakdown if timed else plot_steps)(frame, ax=axes["time"])
    if (legend := axes["rate"].get_legend()) is not None:
        legend.remove()  # the colours are those above
    figure.suptitle(_title(folder, frame), fontsize=12, x=0.01, ha="left")
    unfinished = folder / "results.png.part"
    figure.savefig(unfinished, format="png")
    unfinished.replace(folder / "results.png")
    return folder / "results.png"


def _title(folder: Path, frame: pd.DataFrame) -> str:
    """Run, verifier, batch and, where the run folder says so, the hardware."""
    verifiers = ", ".join(frame["verifier"].unique())
    batches = ", ".join(str(size) for size in sorted(frame["batch_size"].unique()))
    title = f"{folder.resolve().name}: verifier {verifiers}, batch size {batches}"
    environment = folder / "environment.json"
    if environment.exists():
        facts = json.loads(environment.read_text())
        title += f", {facts['gpu'] or facts['cpu']}"
    return title
