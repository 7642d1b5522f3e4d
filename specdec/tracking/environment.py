"""What a number depends on besides the config: versions, code, hardware. No host or user name, no variables."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import sleep
from typing import Any

import torch

BUSY = 0.2  # share of the processors that others may use before a table says so
PACKAGES = ["specdec-lab", "torch", "transformers", "tokenizers", "triton", "numba", "numpy"]
CODE = Path(__file__).resolve().parents[1]


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """Facts of this process, ready for JSON; None where a fact does not apply."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(argv),
        "git": git_state(CODE),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }


def command(argv: Sequence[str]) -> str:
    """The command as a shell would take it; of the program only the name, its place says nothing."""
    return shlex.join([Path(argv[0]).name, *argv[1:]]) if argv else ""


def git_state(folder: Path) -> dict[str, Any] | None:
    """Revision and whether tracked files differ from it; None outside a repository, without git or a first commit."""
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        return {"revision": revision, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None


def _git(folder: Path, *arguments: str) -> str:
    found = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True, timeout=10)
    return found.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as Linux knows it, elsewhere as Python does."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def busy_share(seconds: float = 0.1) -> float | None:
    """Share of all processors that programs keep busy while this one waits; None where Linux is not asked.

    What else runs on a machine is in every time that is measured there.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    before = _ticks(stat)
    sleep(seconds)
    idle, total = (b - a for a, b in zip(before, _ticks(stat), strict=True))
    return round(1 - idle / total, 2) if total else None


def busy_note(*runs: Mapping[str, Any]) -> str:
    """A sentence where other programs kept the machine busy as one of these runs began or went on; else nothing."""
    parts = [part for run in runs for part in (run, *run.get("resumed", []))]
    busy = max((part.get("busy") or 0.0 for part in parts), default=0.0)
    if busy <= BUSY:
        return ""
    return f"Other programs kept {busy:.0%} of the processors busy when it began: speeds may be off."


def _ticks(stat: Path) -> tuple[int, int]:
    """Idle and all ticks since the machine started; what a guest used counts as the host's."""
    ticks = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
