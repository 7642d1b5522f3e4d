"""Decode steps as they are: prompts through our loop on the clock, step by step, and what the profiler sees of them.

Words: a kernel's own time runs from the end of the kernels before it to its end. With programmatic dependent launch kernels
overlap, so own times add up to the time that any kernel runs, and durations to more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

from _gpu import event, spread, wait
from _runtimes import counted
from torch.profiler import ProfilerActivity, profile

from specdec.decoding import SpeculativeDecoder
from specdec.types import Acceptance

WARM = 4  # steps until every graph of a request is captured
PRODUCT_KERNELS = ("linear_kernel", "burst_kernel")


class Timed(SpeculativeDecoder):
    """The decoder, noting when the host begins each step, how long captures take and, if asked, when the device runs steps."""

    events = False

    def restart(self) -> None:
        """Forget what was noted."""
        self.begins: list[float] = []
        self.captures: list[float] = []
        self.marks_on_device: list[tuple[Any, Any]] = []

    def step(self) -> Acceptance:
        graphs = self._captured()
        on_device = self.events and self.target.lengths.device.type == "cuda"
        before = self._mark() if on_device else None
        begin = perf_counter()
        acceptance = super().step()
        if self._captured() > graphs:
            self.captures.append(perf_counter() - begin)
        self.begins.append(begin)
        if on_device:
            self.marks_on_device.append((before, self._mark()))
        return acceptance

    def _captured(self) -> int:
        return sum(graph is not None for graph in self._graphs._graphs.values())

    @staticmethod
    def _mark() -> Any:
        mark: Any = event()
        mark.record()
        return mark

    def device_us(self) -> tuple[list[float], list[float]]:
        """us of each step on the device, and from each to the next, warm steps alone; empty without events."""
        marks = self.marks_on_device[WARM:]
        inside = [begin.elapsed_time(end) * 1e3 for begin, end in marks]
        between = [a[1].elapsed_time(b[0]) * 1e3 for a, b in pairwise(marks)]
        return inside, between


def decode(decoder: Timed, prompts: Sequence[Sequence[int]], new: int) -> dict[str, Any]:
    """Prompts as one batch to exactly `new` tokens each: seconds of prefill and decoding, steps, digests of the tokens."""
    wait(decoder.target.lengths.device)
    decoder.restart()
    begin = perf_counter()
    result = decoder.generate([list(ids) for ids in prompts], new, ignore_eos=True)
    end = perf_counter()
    first = decoder.begins[0] if decoder.begins else end
    return {"prefill_seconds": first - begin, "decode_seconds": end - first, **counted(result, new)}


# ---- the profiler ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """Something the device did, in us."""

    name: str
    begin: float
    end: float


def profiled(decoder: Timed, prompt: Sequence[int], steps: int) -> list[Work]:
    """What the device does in `steps` warm steps of one request, ordered by beginning; on the CPU torch's operators."""
    device = decoder.target.lengths.device
    on_gpu = device.type == "cuda"
    new = (WARM + steps + 3) * (decoder.drafter.depth + 1)
    recorder = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])
    for number, _ in enumerate(decoder.stream([list(prompt)], new, ignore_eos=True)):
        if number == WARM:
            wait(device)
            recorder.start()
        elif number == WARM + steps:
            wait(device)
            recorder.stop()
            break
    kind = device.type
    found: Any = recorder.events()  # type: ignore[no-untyped-call]
    events = [e for e in found if e.device_type.name.lower() == kind and e.cpu_parent is None]
    if not events:
        raise RuntimeError(f"the profiler saw nothing on {device}: it needs CUPTI, and no other profiler beside it")
    return sorted((Work(e.name, e.time_range.start, e.time_range.end) for e in events), key=lambda work: work.begin)


def own_times(works: Sequence[Work]) -> list[float]:
    """us of each that no work before it covers; their sum is the time in which anything runs."""
    done, own = float("-inf"), []
    for work in works:
        own.append(max(0.0, work.end - max(work.begin, done)))
        done = max(done, work.end)
    return own


def summary(works: Sequence[Work], steps: int) -> dict[str, float]:
    """Of one step, us: durations added up, time in which anything runs, span; the share of the span in which nothing does."""
    busy = sum(own_times(works))
    span = max(work.end for work in works) - works[0].begin
    return {
        "kernels": sum(not _is_copy(work.name) for work in works) / steps,
        "kernel_us": sum(work.end - work.begin for work in works) / steps,
        "busy_us": busy / steps,
        "span_us": span / steps,
        "idle": 1 - busy / span,
    }


def _is_copy(name: str) -> bool:
    return name.startswith(("Memcpy", "Memset"))


def kernel_rows(
    works: Sequence[Work], steps: int, products: Sequence[tuple[str, int]], sizes: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Kernels by name, the longest first: calls and us of a step, and the bytes of weights and cache they read in it.

    Dense products are told apart by their order; where their number is not the forward's they stay together, bytes unknown.
    sizes: bytes of a step by the name of any other kernel.
    """
    dense = [i for i, work in enumerate(works) if work.name in PRODUCT_KERNELS]
    known = len(dense) == steps * len(products)
    which = {i: products[at % len(products)] for at, i in enumerate(dense)} if known else {}
    rows: dict[str, dict[str, Any]] = {}
    for i, (work, own) in enumerate(zip(works, own_times(works), strict=True)):
        label = f"{work.name} {which[i][0]}" if i in which else work.name
        row = rows.setdefault(label, {"name": label, "calls": 0.0, "us": 0.0, "duration_us": 0.0, "bytes": None})
        row["calls"] += 1 / steps
        row["us"] += own / steps
        row["duration_us"] += (work.end - work.begin) / steps
        if i in which:
            row["bytes"] = (row["bytes"] or 0.0) + which[i][1] / steps
        elif work.name in sizes:
            row["bytes"] = sizes[work.name]
    return sorted(rows.values(), key=lambda row: -float(row["us"]))


def host_row(decoder: Timed, prompt: Sequence[int], new: int, steps: int) -> dict[str, Any]:
    """The host's part of a request: from launch to launch, gaps on the device, captures; then a profile of some steps."""
    decoder.events = True
    first = decode(decoder, [prompt], new)
    captures = decoder.captures
    decode(decoder, [prompt], new)
    wait(decoder.target.lengths.device)
    launches = [(b - a) * 1e6 for a, b in pairwise(decoder.begins[WARM:])]
    inside, between = decoder.device_us()
    decoder.events = False
    works = profiled(decoder, prompt, steps)
    return {
        "steps": first["steps"],
        "launch_us": spread(launches) if launches else None,
        "step_us": spread(inside) if inside else None,
        "gap_us": spread(between) if between else None,
        "capture_seconds": captures,
        "profile": summary(works, steps),
        "kernels": kernel_rows(works, steps, [], {}),
    }
