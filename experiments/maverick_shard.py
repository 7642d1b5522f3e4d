"""Decode steps of one rank of Llama 4 Maverick, sharded over 8: the pieces that a projection of the whole machine needs.

    python experiments/maverick_shard.py [layers=4] [KEY=VALUE ...]      layers: only the first so many, for a quick look
    python experiments/maverick_shard.py --render                        write the tables again from the JSON file
    python -m specdec.projection experiments/results/measured.json       tokens/s of 8 GPUs from them

The rank has random FP8 weights and takes no part in all-reduces: none are in the times. It runs the loop of real use with its
graph; a drafter proposes a fixed chain, so that a forward has M = 1 + drafts tokens. No prompt is prefilled: the cache is
filled with noise and said to hold the context, which the measured steps end below. Routing is forced in every mixture: "one"
sends all tokens to one expert, "uniform" draws, "distinct" gives each its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _command import run_benchmark
from _gpu import (
    Job,
    ceilings,
    expert_bytes,
    fill_cache,
    kv_read,
    parse_options,
    products,
    random_ids,
    spread,
    wait,
)  # fmt: skip
from _gpu_shard_report import render
from _gpu_steps import WARM, Timed, kernel_rows, profiled, summary
from torch import Tensor

from specdec.drafter import Drafter
from specdec.nn import ModelConfig
from specdec.target.llama import Llama
from specdec.target.loading import parse_shard
from specdec.target.presets import read_preset
from specdec.types import DraftInputs, DraftTree, Law, ModelOutput
from specdec.verifier.target_only import TargetOnly

NAME = "maverick_shard"
SECTIONS = ["ceiling", "step", "profile"]
ROUTINGS = ("one", "uniform", "distinct")
MOST = 64  # tokens of a forward, as many as a forced routing names


@dataclass
class Options:
    """The keys of the command line."""

    layers: int | None = None  # only the first so many
    sizes: dict[str, int] = field(default_factory=dict)  # other sizes than the preset's, in the words of a config.json
    shard: str = "0/8"
    device: str = "auto"
    tokens: list[int] = field(default_factory=lambda: [1, 2, 4, 8])  # M
    contexts: list[int] = field(default_factory=lambda: [1024, 8192])
    routings: list[str] = field(default_factory=lambda: list(ROUTINGS))
    steps: int = 200  # measured in each cell
    profile_steps: int = 20
    read_megabytes: int = 2048
    matmul: int = 8192
    machine: str = "h200"  # what measured.json says it was measured on
    sections: list[str] = field(default_factory=lambda: list(SECTIONS))
    revision: str | None = None  # of the code, where the folder is no git checkout
    results: str = str(Path(__file__).parent / "results")


class ShardedTarget(Llama):
    """One rank's part of a preset, whose prompts are taken as read: their K/V are noise."""

    def __init__(self, config: ModelConfig, shard: str, device: str) -> None:
        self._build(config, None, "bfloat16", device, "auto", None, None, quantized=True, shard=parse_shard(shard))
        for experts in self.mixtures:
            experts.forced = torch.zeros(MOST, dtype=torch.int32, device=self.device)

    @property
    def mixtures(self) -> list[Any]:
        return [layer.experts for layer in self.model.layers if layer.experts is not None]

    def route(self, routing: str, tokens: int) -> float:
        """Force every mixture's experts, in place so that graphs see it; returns the mean number of distinct ones."""
        counts = []
        for i, experts in enumerate(self.mixtures):
            count = len(experts.router)
            drawn = random_ids(count, MOST, seed=i)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(i))
            ids = {"one": drawn[:1].expand(MOST), "uniform": drawn, "distinct": order.repeat(MOST // count + 1)[:MOST]}
            experts.forced.copy_(ids[routing])
            counts.append(len(set(ids[routing][:tokens].tolist())))
        return sum(counts) / max(len(counts), 1)

    def prefill(self, tokens: Tensor, lengths: Tensor) -> ModelOutput:
        """The lengths alone; the first token is number 0."""
        fill_cache(self, int(lengths.max()))
        self.lengths = lengths.to(self.device, torch.int32)
        return ModelOutput(torch.zeros(len(tokens), 1, self.config.vocab_size // self.shard.world, device=self.device))


class FixedChain(Drafter):
    """Proposes the same random tokens again and again: what a forward costs does not depend on what is accepted."""

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = self.depth = num_draft_tokens

    def setup(self, target: Any, batch_size: int, max_len: int, law: Law) -> None:
        """Draw the tokens."""
        self.drafts = random_ids(target.config.vocab_size, self.depth).to(target.device).expand(batch_size, -1)

    def prefill(self, inputs: DraftInputs) -> bool:
        """Nothing of the prompt is read."""
        return True

    def propose(self, inputs: DraftInputs) -> DraftTree:
        return DraftTree.chain(inputs.root, self.drafts)


class Benchmark:
    """The shard and the cells that are measured."""

    def __init__(self, options: Options) -> None:
        self.options = options
        sizes = {**options.sizes} | ({} if options.layers is None else {"num_hidden_layers": options.layers})
        self.config = ModelConfig.from_huggingface(read_preset("maverick") | sizes)
        self.target: Any = ShardedTarget(self.config, options.shard, options.device)

    def setup(self) -> dict[str, Any]:
        """What every row must share."""
        options = {k: v for k, v in vars(self.options).items() if k not in ("results", "sections")}
        weights = sum(size for _, size in products(self.target))
        held = sum(_held(experts) for experts in self.target.mixtures)
        shown = {"num_layers": self.config.num_layers, "num_experts": self.config.num_experts}
        return {**options, **shown, "dense_bytes": weights, "expert_bytes_held": held}

    def jobs(self) -> Iterator[Job]:
        """All measurements of the sections asked for."""
        o = self.options
        if "ceiling" in o.sections:
            yield "ceiling", self._ceiling
        for section, measure in (("step", self._step), ("profile", self._profile)):
            for context in o.contexts if section in o.sections else []:
                for m in o.tokens:
                    for routing in o.routings if m > 1 else o.routings[:1]:  # one token has one expert
                        facts = {"section": section, "context": context, "tokens": m, "routing": routing}
                        key = f"{section}/{context}/{m}/{routing}"
                        yield key, partial(self._cell, facts, measure)

    def _ceiling(self) -> dict[str, Any]:
        o = self.options
        return {"section": "ceiling", **ceilings(self.target.device, o.read_megabytes, o.matmul, 20)}

    def _cell(self, facts: dict[str, Any], measure: Any) -> dict[str, Any]:
        """What a step reads, then what it takes."""
        m, context = facts["tokens"], facts["context"]
        distinct = self.target.route(facts["routing"], m)
        count = self.config.num_experts
        expected = count * (1 - (1 - 1 / count) ** m) if facts["routing"] == "uniform" else distinct
        decoder = Timed(self.target, FixedChain(m - 1), TargetOnly())
        decoder.restart()
        seen = {"experts": distinct, "expected_experts": expected}
        result = measure(decoder, context)
        sizes = {**expert_bytes(self.target, m), "attention_kernel": kv_read(self.target, context - 1)}
        dense = sum(size for _, size in products(self.target))
        if "work" in result:
            works, steps = result.pop("work")
            result["kernels"] = kernel_rows(works, steps, products(self.target), sizes)
        return {**facts, **seen, "bytes": dense + sum(sizes.values()), **result}

    def _step(self, decoder: Timed, context: int) -> dict[str, Any]:
        """us of a step, from read to read in the loop's trace, and on the device between two events."""
        decoder.events = True
        new = WARM + self.options.steps + 1
        if context <= new:
            raise ValueError(
                f"context {context} is too short for steps={self.options.steps}: at most {context - WARM - 2}"
            )
        prompt = random_ids(self.config.vocab_size, context - new).tolist()
        result = decoder.generate([prompt], new, ignore_eos=True)
        wait(self.target.device)
        trace = result.trace.requests[0]
        inside, between = decoder.device_us()
        return {
            "us": spread([seconds * 1e6 for seconds in trace.step_seconds[WARM:]]),
            "device_us": spread(inside) if inside else None,
            "gap_us": spread(between) if between else None,
            "steps": len(trace.num_emitted),
            "emitted": len(trace.tokens),
            "capture_seconds": decoder.captures,
        }

    def _profile(self, decoder: Timed, context: int) -> dict[str, Any]:
        """The kernels of some steps."""
        steps = self.options.profile_steps
        prompt = random_ids(self.config.vocab_size, context - WARM - steps - 4).tolist()
        works = profiled(decoder, prompt, steps)
        return {"profile": summary(works, steps), "work": (works, steps)}


def _held(experts: Any) -> int:
    return sum(int(weight.data.nbytes) for weight in (experts.gate_up, experts.down))


def measured(document: dict[str, Any]) -> dict[str, Any] | None:
    """The document of `specdec.projection`: steps under uniform routing, whose times hold everything but all-reduces."""
    setup, here = document["setup"], document["sessions"][-1]
    rows = [
        row
        for row in document["rows"]
        if row["section"] == "step" and (row["tokens"] == 1 or row["routing"] == "uniform")
    ]
    if not rows:
        return None
    revision = (here["git"] or {}).get("revision", "unknown")[:7]
    layers = "" if setup["layers"] is None else f", only {setup['layers']} layers: no measure of the whole model"
    steps = [
        {
            "batch": 1, "tokens": row["tokens"], "context": row["context"], "experts": row["experts"],
            "us": [row["us"][name] for name in ("p10", "median", "p90")],
        }
        for row in rows
    ]  # fmt: skip
    runtime = {"stub_us": 0, "stubs": 0, "overhead_us": 0, "rows": steps}
    return {
        "source": f"one rank of {setup['shard'].split('/')[1]}, random FP8 weights, uniform routing{layers}; "
        f"{here['gpu'] or here['cpu']}, {here['date'][:10]}, revision {revision}",
        "machine": setup["machine"],
        "ranks": int(setup["shard"].split("/")[1]),
        "runtimes": {"specdec": runtime},
    }


def parse(arguments: Sequence[str]) -> Options:
    """Options from KEY=VALUE arguments; ValueError for a mistake."""
    options = parse_options(Options, arguments, SECTIONS)
    if unknown := set(options.routings) - set(ROUTINGS):
        raise ValueError(f"routings has {', '.join(sorted(unknown))}; there are {', '.join(ROUTINGS)}")
    if not options.routings or min(options.tokens) < 1 or max(options.tokens) > MOST:
        raise ValueError(f"tokens={options.tokens} must be 1 to {MOST}, and routings name at least one")
    longest = WARM + max(options.steps, options.profile_steps) + 4
    if min(options.contexts) <= longest:
        raise ValueError(f"contexts={options.contexts} are too short for so many steps: take contexts above {longest}")
    return options


def main(arguments: Sequence[str]) -> None:
    """The command line; what the projection reads is made of the results, too."""
    results = run_benchmark(NAME, __doc__, parse, Benchmark, render, arguments)
    if (document := measured(json.loads(results.json.read_text(encoding="utf-8")))) is not None:
        path = results.json.with_name("measured.json")
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
