"""Acceptance lengths: drafters, structures and verifiers over one target, greedy and sampled, and what theory says of them.

    python experiments/acceptance.py [dataset.path=FILE.jsonl] [dataset.per_task=4] [KEY=VALUE ...]
    python experiments/acceptance.py --render       write the tables again from the JSON file
    python experiments/acceptance.py --help         all keys with their defaults

Every method answers the first turn of the same prompts. The acceptance length is that of `specdec.metrics`: tokens a forward of
the target, steps that the limit cut short left out. No time is measured, so the machine may do other things. Rows are on disk
as they come; the same command goes on with them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _bench import table
from _command import run_benchmark
from _gpu import Job, parse_options
from _prompts import DatasetOptions, described, read_questions

import specdec
from specdec import composition, metrics
from specdec.decoding import SpeculativeDecoder

NAME = "acceptance"
TREE = "structure@drafter.structure"
DRAWN = "T = 1"
GREEDY = "T = 0"


@dataclass(frozen=True)
class Method:
    """One row of the tables: a drafter with its structure, under a verifier."""

    label: str
    drafter: tuple[str, ...]  # overrides
    verifier: tuple[str, ...] = ("target_only",)  # its name, and overrides


def _eagle(label: str, *overrides: str, verifier: tuple[str, ...] = ("target_only",)) -> Method:
    return Method(f"eagle3 {label}", ("drafter=eagle3", *overrides), verifier)


CHAINS = [_eagle(f"chain of {k}", f"drafter.num_draft_tokens={k}") for k in range(1, 8)]
TREES = [
    _eagle("tree 2-2-1", f"{TREE}=regular", "drafter.structure.num_children=[2,2,1]"),
    _eagle("tree 4-2-1", f"{TREE}=regular", "drafter.structure.num_children=[4,2,1]"),
    _eagle("12 nodes by rank (Sequoia)", f"{TREE}=sequoia"),
    _eagle("12 nodes anew (EAGLE-2)", f"{TREE}=dynamic"),
    _eagle("24 nodes anew (EAGLE-2)", f"{TREE}=dynamic", "drafter.structure.num_draft_tokens=24"),
]
OTHERS = [Method(name, (f"drafter={name}",)) for name in ("ngram", "suffix", "token_recycling")]
K3, SMALL = "drafter.num_draft_tokens=3", (f"{TREE}=regular", "drafter.structure.num_children=[2,2,1]")
SAMPLED = [
    _eagle("chain of 3", K3),
    _eagle("chain of 3", K3, verifier=("speculative_sampling",)),
    _eagle("chain of 3", K3, verifier=("block",)),
    _eagle("chain of 3", K3, verifier=("typical",)),
    _eagle("tree 2-2-1", *SMALL),
    _eagle("tree 2-2-1", *SMALL, verifier=("rrs", "verifier.replacement=false")),
    _eagle("tree 2-2-1", *SMALL, verifier=("traversal",)),
    *OTHERS,
]
ORDERED = [  # law, more and less: (label, verifier)
    (GREEDY, ("eagle3 tree 2-2-1", "target_only"), ("eagle3 chain of 3", "target_only")),
    (GREEDY, ("eagle3 tree 4-2-1", "target_only"), ("eagle3 tree 2-2-1", "target_only")),
    *((GREEDY, (f"eagle3 chain of {k + 1}", "target_only"), (f"eagle3 chain of {k}", "target_only")) for k in range(1, 7)),
    (DRAWN, ("eagle3 chain of 3", "block"), ("eagle3 chain of 3", "speculative_sampling")),
    (DRAWN, ("eagle3 tree 2-2-1", "traversal"), ("eagle3 tree 2-2-1", "rrs")),
    (DRAWN, ("eagle3 tree 2-2-1", "rrs"), ("eagle3 chain of 3", "speculative_sampling")),
]  # fmt: skip


@dataclass
class Options:
    """The keys of the command line."""

    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    target: list[str] = field(default_factory=lambda: ["target=smollm2"])  # overrides
    max_new_tokens: int = 96
    methods: list[str] | None = None  # drafters as the tables name them; null: all
    passes: int = 2  # of the sampled methods, each with a seed of its own
    revision: str | None = None  # of the code, where the folder is no git checkout
    results: str = str(Path(__file__).parent / "results")


class Benchmark:
    """The target, its prompts, and every method on them."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.target: Any = specdec.load(*options.target, "drafter=none").target
        self.questions = read_questions(options.dataset, self.target.tokenizer)
        self.target.tokenizer = None

    def setup(self) -> dict[str, Any]:
        """What every row must share."""
        options = {name: value for name, value in vars(self.options).items() if name != "results"}
        return {**options, **described(self.options.dataset, self.questions)}

    def jobs(self) -> Iterator[Job]:
        """A job a method."""
        for law, temperature, methods, passes in (
            (GREEDY, 0.0, [*OTHERS, *CHAINS, *TREES], 1),
            (DRAWN, 1.0, SAMPLED, self.options.passes),
        ):
            for method in methods:
                if self.options.methods is not None and method.label not in self.options.methods:
                    continue
                key = f"{law}/{method.label}/{'/'.join(method.verifier)}"
                yield key, lambda m=method, law=law, t=temperature, p=passes: self._measure(m, law, t, p)

    def _measure(self, method: Method, law: str, temperature: float, passes: int) -> dict[str, Any]:
        name, *rest = method.verifier
        words = [*method.drafter, f"verifier={name}", *rest, f"sampling.temperature={temperature}"]
        cfg = composition.compose_config(words)
        verifier = composition.build(cfg.verifier, "verifier")
        drafter = composition.build_methods({method.label: cfg.drafter}, verifier)[method.label]
        decoder = SpeculativeDecoder(self.target, drafter, verifier, composition.build_sampling(cfg))
        requests = [
            {"task": question.task, "pass": number, **self._answer(decoder, question.ids, number)}
            for number in range(passes)
            for question in self.questions
        ]
        return {
            "section": law, "drafter": method.label, "verifier": name, "lossless": verifier.lossless,
            "depth": drafter.depth, "nodes": drafter.num_draft_tokens, "requests": requests,
        }  # fmt: skip

    def _answer(self, decoder: SpeculativeDecoder, ids: list[int], seed: int) -> dict[str, Any]:
        trace = decoder.generate([ids], self.options.max_new_tokens, seed).trace.requests[0]
        return {
            name: list(getattr(trace, name)) for name in ("num_nodes", "draft_depth", "num_accepted", "num_emitted")
        }


