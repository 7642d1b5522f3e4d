"""A drafter that waits in the middle of a run, so that a test can interrupt it there however fast the machine is."""

from __future__ import annotations

import time
from pathlib import Path

from specdec.drafter.ngram import NGram
from specdec.types import DraftInputs, DraftTree

ROWS = 3  # of a trace, behind which it waits
HERE, GO = "held", "go"  # files in the working folder: it waits; it need not


class Held(NGram):
    """N-gram drafts; as soon as a trace has ROWS rows it makes the file HERE and waits until it is ended, or there is GO."""

    graphable = False

    def propose(self, inputs: DraftInputs) -> DraftTree:
        if not Path(GO).exists() and any(
            trace.read_bytes().count(b"\n") >= ROWS for trace in Path().glob("**/trace.jsonl")
        ):
            Path(HERE).touch()
            deadline = time.monotonic() + 120
            while not Path(GO).exists():
                assert time.monotonic() < deadline, "nobody interrupted this run"
                time.sleep(0.01)
        return super().propose(inputs)
