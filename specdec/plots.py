"""Figures of a run. Each draws into `ax` or into a new figure and returns the figure; no pyplot, no display needed.

Colours are Okabe and Ito's, told apart by most colour-blind readers; markers repeat what the colour says.
"""

from __future__ import annotations

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specdec.metrics import ALL, BASELINE, METHOD, acceptance_by_position, breakdown, method_labels, steps

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
PARTS = {"propose": "#E69F00", "verify": "#0072B2", "accept": "#CC79A7", "host": "#BBBBBB"}
WHOLE = "#56B4E9"  # a step in one piece
FEW = 30  # drafts; below that a rate is drawn hollow
LABEL = 28  # characters of a label's line; a drafter with settings has a long one


def new_axes(width: float = 7, height: float = 4) -> Axes:
    """The one axes of a new figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained", dpi=120).subplots()


def _figure(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def _clean(ax: Axes, title: str, grid: str) -> None:
    """No frame, a faint grid, the title at the left."""
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x" if grid == "x" else "y", color="#DDDDDD", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9)


def _legend(ax: Axes) -> None:
    """The legend beside the axes, where no mark of it can be taken for a measurement."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        labels = [fill(label, LABEL) for label in labels]
        corner = (1.0, 1.0)
        ax.legend(handles, labels, frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=corner, handlelength=1.2)


def _styles(table: pd.DataFrame, baseline: str) -> dict[str, tuple[str, str]]:
    """(colour, marker) of every method but the baseline, by label, in the table's order."""
    labels = method_labels(table)[table["drafter"] != baseline].unique()
    return {label: (COLOURS[i % 7], MARKERS[i % 7]) for i, label in enumerate(labels)}


