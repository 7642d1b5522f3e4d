"""From the record a step leaves on the device to the traces on the host."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from specdec.decoding.trace import RequestTrace
from specdec.kernels.steps import LENGTH


class StepReader:
    """Brings a step's record to the host: at once on the CPU, one step late where the device runs ahead."""

    def __init__(self, late: bool) -> None:
        self._late = late
        self._pending: tuple[Any, ...] | None = None
        self._last = perf_counter()

    def restart(self) -> None:
        """Do not count what was done since the last step, a prefill, to the next one."""
        self._last = perf_counter()

    def swap(
        self, record: Tensor, marks: tuple[float, ...], owner: list[int | None]
    ) -> tuple[list[list[int]], list[float], list[int | None]] | None:
        """Rows of a record, its seconds (whole, propose, verify, accept) and owners; None: nothing to read yet."""
        if not self._late:
            rows = record.tolist()
            parts = [b - a for a, b in pairwise(marks)]
            return rows, [perf_counter() - marks[0], *parts], owner
        host = torch.empty(record.shape, dtype=record.dtype, pin_memory=True)
        host.copy_(record, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        previous, self._pending = self._pending, (host, event, owner)
        if previous is None:
            return None
        previous[1].synchronize()
        now = perf_counter()
        seconds, self._last = now - self._last, now
        return previous[0].tolist(), [seconds, *[float("nan")] * 3], previous[2]


def note_step(
    rows: list[list[int]],
    seconds: list[float],
    ran: list[int | None],
    owner: list[int | None],
    traces: list[RequestTrace],
) -> Iterator[tuple[int, list[int]]]:
    """Write one step into the traces of the requests that ran in it, and free the rows that ended."""
    active = [row for row, index in enumerate(ran) if index is not None and rows[row][2] >= 0]
    shares = [value / max(len(active), 1) for value in seconds]
    for row in active:
        index = ran[row]
        assert index is not None
        nodes, depth, accepted, emitted, finished, *tokens = rows[row]
        trace = traces[index]
        trace.num_nodes.append(nodes)
        trace.draft_depth.append(depth)
        trace.num_accepted.append(accepted)
        trace.num_emitted.append(emitted)
        trace.step_seconds.append(shares[0])
        trace.propose_seconds.append(shares[1])
        trace.verify_seconds.append(shares[2])
        trace.accept_seconds.append(shares[3])
        trace.tokens += tokens[:emitted]
        if finished:
            trace.finish = finish_reason(finished)
            owner[row] = None
        yield index, tokens[:emitted]


def finish_reason(code: int) -> str:
    """What the record's finished field means."""
    return "length" if code == LENGTH else "stop"
