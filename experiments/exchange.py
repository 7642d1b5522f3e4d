"""What it costs ranks to add up: through one another's memory, by NCCL, not at all; in a CUDA graph, alone or between products.

    torchrun --nproc-per-node 8 experiments/exchange.py [KEY=VALUE ...]      a GPU each
    python experiments/exchange.py streams=2                                 ranks that are streams of one GPU
    python experiments/exchange.py --render                                  write the table again from the JSON file

A round is what stands between two products of a layer of Maverick: the output projection, whose partial sums are added over the
ranks, and the norm, whose result is rounded for the QKV product. Weights differ from round to round and do not stay in L2.
Streams of one GPU share its multiprocessors and have no link between them: they show what the kernel itself takes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _bench import table
from _command import read_options
from _gpu import begin, clocked, parse_options, spread, wait
from _gpu_report import head, spread_us
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.gpu.exchange import Mailbox
from specdec.kernels.gpu.ops import TOKENS_EXACT
from specdec.kernels.gpu.parallel import ParallelOps
from specdec.kernels.reference import Fp8Weight
from specdec.target import ranks
from specdec.target.ranks import Ranks

NAME = "exchange"
EPS = 1e-5
PLACES = {"alone": "one after another", "between": "between products"}


@dataclass
class Options:
    """The keys of the command line; sizes are one rank's of Maverick on eight."""

    tokens: list[int] = field(default_factory=lambda: [1, 2, 4, 8])  # M
    hidden: int = 5120
    inner: int = 640  # inputs of the output projection
    outer: int = 896  # rows of the QKV product
    rounds: int = 16  # of a graph
    repeats: int = 200
    streams: int = 2  # ranks, where torchrun did not start several
    revision: str | None = None  # of the code, where the folder is no git checkout
    results: str = str(Path(__file__).parent / "results")


class Rank:
    """One rank's weights, and its operations by the way it adds up."""

    def __init__(self, options: Options, ways: dict[str, ParallelOps], device: torch.device) -> None:
        self.options, self.ways, self.device = options, ways, device
        self.stream = torch.cuda.Stream(device)
        self.norm = torch.ones(options.hidden, device=device)
        self.out = [self._weight(options.hidden, options.inner) for _ in range(options.rounds)]
        self.into = [self._weight(options.outer, options.hidden) for _ in range(options.rounds)]

    def _weight(self, rows: int, inputs: int) -> Fp8Weight:
        data, scale = reference.quantize(torch.randn(rows, inputs, device=self.device) * inputs**-0.5)
        return Fp8Weight(data, scale, torch.tensor(0.02, device=self.device))

    def work(self, way: str, place: str, m: int) -> Callable[[], None]:
        """All rounds of a graph, of M tokens."""
        ops, o = self.ways[way], self.options
        x = torch.zeros(m, o.hidden, device=self.device)
        y = torch.randn(m, o.inner, device=self.device).to(reference.FP8)
        parts = torch.randn(1, m, o.hidden, device=self.device)
        rounded, scale = torch.empty_like(x, dtype=reference.FP8), self.into[0].input_scale
        assert scale is not None
        squares = torch.empty(m, 16, device=self.device)

        def between() -> None:
            for out, into in zip(self.out, self.into, strict=True):
                ops.add_linear(x, y, out)
                ops.norm_linear(x, self.norm, EPS, into)

        def alone() -> None:
            for _ in range(o.rounds):
                ops.leave(x, parts)
                ops.add_norm(x, self.norm, EPS, x, squares, rounded, x, scale, "no", "static")

        return between if place == "between" else alone


def graph_of(works: list[tuple[torch.cuda.Stream, Callable[[], None]]]) -> Callable[[], None]:
    """All ranks of this process side by side in one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for stream, work in works:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                work()
        for stream, _ in works:
            torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def of_process(options: Options, group: Ranks) -> list[Rank]:
    """The rank that this process is."""
    device = group.place(torch.device("cuda"))
    ways = {"no exchange": ParallelOps(device, lambda parts: parts[None]), "NCCL": ParallelOps(device, group.gather)}
    if group.reach(device):
        memory = partial(group.memory, device=device)
        mailbox = Mailbox.open(group.rank, group.world, TOKENS_EXACT, options.hidden, True, memory)
        ways["direct"] = ParallelOps(device, group.gather, mailbox)
    return [Rank(options, ways, device)]


def of_streams(options: Options) -> list[Rank]:
    """Ranks that are streams of this process' GPU."""
    device, world, made = torch.device("cuda", 0), options.streams, []
    room = 2 * world * TOKENS_EXACT * options.hidden // 2
    boxes = [torch.zeros(room, dtype=torch.int64, device=device) for _ in range(world)]
    places = torch.tensor([box.data_ptr() for box in boxes], device=device)
    for rank, box in enumerate(boxes):
        memory: Callable[[int], tuple[Tensor, Tensor]] = lambda size, box=box: (box, places)  # noqa: E731
        mailbox = Mailbox.open(rank, world, TOKENS_EXACT, options.hidden, True, memory)
        alone = ParallelOps(device, lambda parts: parts[None])
        made.append(Rank(options, {"no exchange": alone, "direct": ParallelOps(device, alone.gather, mailbox)}, device))
    return made


