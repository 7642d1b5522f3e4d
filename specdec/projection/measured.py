"""What was measured on one or two GPUs, read from `measured.json`. The schema, every time in us (1e-6 s), is

    {"source": "where, when, which revision",          shown above every table; say here when numbers are made up
     "machine": "h200",                                where it was measured: a preset or a machine file
     "ranks": 8,                                       the steps are one shard of so many
     "runtimes": {                                     "specdec" is ours and required; others stand beside it
       "specdec": {"stub_us": 1.5, "stubs": 96,        time of one stand-in for an all-reduce, and how many are inside a step
                   "overhead_us": [15, 25, 40],        accept, launch and host of an iteration; 0 where the rows include it
                   "rows": [{"batch": 1, "tokens": 4, "context": 1024, "us": [1290, 1300, 1330], "experts": 3.95}]}},
     "drafter": {"stub_us": 1.5, "stubs_per_step": 2,  optional; left out, drafting is computed from the head's bytes
                 "rows": [{"batch": 1, "tokens": 3, "us": 400}]},
     "all_reduce": {"gpus": 2,                         optional; left out, the machine's own assumption is used
                    "rows": [{"bytes": 40960, "us": 5.0}]}}

A time is a number or [low, mid, high]. `tokens` are those of one row's forward (1 + drafts), in the drafter the drafts of one
proposal, fc included. `experts` (optional) is the mean number of distinct routed experts a MoE layer read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.projection.band import Band, check_keys, read_band, read_count
from specdec.projection.machine import Machine, load_machine

OURS = "specdec"


@dataclass(frozen=True, slots=True)
class Row:
    """One measured time of one rank."""

    batch: int
    tokens: int
    context: int  # 0 in the drafter's rows
    us: Band
    experts: float | None = None


def interpolated(what: str, rows: tuple[Row, ...], batch: int, tokens: int, context: int) -> Row:
    """The row asked for, or the straight line between the two nearest numbers of tokens; never beyond the measured ones."""
    same = sorted((r for r in rows if (r.batch, r.context) == (batch, context)), key=lambda r: r.tokens)
    below = [row for row in same if row.tokens <= tokens]
    above = [row for row in same if row.tokens >= tokens]
    if not below or not above:
        there = ", ".join(f"{r.batch}/{r.tokens}/{r.context}" for r in rows)
        asked = f"{batch}/{tokens}/{context}"
        raise ValueError(
            f"{what}: nothing measured around batch/tokens/context {asked}, only {there}: measure it or ask for those"
        )
    a, b = below[-1], above[0]
    weight = (tokens - a.tokens) / (b.tokens - a.tokens) if b.tokens > a.tokens else 0.0
    experts = None
    if a.experts is not None and b.experts is not None:
        experts = a.experts + weight * (b.experts - a.experts)
    return Row(batch, tokens, context, a.us * (1 - weight) + b.us * weight, experts)


@dataclass(frozen=True, slots=True)
class Runtime:
    """Decode steps of one rank, with stand-ins where all-reduces belong."""

    stub_us: float
    stubs: int
    overhead_us: Band
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class MeasuredDrafter:
    """Whole proposals of one rank, fc included."""

    stub_us: float
    stubs_per_step: int
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class AllReduceTimes:
    """Times in us by message size in bytes, on `gpus` GPUs."""

    gpus: int
    rows: tuple[tuple[int, Band], ...]

    def start(self, size: float, machine: Machine) -> list[float]:
        """t0 = t(gpus, bytes) - (gpus - 1) (a + bytes / bw) by edge, linear between the measured sizes, constant beyond.

        By edge, not a band: the dearer a peer is taken to be, the less of the measured time is t0.
        """
        starts = [(measured, self._start(measured, us, machine)) for measured, us in self.rows]
        below = [start for start in starts if start[0] <= size] or starts[:1]
        above = [start for start in starts if start[0] >= size] or starts[-1:]
        (x0, y0), (x1, y1) = below[-1], above[0]
        weight = (size - x0) / (x1 - x0) if x1 > x0 else 0.0
        return [a + weight * (b - a) for a, b in zip(y0, y1, strict=True)]

    def _start(self, size: int, us: Band, machine: Machine) -> list[float]:
        rest = machine.one_shot(size, self.gpus)
        left = [t - r for t, r in zip(us.edges, rest.edges, strict=True)]
        if min(left) < 0:
            raise ValueError(
                f"all-reduce of {size} bytes took {us.edges} us, less than the {rest.edges} us that peer_us and "
                f"link_gb_s of {machine.name} ask for: correct the machine"
            )
        return left


@dataclass(frozen=True, slots=True)
class Measured:
    """All that a projection takes from measurements."""

    source: str
    machine: Machine
    ranks: int
    runtimes: dict[str, Runtime]
    drafter: MeasuredDrafter | None = None
    all_reduce: AllReduceTimes | None = None


def _row(data: Any, what: str, keys: set[str]) -> Row:
    check_keys(data, keys | {"us"}, what, frozenset({"experts"}))
    counts = {key: read_count(data[key], f"{what}.{key}") for key in keys}
    experts = data.get("experts")
    if experts is not None:
        experts = read_band(experts, f"{what}.experts").mid
    return Row(
        counts["batch"], counts["tokens"], counts.get("context", 0), read_band(data["us"], f"{what}.us"), experts
    )


def _rows(data: Any, what: str, keys: set[str]) -> tuple[Row, ...]:
    if not isinstance(data, list) or not data:
        raise ValueError(f"{what} is {data!r}: give a list of at least one row")
    rows = tuple(_row(row, f"{what}[{i}]", keys) for i, row in enumerate(data))
    cells = [(row.batch, row.tokens, row.context) for row in rows]
    if twice := sorted({cell for cell in cells if cells.count(cell) > 1}):
        raise ValueError(f"{what} has batch/tokens/context {'/'.join(map(str, twice[0]))} twice: keep one row of it")
    return rows


def _check_stubs(rows: tuple[Row, ...], stub_us: float, stubs: dict[int, int], what: str) -> None:
    for row in rows:
        inside = stub_us * stubs[row.tokens]
        if inside >= row.us.low:
            raise ValueError(f"{what}: stubs take {inside:g} us of a step of {row.us.low:g} us: stub_us is of one stub")


def _runtime(data: Any, what: str) -> Runtime:
    check_keys(data, {"stub_us", "stubs", "overhead_us", "rows"}, what)
    rows = _rows(data["rows"], f"{what}.rows", {"batch", "tokens", "context"})
    stub_us = read_band(data["stub_us"], f"{what}.stub_us").mid
    stubs = read_count(data["stubs"], f"{what}.stubs", 0)
    _check_stubs(rows, stub_us, {row.tokens: stubs for row in rows}, what)
    return Runtime(stub_us, stubs, read_band(data["overhead_us"], f"{what}.overhead_us"), rows)


def _drafter(data: Any) -> MeasuredDrafter:
    check_keys(data, {"stub_us", "stubs_per_step", "rows"}, "drafter")
    rows = _rows(data["rows"], "drafter.rows", {"batch", "tokens"})
    stub_us = read_band(data["stub_us"], "drafter.stub_us").mid
    stubs = read_count(data["stubs_per_step"], "drafter.stubs_per_step", 0)
    _check_stubs(rows, stub_us, {row.tokens: stubs * row.tokens for row in rows}, "drafter")
    return MeasuredDrafter(stub_us, stubs, rows)


def _all_reduce(data: Any) -> AllReduceTimes:
    check_keys(data, {"gpus", "rows"}, "all_reduce")
    if not isinstance(data["rows"], list) or not data["rows"]:
        raise ValueError(f"all_reduce.rows is {data['rows']!r}: give a list of at least one row")
    rows: dict[int, Band] = {}
    for i, row in enumerate(data["rows"]):
        what = f"all_reduce.rows[{i}]"
        check_keys(row, {"bytes", "us"}, what)
        size = read_count(row["bytes"], f"{what}.bytes")
        if size in rows:
            raise ValueError(f"all_reduce.rows has bytes {size} twice: keep one row of it")
        rows[size] = read_band(row["us"], f"{what}.us")
    return AllReduceTimes(read_count(data["gpus"], "all_reduce.gpus", 2), tuple(sorted(rows.items())))


def parse_measured(data: Any) -> Measured:
    """The parsed JSON as `Measured`; ValueError says in one sentence which key is wrong and what to put there."""
    required = {"source", "machine", "ranks", "runtimes"}
    check_keys(data, required, "measured.json", frozenset({"drafter", "all_reduce"}))
    if not isinstance(data["runtimes"], dict) or OURS not in data["runtimes"]:
        raise ValueError(f'runtimes lacks "{OURS}", the runtime that is projected: add its rows')
    return Measured(
        source=str(data["source"]),
        machine=load_machine(str(data["machine"])),
        ranks=read_count(data["ranks"], "ranks"),
        runtimes={name: _runtime(runtime, f"runtimes.{name}") for name, runtime in data["runtimes"].items()},
        drafter=_drafter(data["drafter"]) if "drafter" in data else None,
        all_reduce=_all_reduce(data["all_reduce"]) if "all_reduce" in data else None,
    )


def load_measured(path: Path) -> Measured:
    """Read and check a measured.json."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the measured.json of a benchmark")
    try:
        return parse_measured(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): write it as the schema says") from error
