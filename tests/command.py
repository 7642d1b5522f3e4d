"""The command line inside a test: in this process, or in one of its own that can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from specdec import cli

QUICK = ["debug=quick", "dataset.limit=2", "max_new_tokens=8"]  # four requests, two with each method
LEFT = [  # by a run that is done
    "DONE",
    "config.yaml",
    "environment.json",
    "metrics.json",
    "output.jsonl",
    "results.png",
    "table.md",
    "trace.jsonl",
    "trace.parquet",
]


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class CommandLine:
    """Runs `specdec ARGUMENTS` in a folder of its own. No account, no network."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self._patch, self._capture = folder, patch, capture
        patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        patch.setenv("NETRC", str(folder / "netrc"))
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)

    def __call__(self, *arguments: str) -> Done:
        """In this process: fast, and open to monkeypatching."""
        self._patch.setattr(sys, "argv", ["specdec", *arguments])
        self._capture.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        out, err = self._capture.readouterr()
        return Done(code, out, err)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """In a process of its own, which finds the tests' modules and can be interrupted."""
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", "specdec", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=_heed_interrupts
        )

    def rows(self, trace: Path | str) -> list[dict[str, Any]]:
        """Finished rows of a trace, without the one that a kill cut off."""
        return [json.loads(line) for line in (self.folder / trace).read_text().splitlines(True) if line.endswith("\n")]

    def wait_for(self, process: subprocess.Popen[str], name: str) -> None:
        """Until the process has made that file in the folder."""
        deadline = time.monotonic() + 300  # its first start may compile
        while not (self.folder / name).exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _heed_interrupts() -> None:
    """A shell starts what runs in its background deaf to SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def check_mistake(done: Done, *words: str) -> None:
    """A user's mistake: status 2, one sentence on stderr, no traceback, and the words in it."""
    assert done.code == 2, done
    assert done.err.startswith("specdec: "), done.err
    assert len(done.err.splitlines()) == 1, done.err
    assert "Traceback" not in done.out + done.err
    for word in words:
        assert word in done.err, done.err