def measure(options: Options, local: list[Rank], group: Ranks | None) -> Iterator[dict[str, Any]]:
    """us of a round, by place, M and way, as the slowest rank sees it, and the fastest rank's median beside it."""
    for place in PLACES:
        for m in options.tokens:
            for way in local[0].ways:
                works = [(rank.stream, rank.work(way, place, m)) for rank in local]
                replay = _captured(works, local, way)
                wait(local[0].device)
                if group is not None:
                    group.gather(torch.zeros(1, device=local[0].device))
                times = spread([s / options.rounds * 1e6 for s in clocked(replay, options.repeats, local[0].device)])
                all_times = [times] if group is None else _everyone(group, times)
                slowest = max(all_times, key=lambda t: t["median"])
                yield {
                    "place": place, "tokens": m, "way": way, "bytes": m * options.hidden * 2, "us": slowest,
                    "fastest": min(t["median"] for t in all_times),
                }  # fmt: skip


def _captured(
    works: list[tuple[torch.cuda.Stream, Callable[[], None]]], local: list[Rank], way: str
) -> Callable[[], None]:
    """The graph, behind a run that compiles and loads what it needs: streams of one process do not wait in that one."""
    boxes = [box for rank in local if (box := rank.ways[way].mailbox) is not None]
    patience = [box.patience for box in boxes]
    for box in boxes if len(local) > 1 else []:
        box.patience = 0
    for stream, work in works:
        with torch.cuda.stream(stream):
            work()
    torch.cuda.synchronize()
    for box, usual in zip(boxes, patience, strict=True):
        box.patience = usual
    return graph_of(works)


def _everyone(group: Ranks, times: dict[str, float]) -> list[dict[str, float]]:
    """The times of all ranks."""
    device = torch.device("cuda", torch.cuda.current_device())
    mine = torch.tensor(list(times.values()), dtype=torch.float64, device=device)
    return [dict(zip(times, row, strict=True)) for row in group.gather(mine).tolist()]


def render(document: dict[str, Any]) -> str:
    """Markdown of a result."""
    setup, rows = document["setup"], document["rows"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    kind = "streams of one GPU" if setup["on_streams"] else "GPUs"
    what = f"""{setup["world"]} ranks, {kind}; bf16 letters, {setup["hidden"]} channels, static FP8 results,
{setup["rounds"]} rounds a graph, {setup["repeats"]} replays. us of a round on the slowest rank."""
    parts = [head("Adding up over ranks", document, what)]
    for place, name in PLACES.items():
        lines = []
        for m in setup["tokens"]:
            cells = {row["way"]: row for row in rows if (row["place"], row["tokens"]) == (place, m)}
            base = cells["no exchange"]["us"]["median"]
            added = [f"{cells[way]['us']['median'] - base:.1f}" for way in ways if way != "no exchange"]
            size = f"{cells['no exchange']['bytes'] / 1e3:.0f}"
            lines.append([m, size, *(spread_us(cells[way]["us"]) for way in ways), *added])
        heads = ["M", "KB", *ways, *(f"{way}: added" for way in ways if way != "no exchange")]
        parts.append(f"## {name.capitalize()}\n\n{table(heads, lines)}")
    return "\n".join(parts)


def main(arguments: list[str]) -> None:
    """The command line."""
    options = read_options(NAME, __doc__, partial(parse_options, Options, sections=[]), arguments)
    path = Path(options.results) / f"{NAME}.json"
    if "--render" not in arguments:
        if not torch.cuda.is_available():
            sys.exit(f"{NAME}: torch {torch.__version__} finds no GPU, and this measures GPUs alone")
        group = ranks.join()
        local = of_streams(options) if group is None else of_process(options, group)
        rows = list(measure(options, local, group))
        ranks.leave()
        if int(os.environ.get("RANK", "0")):
            return
        setup = {k: v for k, v in vars(options).items() if k not in ("results", "revision", "streams")}
        world = options.streams if group is None else group.world
        setup |= {"world": world, "on_streams": group is None}
        document = {"setup": setup, "sessions": [begin(NAME, arguments, options.revision)], "rows": rows}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(render(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
