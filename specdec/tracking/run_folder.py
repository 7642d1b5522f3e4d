"""The folder of a run: what was asked, on what, and every finished request, safe on disk before the next one starts.

config.yaml, environment.json    written before anything is measured
trace.jsonl                      one line per finished request and method; the only source of numbers
output.jsonl                     the same requests and what was said, to be read
metrics.json, table.md, results.png, trace.parquet, DONE    derived from the above, at any time again
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from specdec import metrics, report
from specdec.analysis import picture
from specdec.tracking.environment import busy_note, busy_share, environment

Key = tuple[str, str, int, int, int]  # drafter, verifier, request, turn, pass
FULL = (errno.ENOSPC, errno.EDQUOT)
UNDRAWABLE = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)  # what a picture may end with


class RunError(RuntimeError):
    """A run that cannot go on; the message names the folder, what was kept and the remedy."""


class RunFolder:
    """An open run folder. Creates it, or goes on with one of the same config; a context manager.

    `ignore` names top-level config keys that may differ between the parts of an interrupted run. RunError: the folder
    holds other things, the config differs, another process writes there, the disk refuses. ValueError: the trace is
    damaged before its last line.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict[str, Any] | DictConfig,
        argv: Sequence[str] | None = None,
        ignore: Sequence[str] = ("tracking",),
    ) -> None:
        self.path = Path(path)
        argv = sys.argv if argv is None else argv
        with self._disk("nothing was measured yet"):
            self._claim()
            self._trace = open(self.path / "trace.jsonl", "ab", buffering=0)  # noqa: SIM115  closed by close()
        try:
            self._lock()
            with self._disk("what it held is untouched"):
                self._begin(config, argv, ignore)
                self._keys = self._repair()
        except BaseException:
            self._trace.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others write here. Nothing is pending: every row is on disk already."""
        self._trace.close()

    @property
    def done(self) -> bool:
        """Whether the run is complete, derived files included."""
        return (self.path / "DONE").exists()

    def finished(self) -> set[Key]:
        """(drafter, verifier, request, turn, pass) of every row in the trace; an interrupted run skips these."""
        return set(self._keys)

    def append(self, row: Mapping[str, Any]) -> None:
        """Put one row on disk, whole or not at all. RunError when the disk refuses."""
        key = _key(row)
        if key in self._keys:
            raise ValueError(f"{self.path}: {dict(zip(metrics.KEY, key, strict=True))} is in the trace already")
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        start = os.fstat(self._trace.fileno()).st_size
        with self._disk(f"{len(self._keys)} finished rows are kept in trace.jsonl"):
            try:
                self._write(line)
            except OSError:
                os.ftruncate(self._trace.fileno(), start)
                raise
        self._keys.add(key)

    def write_answers(self, answers: Iterable[Mapping[str, Any]], anew: bool = False) -> None:
        """Add lines to output.jsonl; `anew`: in place of those there. RunError when the disk refuses."""
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
        with (
            self._disk(f"{len(self._keys)} finished rows are kept in trace.jsonl"),
            open(self.path / "output.jsonl", "w" if anew else "a", encoding="utf-8") as file,
        ):
            file.writelines(lines)

    def finish(self) -> pd.DataFrame:
        """Derive everything from the trace, then mark the run as done. Returns the summary."""
        with self._disk("every measurement is kept in trace.jsonl"):
            summary = derive(self.path)
            write_atomic(self.path / "DONE", environment([])["date"] + "\n")
        return summary

    def _write(self, line: bytes) -> None:
        """All bytes, then fsync; an unbuffered file may take a part at a time."""
        rest = memoryview(line)
        while rest:
            rest = rest[self._trace.write(rest) :]
        os.fsync(self._trace.fileno())

    def _claim(self) -> None:
        """Make the folder. RunError where it holds files, and none of them is the trace that every run begins with."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file: name a folder of the run's own, as in run_dir=runs/NAME")
        if (self.path / "trace.jsonl").exists():
            return
        if self.path == Path():
            raise RunError(
                "run_dir is empty or the current folder: name a folder of the run's own, as in run_dir=runs/NAME"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if found := next(self.path.iterdir(), None):
            raise RunError(
                f"{self.path} is no run folder, it holds {found.name} and no trace.jsonl: give another run_dir"
            )

    def _lock(self) -> None:
        """One writer a folder; the lock dies with its process."""
        try:
            fcntl.flock(self._trace.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{self.path} is in use by another run; wait for it or choose another folder") from error

    def _begin(self, config: dict[str, Any] | DictConfig, argv: Sequence[str], ignore: Sequence[str]) -> None:
        """Write config and environment, or check them against those of the part that was interrupted."""
        place, facts = self.path / "config.yaml", {**environment(argv), "busy": busy_share()}
        text = OmegaConf.to_yaml(OmegaConf.create(config), resolve=True)
        empty = os.fstat(self._trace.fileno()).st_size == 0
        if not place.exists() or empty:  # a run that measured nothing binds nobody to its config
            if not empty:
                raise RunError(f"{self.path} holds a trace but no config.yaml; choose another folder")
            write_atomic(self.path / "environment.json", json.dumps({**facts, "resumed": []}, indent=2) + "\n")
            write_atomic(place, text)
            return
        if differ := _differences(_without(place.read_text(), ignore), _without(text, ignore)):
            raise RunError(
                f"{self.path} was started with another config: {'; '.join(differ)}. "
                "Use the same config to go on, or another folder"
            )
        if not self.done:
            self._resume(facts)

    def _resume(self, facts: dict[str, Any]) -> None:
        """Note that the run went on, and say so when what it runs on has changed."""
        known = json.loads((self.path / "environment.json").read_text())
        lasting = facts.keys() - {"date", "command", "busy"}
        changed = {name: [known[name], facts[name]] for name in sorted(lasting) if known[name] != facts[name]}
        if changed:
            names = ", ".join(changed)
            warnings.warn(f"{self.path} goes on with other values of {names}; its speeds mix both", stacklevel=4)
        known["resumed"].append({"date": facts["date"], "busy": facts["busy"], "changed": changed})
        write_atomic(self.path / "environment.json", json.dumps(known, indent=2) + "\n")

    def _repair(self) -> set[Key]:
        """Cut off a line that a killed process left unfinished; the keys of all others."""
        rows, whole = metrics.read_rows(self.path / "trace.jsonl")
        if whole < os.fstat(self._trace.fileno()).st_size:  # a finished trace keeps even its date
            os.ftruncate(self._trace.fileno(), whole)
        return {_key(row) for row in rows}

    @contextmanager
    def _disk(self, kept: str) -> Iterator[None]:
        """Turn a refusal of the disk into one sentence."""
        try:
            yield
        except OSError as error:
            reason = "the disk is full" if error.errno in FULL else f"{error.strerror or error}"
            remedy = "free some space" if error.errno in FULL else "put that right"
            raise RunError(f"{self.path}: {reason}; {kept}; {remedy} and run the same command to go on") from error


def derive(folder: str | Path) -> pd.DataFrame:
    """Make metrics.json, table.md, trace.parquet and results.png of a run folder again. Returns the summary.

    Its attrs["note"] is what to say of the speeds beside it. Warns where no picture can be drawn.
    """
    folder = Path(folder)
    frame = metrics.load_trace(folder)
    summary = metrics.summary(frame)
    facts = folder / "environment.json"
    environment = json.loads(facts.read_text()) if facts.exists() else {}
    result = {
        "environment": environment,
        "summary": _records(summary),
        "acceptance_by_position": _records(metrics.acceptance_by_position(frame)),
        "time_share": _records(metrics.breakdown(frame).reset_index()),
    }
    write_atomic(folder / "metrics.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomic(folder / "table.md", _heading(folder, environment) + report.markdown(summary))
    unfinished = folder / "trace.parquet.part"
    frame.to_parquet(unfinished)
    unfinished.replace(folder / "trace.parquet")
    try:
        picture(folder)
    except UNDRAWABLE as error:
        warnings.warn(f"{folder} is complete but for its picture, which could not be drawn: {error}", stacklevel=2)
    summary.attrs["note"] = busy_note(environment)
    return summary


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that no reader, and no crash, ever sees a part of it."""
    unfinished = path.with_name(path.name + ".part")
    try:
        with open(unfinished, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _heading(folder: Path, environment: Mapping[str, Any]) -> str:
    """Name, hardware, versions and command above the table, as far as they are known."""
    lines = [f"# {folder.resolve().name}", ""]
    if environment:
        git = environment["git"]
        code = f"revision {git['revision'][:12]}{' with changes' if git['dirty'] else ''}" if git else "no git revision"
        hardware = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
        lines += [f"{hardware}; torch {environment['versions']['torch']}; {code}; {environment['date']}", ""]
        lines += [f"`{environment['command']}`", ""]
        lines += [note, ""] if (note := busy_note(environment)) else []
    return "\n".join([*lines, ""])


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON objects; NaN and missing values become null."""
    return [{str(name): _plain(value) for name, value in row.items()} for row in table.to_dict("records")]


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _key(row: Mapping[str, Any]) -> Key:
    return row["drafter"], row["verifier"], row["request"], row["turn"], row["pass"]


def _without(config: str, ignore: Sequence[str]) -> dict[str, Any]:
    """A YAML config as plain containers, without the ignored top-level keys."""
    container = OmegaConf.to_container(OmegaConf.create(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items() if key not in ignore}


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        prefix = f"{name}." if name else ""
        keys = {**there, **here}
        return [line for key in keys for line in _differences(there.get(key), here.get(key), f"{prefix}{key}")]
    return [] if there == here else [f"{name}: {there!r} -> {here!r}"]