def _labelled(table: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """A table indexed or keyed by METHOD, with the lossless flag and the method's label."""
    lossless = frame.groupby(METHOD, sort=False)["lossless"].all().reset_index()
    table = lossless.merge(table, on=METHOD)  # methods in the order of the trace
    return table.assign(label=method_labels(table))


def plot_speedup(summary: pd.DataFrame, ax: Axes | None = None, baseline: str = BASELINE) -> Figure:
    """Speed-up over no drafting by task: a point and its 95% interval per method, "all" set apart below."""
    figure = _by_task(summary, "speedup", ax, baseline)
    ax = ax or figure.axes[0]
    ax.set_xlabel("decode tokens/s relative to no drafting (dashed line = 1), with 95% interval over requests")
    _clean(ax, "Speed-up by task", "x")
    return figure


def plot_length(summary: pd.DataFrame, ax: Axes | None = None, baseline: str = BASELINE) -> Figure:
    """Acceptance length by task, drawn like `plot_speedup`; it needs neither a baseline nor a quiet machine."""
    figure = _by_task(summary, "tau", ax, baseline)
    ax = ax or figure.axes[0]
    ax.set_xlabel("tokens per target forward (dashed line = 1: no drafting), with 95% interval over requests")
    _clean(ax, "Acceptance length by task", "x")
    return figure


def _by_task(summary: pd.DataFrame, name: str, ax: Axes | None, baseline: str) -> Figure:
    """Points of one summary column and their intervals, a row per task. ValueError: the table is no summary."""
    if name not in summary:
        raise ValueError(f"this table is no summary, it lacks {name}: give what analysis.summary returns")
    tasks = list(summary["task"].unique())
    tasks = tasks[:1] if len(tasks) == 2 else tasks  # of one task, "all" would repeat it
    summary = summary[summary["task"].isin(tasks)]
    styles = _styles(summary, baseline)
    pitch = 0.8 / max(len(styles), 1)
    ax = ax or new_axes(8, 1.6 + len(tasks) * max(0.5, 0.18 * len(styles)))
    labels = method_labels(summary)
    for number, (label, (colour, marker)) in enumerate(styles.items()):
        rows = summary[labels == label].dropna(subset=name)
        y = np.array([tasks.index(task) for task in rows["task"]]) + (number - (len(styles) - 1) / 2) * pitch
        low, high = rows[f"{name}_low"].fillna(rows[name]), rows[f"{name}_high"].fillna(rows[name])
        ax.hlines(y, low, high, color=colour, linewidth=2)
        ax.plot(rows[name], y, marker, color=colour, markersize=6, label=label)
    if ALL in tasks:
        ax.axhline(tasks.index(ALL) - 0.5, color="#888888", linewidth=0.7)
    ax.axvline(1, color="black", linewidth=1, linestyle="--")
    ax.set_yticks(range(len(tasks)), [f"{task} (n={_turns(summary, task)})" for task in tasks])
    ax.set_ylim(len(tasks) - 0.5, -0.5)
    _legend(ax)
    return _figure(ax)


def _turns(summary: pd.DataFrame, task: str) -> str:
    """The number of turns behind a task's points, or its range when methods differ."""
    turns = summary.loc[summary["task"] == task, "turns"]
    return f"{turns.min()}" if turns.nunique() == 1 else f"{turns.min()}–{turns.max()}"


def plot_acceptance(frame: pd.DataFrame, task: str = ALL, ax: Axes | None = None) -> Figure:
    """Acceptance rate alpha by draft position of one task (all: pooled); hollow where under 30 drafts were judged."""
    ax = ax or new_axes()
    table = _labelled(acceptance_by_position(frame), frame)
    styles = _styles(table, BASELINE)
    table = table[table["task"] == task]
    for label, (colour, marker) in styles.items():
        rows = table[table["label"] == label]
        few = rows["reached"] < FEW
        ax.plot(rows["position"], rows["rate"], color=colour, linewidth=1.5)
        ax.plot(rows["position"][~few], rows["rate"][~few], marker, color=colour, label=label)
        ax.plot(rows["position"][few], rows["rate"][few], marker, color=colour, markerfacecolor="white")
    ax.set_ylim(0, 1.02)
    ax.set_xticks(sorted(table["position"].unique()))
    ax.set_xlabel(f"position in the draft (hollow: under {FEW} drafts judged)")
    ax.set_ylabel("accepted, given all before were")
    _clean(ax, "Acceptance rate by position" + ("" if task == ALL else f", {task}"), "y")
    _legend(ax)
    return _figure(ax)


def plot_steps(frame: pd.DataFrame, task: str = ALL, ax: Axes | None = None) -> Figure:
    """Histogram: the share of decode steps that accepted 0, 1, 2, ... drafts, a bar per method."""
    ax = ax or new_axes()
    long = steps(frame if task == ALL else frame[frame["task"] == task])
    counts = long.groupby([*METHOD, "num_accepted"], sort=False).size().rename("steps").reset_index()
    counts = _labelled(counts, frame)
    styles = _styles(counts, BASELINE)
    width = 0.8 / max(len(styles), 1)
    for number, (label, (colour, _)) in enumerate(styles.items()):
        rows = counts[counts["label"] == label]
        x = rows["num_accepted"] + (number - (len(styles) - 1) / 2) * width
        share = rows["steps"] / rows["steps"].sum()
        ax.bar(x, share, width, color=colour, label=f"{label} ({rows['steps'].sum():,} steps)")
    ax.set_xticks(range(long["num_accepted"].max() + 1 if len(long) else 1))
    ax.set_xlabel("drafts accepted in a step")
    ax.set_ylabel("share of steps")
    _clean(ax, "Accepted drafts per step" + ("" if task == ALL else f", {task}"), "y")
    _legend(ax)
    return _figure(ax)


def plot_breakdown(frame: pd.DataFrame, task: str = ALL, ax: Axes | None = None) -> Figure:
    """Where a step's time goes, a bar per method: propose, verify, accept, host.

    Lengths are steps of the baseline where the run has one, else ms. A CUDA graph is one piece, without parts.
    """
    ax = ax or new_axes()
    table = breakdown(frame).reset_index()
    table = _labelled(table[table["task"] == task], frame)
    y = np.arange(len(table))
    left = np.zeros(len(table))
    plain = table.loc[table["drafter"] == BASELINE, "seconds_per_step"]
    unit, unit_name = (1 / plain.iloc[0], f"steps of {BASELINE}") if len(plain) == 1 else (1000.0, "ms")
    for part, colour in PARTS.items():
        values = unit * (table[part] * table["seconds_per_step"]).fillna(0).to_numpy()
        ax.barh(y, values, left=left, color=colour, height=0.6, label=part)
        left += values
    whole = table["verify"].isna().to_numpy()
    if whole.any():
        left = np.where(whole, unit * table["seconds_per_step"].fillna(0), left)
        ax.barh(y[whole], left[whole], color=WHOLE, height=0.6, label="one graph")
    for row, total in enumerate(left):
        text = "" if whole[row] else f" {1 - table['verify'].iloc[row]:.0%} overhead"
        ax.text(total, row, text, va="center", fontsize=9)
    ax.set_xlim(0, 1.45 * (max(left, default=0) or 1))
    ax.set_yticks(y, [fill(label, LABEL) for label in table["label"]])
    ax.invert_yaxis()
    ax.set_xlabel(f"time of a decode step, in {unit_name} (overhead: all but verify)")
    _clean(ax, "Time of a step" + ("" if task == ALL else f", {task}"), "x")
    _legend(ax)
    return _figure(ax)
