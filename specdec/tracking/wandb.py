"""A copy of a finished run folder in Weights & Biases. The folder stays the source, so no outage can cost a run.

The copy is always recorded offline under RUN/wandb first, which needs no network; where it is to go online, a bounded
`wandb sync` uploads that record, and may fail or be repeated later.
"""

from __future__ import annotations

import json
import netrc
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import pandas as pd
import wandb
from omegaconf import OmegaConf

from specdec import metrics

Mode = Literal["auto", "online", "offline", "disabled"]
FILES = [
    "config.yaml", "environment.json", "trace.jsonl", "output.jsonl", "train.jsonl", "metrics.json", "table.md",
    "results.png",
]  # fmt: skip
SCALARS = [
    "tau", "tau_low", "tau_high", "acceptance_rate", "tokens_per_second", "speedup", "speedup_low", "speedup_high",
    "equal", "nll", "nll_low", "nll_high", "nll_excess", "nll_excess_low", "nll_excess_high",
]  # fmt: skip
OUTAGE = (wandb.errors.Error, OSError, subprocess.SubprocessError)  # OSError: ConnectionError and TimeoutError too


class WandbTracker:
    """Copies config, tables, histograms, the picture and the trace. ValueError: a mode that does not exist."""

    def __init__(
        self,
        project: str = "specdec",
        mode: Mode = "auto",
        group: str | None = None,
        tags: Sequence[str] = (),
        timeout: float = 60,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"tracking.mode is {mode!r}; choose one of {', '.join(get_args(Mode))}")
        self.project, self.mode, self.group, self.tags, self.timeout = project, mode, group, list(tags), timeout

    def log(self, folder: Path, group: str | None = None) -> str | None:
        """Copy a finished run folder: the page's address when online, else the offline record; None without a copy.

        `group` is the run's group in W&B unless the config names one.
        Warns, and never raises, when W&B cannot be reached, refuses the key or the record cannot be written.
        """
        mode = self._mode()
        if mode == "disabled":
            return None
        folder = Path(folder)
        try:
            with _kept_inside(folder):
                record = self._record(folder, self.group or group)
        except OUTAGE as error:
            warnings.warn(f"no W&B copy of {folder} ({_sentence(error)}); the run itself is complete", stacklevel=2)
            return None
        if mode == "offline":
            return str(record)
        try:
            return self._sync(folder, record)
        except OUTAGE as error:
            remedy = f"`wandb sync {record}` uploads it later"
            warnings.warn(f"W&B has no copy of {folder} yet ({_sentence(error)}); {remedy}", stacklevel=2)
            return str(record)

    def _mode(self) -> str:
        """auto: WANDB_MODE if it is set, online with an API key, offline without one."""
        if self.mode != "auto":
            return self.mode
        return os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")

    def _record(self, folder: Path, group: str | None) -> Path:
        """Write the run to RUN/wandb/offline-run-*; returns that directory."""
        settings = wandb.Settings(
            silent=True, quiet=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True
        )
        run = wandb.init(
            project=self.project,
            group=group,
            tags=self.tags,
            name=folder.resolve().name,
            config=_config(folder),
            dir=folder,
            mode="offline",
            reinit="create_new",
            settings=settings,
        )
        try:
            last = 0
            for last, values in _curves(folder):
                run.log(values, step=last)
            run.log(_content(folder), step=last)
            for name in FILES:
                if (folder / name).exists():  # copied first: wandb links files from elsewhere, and links break
                    inside = shutil.copy2(folder / name, run.dir)
                    run.save(inside, base_path=run.dir, policy="now")
            return Path(run.dir).parent
        finally:
            run.finish()

    def _sync(self, folder: Path, record: Path) -> str:
        """Upload an offline record within `timeout` seconds; its address, or the record where W&B names none.

        `wandb sync` ends with status 0 after a refused key; only its marker file says that all arrived.
        """
        log = folder / "wandb" / "sync.log"
        command = [sys.executable, "-m", "wandb", "sync", str(record.resolve())]
        with _kept_inside(folder), open(log, "w") as output:
            subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=self.timeout,
                check=True,
            )
        if not list(record.glob("*.wandb.synced")):
            raise wandb.errors.CommError("`wandb sync` did not finish, see wandb/sync.log")
        addresses = [word for word in log.read_text().split() if word.startswith("http") and "/runs/" in word]
        return addresses[-1] if addresses else str(record)


