"""A machine in the few numbers a decode step depends on, each with its band and provenance.

TB/s = 1e12 bytes/s, GB/s = 1e9 bytes/s, us = 1e-6 s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from specdec.projection.band import Band, Quantity, check_keys, read_count, read_quantity


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs of one host that share a model by tensor parallelism."""

    name: str
    gpus: int
    hbm_tb_s: Quantity  # what one GPU's memory gives a long read
    exposed: Quantity  # share of it that kernels of a decode step reach
    link_gb_s: Quantity  # of one GPU to its peers, per direction
    start_us: Quantity  # t0 of an all-reduce, for when none was measured
    peer_us: Quantity  # a: what one more peer costs
    boundary_us: Quantity  # from one kernel of a graph to the next
    skew: Quantity  # slowest of n ranks over one rank alone

    def __post_init__(self) -> None:
        for field in ("hbm_tb_s", "exposed", "link_gb_s"):
            if getattr(self, field).low <= 0:
                raise ValueError(f"{field} of machine {self.name} is {getattr(self, field).low}: give a positive rate")

    def one_shot(self, size: float, gpus: int) -> Band:
        """us of (n - 1) (a + bytes / bw): what a one-shot all-reduce takes beyond t0."""
        wire = (size / (rate * 1e3) for rate in self.link_gb_s.falling)
        return Band(*((gpus - 1) * (a + sent) for a, sent in zip(self.peer_us.edges, wire, strict=True)))

    def all_reduce(self, size: float, start: Sequence[float] | None = None) -> Band:
        """us to all-reduce `size` bytes: t(n, bytes) = t0 + (n - 1) (a + bytes / bw), or two such phases over 1/n each.

        Two phases (reduce-scatter, all-gather) win where the message is large. `start` is t0 at low, mid and high peer cost,
        the machine's own when left out.
        """
        if self.gpus == 1:
            return Band.exactly(0.0)
        whole, part = self.one_shot(size, self.gpus), self.one_shot(size / self.gpus, self.gpus)
        edges = zip(start or self.start_us.edges, whole.edges, part.edges, strict=True)
        return Band.ordered(*(min(t0 + once, 2 * (t0 + twice)) for t0, once, twice in edges))


def _q(low: float, mid: float, high: float, kind: Any, source: str) -> Quantity:
    return Quantity(low, mid, high, kind, source)


_SHARED: dict[str, Any] = {  # assumed alike on both chips: latency has changed less than bandwidth
    "gpus": 8,
    "exposed": _q(0.65, 0.79, 0.88, "assumed", "2.8 / 3.4 / 3.8 of 4.3 TB/s for kernels of 3 to 40 us"),
    "start_us": _q(3.9, 4.0, 4.2, "assumed", "puts 8 GPUs at 41 KB to 4.5-8.5 us, about the published 5-8.7"),
    "peer_us": _q(0.0, 0.2, 0.5, "assumed", "the same published small-message results; not separable on 2 GPUs"),
    "boundary_us": _q(0.4, 0.7, 1.3, "assumed", "programmatic dependent launch; 1.12 measured on an H200 without it"),
    "skew": _q(1.01, 1.02, 1.03, "assumed", "slowest of 8 ranks"),
}
H200 = Machine(
    name="8 x H200",
    hbm_tb_s=_q(4.26, 4.37, 4.47, "measured", "one H200: copy 4.26, read only 4.47 (published peak 4.8)"),
    link_gb_s=_q(360, 405, 450, "published", "NVLink 4, 450 per direction; low end 80% of it"),
    **_SHARED,
)
B200 = Machine(
    name="8 x B200",
    hbm_tb_s=_q(6.81, 6.98, 7.67, "assumed", "peak 7.67 (driver); low and mid the share of its peak an H200 gives"),
    link_gb_s=_q(720, 810, 900, "published", "NVLink 5, 900 per direction; low end 80% of it"),
    **_SHARED,
)
MACHINES = {"h200": H200, "b200": B200}


def load_machine(name: str) -> Machine:
    """A preset or a JSON file: name, gpus, every other field as {"value": number | [low, mid, high], "kind", "source"}."""
    if name in MACHINES:
        return MACHINES[name]
    if not Path(name).is_file():
        raise ValueError(f"machine {name!r} is neither a file nor one of {', '.join(MACHINES)}: name one of them")
    try:
        data = json.loads(Path(name).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON ({error}): write the machine as one JSON object") from error
    names = [field.name for field in fields(Machine)]
    check_keys(data, set(names), name)
    quantities = {key: read_quantity(data[key], f"{name}: {key}") for key in names[2:]}
    return Machine(str(data["name"]), read_count(data["gpus"], f"{name}: gpus"), **quantities)
