"""The end of a sweep: one table over its cells.

SWEEP_DIR/cells.jsonl             a line per cell, written as it ends
SWEEP_DIR/table.md, results.csv   a row per finished cell and drafter, over all tasks
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

TABLE, RESULTS = "table.md", "results.csv"
NAME = 6  # characters of a name's line in a narrow terminal
NOTE = (
    "Over all tasks (accept length: their mean; everything else: their requests pooled), with 95% intervals over requests; "
    "every cell's own table.md says what the columns mean."
)
BEST, FASTEST = "best", "fastest"
DOUBT = "fastest: not beyond doubt, as its interval does not lie above 1 and above every other lossless row's."


class Cells(Callback):  # type: ignore[misc]
    """Hydra's callback: writes cells.jsonl, in whatever process a cell runs, and knows which sweep this process began."""

    folder: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """What an earlier command left goes, but for the cells themselves."""
        from specdec.analysis import CELLS

        Cells.folder = Path(config.hydra.sweep.dir)
        for name in (CELLS, TABLE, RESULTS):
            (Cells.folder / name).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """A line in one piece: cells side by side share the file."""
        from specdec.analysis import CELLS

        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.sweep.dir)
        line = {
            "number": config.hydra.job.num,
            "cell": os.path.relpath(config.hydra.runtime.output_dir, folder),
            "done": job_return.status == JobStatus.COMPLETED,
            "settings": dict(_setting(override) for override in job_return.overrides),
        }
        with open(folder / CELLS, "a") as file:
            file.write(json.dumps(line) + "\n")


def _setting(override: str) -> tuple[str, Any]:
    """Key and value of KEY=VALUE; a list, a mapping and null as they were written."""
    parsed = OverridesParser.create().parse_override(override)
    value = parsed.value()
    plain = isinstance(value, str | int | float)
    return parsed.get_key_element().lstrip("+~"), value if plain else parsed.get_value_element_as_str()


def end_sweep(console: Console) -> None:
    """One table over the finished cells of the sweep that this process began, if it began one: printed, and kept there."""
    folder, Cells.folder = Cells.folder, None
    if folder is None:
        return
    from specdec import analysis
    from specdec.tracking.environment import command

    if not (folder / analysis.CELLS).exists():  # no cell was begun
        return
    cells = analysis.sweep_cells(folder)
    missing = cells.loc[~cells["done"], "run"].tolist()
    sentence = f"{len(missing)} of {len(cells)} cells are not done: {', '.join(missing)}."
    if len(missing) < len(cells):
        results, busy = _results(folder, cells)
        results.to_csv(folder / RESULTS, index=False)
        headers, rows = _as_text(results, cells.columns[3:].tolist())
        notes = [DOUBT] if any(row[-1] == FASTEST for row in rows) else []
        notes += [busy] if busy else []
        lines = [f"# {folder.resolve().name}", "", f"`{command(sys.argv)}`", "", *_markdown(headers, rows), "", NOTE]
        (folder / TABLE).write_text("\n".join([*lines, *notes, *([sentence] if missing else []), ""]))
        console.print(_table(headers, rows, console.width), crop=False)
        for note in notes:
            console.print(Text(note))
        console.print(Text(f"sweep: {folder / TABLE}, {folder / RESULTS}"), soft_wrap=True)
    if missing:
        console.print(Text(sentence), soft_wrap=True)


def _results(folder: Path, cells: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """What the finished cells measured over all tasks, a row per cell and drafter, their settings in front; a busy note."""
    import pandas as pd

    from specdec.metrics import ALL
    from specdec.tracking.environment import busy_note

    rows, environments = [], []
    for cell in cells[cells["done"]].to_dict("records"):
        measured = json.loads((folder / cell.pop("cell") / "metrics.json").read_text())
        environments.append(measured["environment"])
        for row in measured["summary"]:
            if row["task"] == ALL:
                numbers = {name: math.nan if value is None else value for name, value in row.items()}
                rows.append({**cell, **numbers, "run": cell["run"]})
    return pd.DataFrame(rows).drop(columns=["done", "task"]), busy_note(*environments)


def _as_text(results: pd.DataFrame, settings: list[str]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: settings, drafter, what `report` shows of a row, and BEST or FASTEST at the fastest lossless one."""
    from specdec import metrics, report

    drafted = results[results["drafter"] != metrics.BASELINE]
    table = drafted if len(drafted) else results
    labels = metrics.method_labels(table.assign(run=""))
    quality = [*report.QUALITY] if "nll" in table else []
    headers = [*settings, "drafter", *report.COLUMNS[1:], *quality, ""]
    rows = []
    for label, mark, (_, row) in zip(labels, _marks(table, metrics.BASELINE), table.iterrows(), strict=True):
        values = report.values(row)[1:] + (report.quality(row) if quality else [])
        rows.append([*(str(row[name]) for name in settings), label, *values, mark])
    return headers, rows


def _marks(table: pd.DataFrame, baseline: str) -> list[str]:
    """Of several rows the fastest lossless one is BEST where its interval leaves no doubt, else FASTEST."""
    ranked = table[table["lossless"].astype(bool) & table["speedup"].notna() & (table["drafter"] != baseline)]
    ranked = ranked.sort_values("speedup", ascending=False)
    marks = dict.fromkeys(table.index, "")
    if len(table) > 1 and len(ranked):
        low, others = ranked["speedup_low"].iloc[0], ranked["speedup_high"].iloc[1:]
        marks[ranked.index[0]] = BEST if low > 1 and others.lt(low).all() else FASTEST  # NaN: no interval, so in doubt
    return list(marks.values())


def _names(headers: list[str]) -> list[str]:
    """The columns before the numbers."""
    return headers[: headers.index("drafter") + 1]


def _table(headers: list[str], rows: list[list[str]], width: int) -> Table:
    """For the terminal. Names wrap, where a space stands for _; where numbers do not fit, the terminal wraps the lines."""
    names = _names(headers)
    lengths = {column[0]: max(map(len, column)) for column in zip(headers, *rows, strict=True)}
    least = sum(2 + (min(length, NAME) if header in names else length) for header, length in lengths.items())
    whole = sum(2 + length for length in lengths.values()) if least > width else None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, width=whole)
    for header in headers:
        kind: Any = {"overflow": "fold"} if header in names else {"no_wrap": True, "justify": "right"}
        table.add_column(header.replace("_", " "), **kind)
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if row[-1] == BEST else "")
    return table


def _markdown(headers: list[str], rows: list[list[str]]) -> list[str]:
    """For the file."""
    names = len(_names(headers))
    rule = "|" + "---|" * names + "---:|" * (len(headers) - names)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (headers, *rows)]
    return [lines[0], rule, *lines[1:]]
