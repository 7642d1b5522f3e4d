"""What the GPU benchmarks share: timing on the device, ceilings of the machine, bytes a forward reads, the run itself.

Words: M tokens a forward, D distinct routed experts of a layer. A ceiling is what plain torch reaches in the same process. On a
machine without a GPU everything runs too, on the CPU's clock and without graphs, so that the logic can be tested.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from _bench import Journal, session
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from specdec.nn import ModelConfig

Job = tuple[str, Callable[[], dict[str, Any]]]  # key of a row, and what measures it
T = TypeVar("T")


# ---- time ------------------------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clocked(function: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of every call after one that is not counted; on a GPU between events in the stream."""
    function()
    wait(device)
    if device.type != "cuda":
        return [_host_seconds(function) for _ in range(repeats)]
    marks = [(event(), event()) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        function()
        end.record()
    wait(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def event() -> Any:
    """A moment in the stream of the GPU, once recorded."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _host_seconds(function: Callable[[], object]) -> float:
    begin = perf_counter()
    function()
    return perf_counter() - begin


def graphed(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The function as one CUDA graph; on the CPU as it is."""
    if device.type != "cuda":
        return function
    function()  # compiles what compiles
    wait(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, and how many values there were."""
    low, median, high = np.quantile(np.asarray(values, dtype=float), [0.1, 0.5, 0.9]).tolist()
    return {"p10": low, "median": median, "p90": high, "count": len(values)}


# ---- ceilings --------------------------------------------------------------------------------------------------------


def ceilings(device: torch.device, megabytes: int, size: int, repeats: int) -> dict[str, float]:
    """Bytes/s of a sum over memory and of a copy (reads and writes), FLOP/s of a bf16 product of `size`: best of repeats."""
    memory = torch.ones(megabytes * 2**18, device=device)
    read = min(clocked(memory.sum, repeats, device))
    copy = min(clocked(partial(torch.empty_like(memory).copy_, memory), repeats, device))
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    product = min(clocked(partial(torch.matmul, a, b), repeats, device))
    return {"read": memory.nbytes / read, "copy": 2 * memory.nbytes / copy, "matmul": 2 * size**3 / product}


# ---- bytes -----------------------------------------------------------------------------------------------------------


def weight_size(weight: Any) -> int:
    """Bytes of a packed weight, with its scales."""
    scale = getattr(weight, "scale", None)
    return int(weight.data.nbytes) + (0 if scale is None else int(scale.nbytes))


def products(target: Any) -> list[tuple[str, int]]:
    """Name and bytes of the dense products of a forward, in the order of their launches."""
    found: list[tuple[str, int]] = []
    for layer in target.model.layers:
        names = ["qkv", "o", *(["gate_up", "down"] if layer.experts is None else [])]
        found += [(name, weight_size(getattr(layer, name))) for name in names]
    return [*found, ("head", weight_size(target.model.head))]


def expert_bytes(target: Any, tokens: int) -> dict[str, int]:
    """Bytes that the kernels of mixtures read in a forward of forced routing, by kernel: D routed experts, the shared one."""
    total = {"router_kernel": 0, "expert_gate_up_kernel": 0, "expert_down_kernel": 0}
    for layer in target.model.layers:
        if (experts := layer.experts) is None:
            continue
        assert experts.forced is not None, "what the router chooses is not known here"
        distinct = len(set(experts.forced[:tokens].tolist()))
        total["router_kernel"] += experts.router.nbytes
        for kernel, routed, shared in (
            ("expert_gate_up_kernel", experts.gate_up, experts.shared_gate_up),
            ("expert_down_kernel", experts.down, experts.shared_down),
        ):
            each = weight_size(routed) // len(routed.data)
            total[kernel] += distinct * each + weight_size(shared)
    return {name: size for name, size in total.items() if size}


def kv_read(target: Any, context: int, batch: int = 1) -> int:
    """Bytes of keys and values of `context` committed tokens that a forward sees; a chunked layer sees its chunk alone."""
    keys = target.cache.keys
    token = 2 * keys.shape[2] * target.config.head_dim * keys.element_size()
    config: ModelConfig = target.config
    chunks = [config.attention_rule(i).chunk for i in range(config.num_layers)]
    return int(batch * token * sum(context % chunk if chunk else context for chunk in chunks))


def fill_cache(target: Any, context: int) -> None:
    """Pretend that `context` tokens are committed in every row: noise for keys and values, as no real prefill is needed."""
    for tensor in (target.cache.keys, target.cache.values):
        tensor.normal_()
    target.lengths.fill_(context)


def random_ids(vocabulary: int, count: int, seed: int = 0) -> Tensor:
    """int64 [count] on the host."""
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


# ---- the run ---------------------------------------------------------------------------------------------------------


def parse_options(schema: type[T], arguments: Sequence[str], sections: Sequence[str]) -> T:
    """Options from KEY=VALUE arguments; ValueError for an unknown key or section, or a value of the wrong type."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_cli(list(arguments)))
        options = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{str(error).splitlines()[0]}; --help shows the keys") from error
    assert isinstance(options, schema)
    if unknown := set(getattr(options, "sections", sections)) - set(sections):
        raise ValueError(f"sections has {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    return options


def begin(name: str, arguments: Sequence[str], revision: str | None) -> dict[str, Any]:
    """Where and with what this session measures; `revision` stands in where the folder is no git checkout."""
    here = session(f"experiments/{name}.py", arguments)
    if here["git"] is None and revision is not None:
        here["git"] = {"revision": revision, "dirty": False}
    return here


class Results:
    """NAME.json and NAME.md in a folder, and the journal that they are written from while the run goes on.

    A run with the same setup adds its rows to those of earlier ones, so that sections can be measured one by one.
    """

    def __init__(self, folder: Path, name: str, render: Callable[[dict[str, Any]], str]) -> None:
        self.json, self.markdown = folder / f"{name}.json", folder / f"{name}.md"
        self.partial = folder / f"{name}.partial.jsonl"
        self.render = render

    def measure(self, setup: Mapping[str, Any], here: Mapping[str, Any], jobs: Iterable[Job]) -> None:
        """Do the jobs that no row is there of; the files are whole at every moment."""
        setup = json.loads(json.dumps({**setup, "revision": (here["git"] or {}).get("revision"), "gpu": here["gpu"]}))
        earlier = self._earlier(setup)
        journal = Journal(self.partial, setup)
        for row in earlier if not journal.rows else []:
            journal.add(row)
        journal.add({"key": f"session/{here['date']}/{len(journal.rows)}", "section": "session", **here})
        for key, function in jobs:
            print(key, file=sys.stderr, flush=True)
            if journal.measure(key, function):
                self._write(setup, journal.rows)
        self._write(setup, journal.rows)
        self.write_report()
        journal.path.unlink()

    def write_report(self) -> None:
        """The tables, from the JSON file alone."""
        document = json.loads(self.json.read_text(encoding="utf-8"))
        self.markdown.write_text(self.render(document), encoding="utf-8")

    def _earlier(self, setup: Mapping[str, Any]) -> list[dict[str, Any]]:
        if not self.json.is_file() or self.partial.is_file():
            return []
        document = json.loads(self.json.read_text(encoding="utf-8"))
        return [*document["sessions"], *document["rows"]] if document["setup"] == setup else []

    def _write(self, setup: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for row in rows:
            parts[row["section"] == "session"].append(row)
        document = {"setup": setup, "sessions": parts[True], "rows": parts[False]}
        self.json.write_text(_compact(document) + "\n", encoding="utf-8")


def _compact(document: Any) -> str:
    """JSON with a line for every value, but lists of numbers on one."""
    text = json.dumps(document, indent=1)
    return re.sub(r"\[[\s\d.,eE+-]+\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