def has_api_key() -> bool:
    """Whether WANDB_API_KEY or the netrc file holds a key; it is not read further, let alone kept."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    place = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return place.exists() and netrc.netrc(str(place)).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError) as error:
        warnings.warn(f"{place} cannot be read ({error}); the W&B copy stays offline", stacklevel=2)
        return False


def _config(folder: Path) -> dict[str, Any]:
    """The run's config and, under `environment`, what it ran on."""
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(config, dict)
    return {**{str(key): value for key, value in config.items()}, "environment": _facts(folder)}


def _facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "environment.json").read_text())
    return facts


def _curves(folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """What a training run measured, by step: train/loss, a number a depth such as train/accuracy/1, heldout/loss, tau/TASK."""
    path = folder / "train.jsonl"
    for row in metrics.read_rows(path)[0] if path.exists() else []:
        step, lengths, heldout = row.pop("step"), row.pop("tau", {}), row.pop("heldout", {})
        values = {f"tau/{task}": value[0] for task, value in lengths.items() if value[0] is not None}
        for group, measured in (("train", row), ("heldout", heldout)):
            for name, value in measured.items():
                several = value if isinstance(value, list) else None
                values |= {f"{group}/{name}/{i}": x for i, x in enumerate(several or (), 1)}
                values |= {f"{group}/{name}": value} if several is None else {}
        yield step, values


def _content(folder: Path) -> dict[str, Any]:
    """Scalars `drafter/task/name` for comparing runs, the two tables, a histogram per method, the picture.

    By position `drafter/task/acceptance_rate/1` and so on.
    """
    result = json.loads((folder / "metrics.json").read_text())
    summary, positions = pd.DataFrame(result["summary"]), pd.DataFrame(result["acceptance_by_position"])
    content: dict[str, Any] = {
        "summary": wandb.Table(dataframe=summary),
        "acceptance_by_position": wandb.Table(dataframe=positions),
    }
    for label, row in zip(metrics.method_labels(summary), result["summary"], strict=True):
        here = {name: row.get(name) for name in SCALARS}
        for at in result["acceptance_by_position"]:
            if all(at[name] == row[name] for name in [*metrics.METHOD, "task"]):
                here[f"acceptance_rate/{at['position']}"] = at["acceptance_rate"]
        content |= {f"{label}/{row['task']}/{name}": value for name, value in here.items() if value is not None}
    frame = metrics.load_trace(folder)
    for label, rows in frame.groupby(metrics.method_labels(frame), sort=False):
        content[f"{label}/num_accepted"] = wandb.Histogram(metrics.steps(rows)["num_accepted"].tolist())
    if (folder / "results.png").exists():
        content["results"] = wandb.Image(str(folder / "results.png"))
    return content


@contextmanager
def _kept_inside(folder: Path) -> Iterator[None]:
    """Let W&B stage and cache under RUN/wandb, so that an offline record is whole when the folder moves."""
    inside = {name: str((folder / "wandb" / "data").resolve()) for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")}
    before = {name: os.environ.get(name) for name in inside}
    os.environ.update(inside)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _sentence(error: BaseException) -> str:
    """The first line of an error; for a sync that failed, where its output lies."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer within {error.timeout:.0f} s"
    if isinstance(error, subprocess.CalledProcessError):
        return "`wandb sync` failed, see wandb/sync.log"
    return (str(error).splitlines() or [type(error).__name__])[0]