# ---- the tables ------------------------------------------------------------------------------------------------------


def frame(rows: Sequence[dict[str, Any]], law: str) -> pd.DataFrame:
    """The rows of one law as a trace, whose times are not known."""
    lines = []
    for row in rows:
        for number, request in enumerate(row["requests"] if row["section"] == law else []):
            steps = len(request["num_accepted"])
            times = {name: [np.nan] * steps for name in metrics.STEP_COLUMNS if name.endswith("_seconds")}
            lines.append({
                "run": law, "drafter": row["drafter"], "verifier": row["verifier"], "lossless": row["lossless"],
                "equal_to_plain": None, "turn": 0, "request": number, **request, **times,
            })  # fmt: skip
    return pd.DataFrame(lines)


def lengths(trace: pd.DataFrame) -> pd.DataFrame:
    """Tokens and steps of every request, steps cut short left out; indexed by drafter, verifier, task and request."""
    steps = metrics.steps(trace)
    steps = steps[steps["whole"]].assign(tokens=lambda x: x["num_accepted"] + 1, steps=1)
    return steps.groupby(["drafter", "verifier", "task", "request"])[["tokens", "steps"]].sum()


def difference(found: pd.DataFrame, more: tuple[str, str], less: tuple[str, str]) -> tuple[float, float, float]:
    """Mean over tasks of the difference in acceptance length, with its 95% bootstrap interval over requests, in pairs."""
    draw, tasks = np.random.default_rng(0), []
    for task in found.index.unique("task"):
        both = [found.loc[(*method, task)] for method in (more, less)]
        shared = both[0].index.intersection(both[1].index)
        picked = np.vstack([np.arange(len(shared)), draw.integers(0, len(shared), (metrics.RESAMPLES, len(shared)))])
        sums = [part.loc[shared].to_numpy()[picked].sum(1) for part in both]
        tasks.append(sums[0][:, 0] / sums[0][:, 1] - sums[1][:, 0] / sums[1][:, 1])
    mean = np.mean(tasks, axis=0)
    low, high = np.quantile(mean[1:], [0.025, 0.975])
    return float(mean[0]), float(low), float(high)


def render(document: dict[str, Any]) -> str:
    """The Markdown file."""
    setup, here, rows = document["setup"], document["sessions"][-1], document["rows"]
    revision, versions = (here["git"] or {}).get("revision", "unknown"), here["versions"]
    text = [
        "# Acceptance lengths",
        f"{setup['target'][0].partition('=')[2]}, first turns of {setup['prompts']} prompts ({setup['dataset']['path']}),\n"
        f"up to {setup['max_new_tokens']} tokens each; sampled methods {setup['passes']} times. Tokens a forward, the\n"
        "target's own included, with 95% bootstrap intervals over requests; all: the mean over tasks. Lossless but where\n"
        "marked.",
        f"Revision {revision[:12]}; {here['date'][:10]}; torch {versions['torch']}.",
        "\n".join(f"    {session['command']}" for session in document["sessions"]),
    ]
    for law in (GREEDY, DRAWN):
        trace = frame(rows, law)
        if trace.empty:
            continue
        tau, tasks = metrics.acceptance_length(trace), list(dict.fromkeys(trace["task"]))
        lines = []
        for row in (row for row in rows if row["section"] == law):
            cells = [tau.loc[(law, row["drafter"], row["verifier"], task)] for task in (metrics.ALL, *tasks)]
            name = row["verifier"] + ("" if row["lossless"] else " (lossy)")
            whole = f"{cells[0]['tau']:.2f} [{cells[0]['tau_low']:.2f}, {cells[0]['tau_high']:.2f}]"
            lines.append([row["drafter"], name, row["nodes"], whole, *(f"{cell['tau']:.2f}" for cell in cells[1:])])
        text += [f"## {law}", table(["drafter", "verifier", "nodes", metrics.ALL, *tasks], lines)]
    checks = []
    for law in (GREEDY, DRAWN):
        trace = frame(rows, law)
        there = {(row["drafter"], row["verifier"]) for row in rows if row["section"] == law}
        for _, more, less in (pair for pair in ORDERED if pair[0] == law and {pair[1], pair[2]} <= there):
            mean, low, high = difference(lengths(trace), more, less)
            holds = "yes" if low >= 0 else "no" if high < 0 else "within the interval"
            names = [f"{label}, {verifier}" for label, verifier in (more, less)]
            checks.append([law, *names, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", holds])
    if checks:
        headers = ["law", "should accept at least as much", "as", "difference", "holds"]
        text += ["## What theory orders", table(headers, checks)]
    return "\n\n".join(text).rstrip() + "\n"


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    run_benchmark(NAME, __doc__, partial(parse_options, Options, sections=[]), Benchmark, render, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
