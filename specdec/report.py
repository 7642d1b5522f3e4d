"""A summary as text: rich tables for the terminal, one Markdown table for files. Shows numbers, computes none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from specdec.metrics import ALL, LEAST, method_labels

WIDE = 110  # columns of a terminal from which on the rates stand beside the rest
POSITIONS = 8  # acceptance rates shown; metrics.json has them all
MISSING = "–"
RATES = "accept rate by position"
COLUMNS = ["turns", "accept length", "tok/s", "speed-up", "equal"]  # that every layout has
POOLED = "all: accept length is the mean over tasks, everything else pools their requests"
HINT = (
    f"[ ]: 95% interval, from {LEAST} requests on; {POOLED}; what the columns mean stands in the run folder's table.md"
)
LEGEND = {
    "turns": "of users that were answered; a conversation has one or more.",
    "accept length": "tokens per target forward, the recovered or bonus token included; the prefill's token and steps "
    "cut short left out; all = mean over tasks.",
    RATES: "share accepted at position 1, 2, ... of the drafts whose predecessors were accepted; all = all drafts pooled.",
    "tok/s": "decode tokens per second of decode time, prefill apart; none where runs shared the machine.",
    "speed-up": "tok/s over that of no drafting (none) on the same requests; all = all requests pooled.",
    "equal": "requests whose tokens equal those of no drafting.",
    "[ ]": f"95% bootstrap interval over requests, none below {LEAST} of them; lossy: this acceptance rule changes the "
    "output's law.",
}
QUALITY = {  # shown where log-probabilities were kept
    "nll": "mean negative log-probability, in nats, of an emitted token under the target at temperature 1; lower is "
    "likelier, not better.",
    "nll excess": "nll less that of no drafting (none) on the same requests; of a lossless rule only chance moves it off 0.",
}


def _interval(row: pd.Series, name: str) -> str:
    """`1.52 [1.47, 1.58]`; no bracket where there is no interval or, as for the baseline, no spread at all."""
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if pd.isna(value):
        return MISSING
    return f"{value:z.2f}" if pd.isna(low) or low == high else f"{value:z.2f} [{low:z.2f}, {high:z.2f}]"


def _rates(row: pd.Series) -> str:
    """`.71 .62 .55`: the conditional acceptance rates, as many as there are."""
    names = [name for name in row.index if str(name).startswith("alpha_") and not pd.isna(row[name])]
    shown = " ".join(f"{row[name]:.2f}".removeprefix("0") for name in names[:POSITIONS])
    return (shown + " …" if len(names) > POSITIONS else shown) or MISSING


def _number(value: Any) -> str:
    """Three figures that matter; a dash where nothing was measured."""
    if pd.isna(value):
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _equal(row: pd.Series) -> str:
    return f"{row['requests_equal']}/{row['requests_compared']}" if row["requests_compared"] else MISSING


def _methods(summary: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each method's label and its rows, in the summary's order."""
    labels = method_labels(summary)
    for label, rows in summary.groupby(labels, sort=False):
        yield str(label), rows


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    """A method's rows, without "all" where it would repeat the only task."""
    return rows.iloc[:1] if len(rows) == 2 else rows


def values(row: pd.Series) -> list[str]:
    """COLUMNS of one row, as text."""
    length, speed = _interval(row, "tau"), _interval(row, "speedup")
    return [str(row["turns"]), length, _number(row["tokens_per_second"]), speed, _equal(row)]


def quality(row: pd.Series) -> list[str]:
    """nll, nll excess."""
    return [_interval(row, "nll"), _interval(row, "nll_excess")]


def _equal_style(row: pd.Series) -> str:
    """Set off where a lossless method left plain output: its noise, its arithmetic or a fault."""
    return "yellow" if row["lossless"] and row["requests_equal"] < row["requests_compared"] else ""


def _table(headers: list[str]) -> Table:
    """An empty table; on a narrow terminal the names wrap and the numbers stay whole."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("drafter / task", overflow="fold")
    for header in headers:
        table.add_column(header, justify="left" if header == RATES else "right", no_wrap=True)
    return table


def tables(summary: pd.DataFrame, width: int = 120) -> list[Table]:
    """One table where `width` columns hold the rates beside the rest, else a second one for the rates."""
    wide = width >= WIDE
    main = _table([*COLUMNS[:2], RATES, *COLUMNS[2:]] if wide else COLUMNS)
    rates = _table([RATES])
    for label, rows in _methods(summary):
        drafts = _rates(rows.iloc[-1]) != MISSING
        main.add_row(Text(label, style="bold cyan"))
        if drafts:
            rates.add_row(Text(label, style="bold cyan"))
        for _, row in _shown(rows).iterrows():
            cells: list[RenderableType] = list(values(row))
            cells[-1] = Text(_equal(row), style=_equal_style(row))
            if wide:
                cells.insert(2, _rates(row))
            style = "bold" if row["task"] == ALL else ""
            main.add_row(f"  {row['task']}", *cells, style=style)
            if drafts:
                rates.add_row(f"  {row['task']}", _rates(row), style=style)
        main.add_section()
        rates.add_section()
    shown = [main] if wide or not rates.row_count else [main, rates]
    return [*shown, _quality_table(summary)] if "nll" in summary else shown


def _quality_table(summary: pd.DataFrame) -> Table:
    """What was written, beside what it gained."""
    table = _table(list(QUALITY))
    for label, rows in _methods(summary):
        table.add_row(Text(label, style="bold cyan"))
        for _, row in _shown(rows).iterrows():
            table.add_row(f"  {row['task']}", *quality(row), style="bold" if row["task"] == ALL else "")
        table.add_section()
    return table


def _legend(summary: pd.DataFrame) -> dict[str, str]:
    """The columns that are shown, and what they mean."""
    return LEGEND | QUALITY if "nll" in summary else LEGEND


def print_summary(summary: pd.DataFrame, console: Console | None = None) -> None:
    """The tables, fitted to the console's width, what the run folder notes of the speeds, and what the columns mean."""
    console = console or Console()
    for table in tables(summary, console.width):
        console.print(table)
    if note := summary.attrs.get("note"):
        console.print(Text(note, style="yellow"))
    console.print(Text(HINT, style="dim"))


def acceptance(summary: pd.DataFrame, drafter: str) -> str:
    """What one drafter's drafts were worth, by task, as a Markdown table: nothing that depends on the machine."""
    lines = [f"| task | turns | accept length | {RATES} | equal |", "|---|---:|---:|---|---:|"]
    for _, row in summary[summary["drafter"] == drafter].iterrows():
        cells = [row["task"], str(row["turns"]), _interval(row, "tau"), _rates(row), _equal(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def markdown(summary: pd.DataFrame) -> str:
    """The same as one GitHub table, a row per drafter and task, followed by the meaning of the columns."""
    headers = ["drafter", "task", *COLUMNS[:2], RATES, *COLUMNS[2:]]
    headers += QUALITY if "nll" in summary else []
    lines = ["| " + " | ".join(headers) + " |", "|---|---|" + "---:|" * 2 + "---|" + "---:|" * (len(headers) - 5)]
    for label, rows in _methods(summary):
        for _, row in _shown(rows).iterrows():
            cells = [label, str(row["task"]), *values(row)]
            cells.insert(4, _rates(row))
            cells += quality(row) if "nll" in summary else []
            escaped = (cell.replace("|", "\\|") for cell in cells)
            lines.append("| " + " | ".join(escaped) + " |")
    legend = [f"- **{name}**: {meaning}" for name, meaning in _legend(summary).items()]
    return "\n".join([*lines, "", *legend]) + "\n"
