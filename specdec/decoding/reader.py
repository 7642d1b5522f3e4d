"""From the record a step leaves on the device to the traces on the host."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from specdec.decoding.state import RECORD_FIELDS
from specdec.decoding.trace import RequestTrace, RowStep
from specdec.kernels.steps import LENGTH, STOP

FINISH = {0: "", LENGTH: "length", STOP: "stop"}  # the record's finished field


class StepReader:
    """Brings a step's record to the host: at once on the CPU, one step late where the device runs ahead."""

    def __init__(self, late: bool, logprobs: bool) -> None:
        self._late, self._logprobs = late, logprobs
        self._pending: tuple[Any, ...] | None = None
        self._last = perf_counter()

    def restart(self) -> None:
        """Do not count what was done since the last step, a prefill, to the next one."""
        self._last = perf_counter()

    def swap(
        self, record: Tensor, marks: tuple[float, ...], owner: list[int | None]
    ) -> tuple[list[RowStep], list[float], list[int | None]] | None:
        """Rows of a record, its seconds (whole, propose, verify, accept) and owners; None: nothing to read yet."""
        if not self._late:
            rows = read_record(record, self._logprobs)
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
        return read_record(previous[0], self._logprobs), [seconds, *[float("nan")] * 3], previous[2]


def read_record(record: Tensor, logprobs: bool) -> list[RowStep]:
    """The rows of a record on the host, int64 [B, 5 + E] or, with log-probabilities, [B, 5 + 2E]."""
    width = (record.shape[1] - RECORD_FIELDS) // (2 if logprobs else 1)
    fields, tokens, values = record.tensor_split([RECORD_FIELDS, RECORD_FIELDS + width], 1)
    rows = zip(fields.tolist(), tokens.tolist(), values.view(torch.float64).tolist(), strict=True)
    return [
        RowStep(nodes, depth, accepted, ids[:emitted], logs[:emitted], FINISH[finished])
        for (nodes, depth, accepted, emitted, finished), ids, logs in rows
    ]


def note_step(
    rows: list[RowStep],
    seconds: list[float],
    ran: list[int | None],
    owner: list[int | None],
    traces: list[RequestTrace],
) -> Iterator[tuple[int, RowStep]]:
    """Write one step into the traces of the requests that ran in it, and free the rows that ended."""
    active = [row for row, index in enumerate(ran) if index is not None and rows[row].num_accepted >= 0]
    shares = [value / max(len(active), 1) for value in seconds]
    for row in active:
        index = ran[row]
        assert index is not None
        step, trace = rows[row], traces[index]
        trace.num_nodes.append(step.num_nodes)
        trace.draft_depth.append(step.draft_depth)
        trace.num_accepted.append(step.num_accepted)
        trace.num_emitted.append(len(step.tokens))
        trace.step_seconds.append(shares[0])
        trace.propose_seconds.append(shares[1])
        trace.verify_seconds.append(shares[2])
        trace.accept_seconds.append(shares[3])
        trace.emit(step)
        if step.finish:
            owner[row] = None
        yield index, step
