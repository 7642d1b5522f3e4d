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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from _acceptance_report import ADAPTIVE, DRAWN, FIXED, GREEDY, RULES, render
from _command import run_benchmark
from _gpu import Job, parse_options
from _prompts import DatasetOptions, described, read_questions

import specdec
from specdec import composition
from specdec.decoding import SpeculativeDecoder

NAME = "acceptance"
COUNTS = ("num_nodes", "draft_depth", "num_accepted", "num_emitted")


@dataclass(frozen=True)
class Method:
    """One row of the tables: a drafter with its structure, under a verifier."""

    label: str
    drafter: tuple[str, ...]  # overrides
    verifier: tuple[str, ...] = ("target_only",)  # its name, and overrides

    @property
    def rule(self) -> str:
        """The verifier as the tables name it."""
        return " ".join(word.removeprefix("verifier.") for word in self.verifier)

    def under(self, *verifier: str) -> Method:
        """The same drafter under another verifier."""
        return replace(self, verifier=verifier)


def _structured(label: str, structure: str, *settings: str) -> Method:
    keys = (f"drafter.structure.{setting}" for setting in settings)
    return Method(label, ("drafter=eagle3", f"structure@drafter.structure={structure}", *keys))


def _named(*names: str) -> list[Method]:
    return [Method(name, (f"drafter={name}",)) for name in names]


PLAIN = _named("none")
LOOKUPS = _named("ngram", "suffix", "token_recycling", "lookahead", "hybrid")
MODELS = _named("medusa", "small_model")
CHAINS = [Method(f"{FIXED}{k}", ("drafter=eagle3", f"drafter.num_draft_tokens={k}")) for k in range(1, 8)]
ADAPTIVES = [
    _structured(
        f"{ADAPTIVE}{rule} {least}", "adaptive", "num_draft_tokens=7", f"rule={rule}", f"min_probability={least}"
    )
    for rule, pair in RULES.items()
    for least in pair
]
SMALL = _structured("eagle3 tree 2-2-1", "regular", "num_children=[2,2,1]")
TREES = [
    SMALL,
    _structured("eagle3 tree 4-2-1", "regular", "num_children=[4,2,1]"),
    _structured("eagle3 12 nodes by rank (Sequoia)", "sequoia"),
    _structured("eagle3 12 nodes anew (EAGLE-2)", "dynamic"),
    _structured("eagle3 24 nodes anew (EAGLE-2)", "dynamic", "num_draft_tokens=24"),
]
SHORT, LONG = CHAINS[2], CHAINS[6]  # fly needs as many drafts behind a mismatch as its window
METHODS = {
    GREEDY: [
        *PLAIN, *LOOKUPS, *MODELS, *CHAINS, *ADAPTIVES, *TREES,
        SHORT.under("relaxed_acceptance"),
        LONG.under("fly"),
        LONG.under("fly", "verifier.window=2"),
    ],
    DRAWN: [
        *PLAIN, *LOOKUPS, *(method.under("speculative_sampling") for method in MODELS),
        SHORT,
        *(SHORT.under(name) for name in ("speculative_sampling", "block", "typical", "relaxed_acceptance", "static_ensemble")),
        LONG,
        LONG.under("fly", "verifier.window=2"),
        SMALL,
        *(SMALL.under(name) for name in ("rrs", "kseq")),
        SMALL.under("rrs", "verifier.replacement=false"),
        SMALL.under("traversal"),
    ],
}  # fmt: skip


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
        for law, methods in METHODS.items():
            for method in methods:
                if self.options.methods is None or method.label in self.options.methods:
                    yield f"{law}/{method.label}/{method.rule}", partial(self._measure, method, law)

    def _measure(self, method: Method, law: str) -> dict[str, Any]:
        name, *rest = method.verifier
        temperature, passes = (0.0, 1) if law == GREEDY else (1.0, self.options.passes)
        words = [*method.drafter, f"verifier={name}", *rest, f"sampling.temperature={temperature}"]
        cfg = composition.compose_config(words)
        verifier = composition.build(cfg.verifier, "verifier")
        drafter = composition.build_methods({method.label: cfg.drafter}, verifier)[method.label]
        scored = method in PLAIN or not verifier.lossless  # a lossless text is as likely as a plain one
        decoder = SpeculativeDecoder(self.target, drafter, verifier, composition.build_sampling(cfg), logprobs=scored)
        requests = [
            {"task": question.task, "pass": number, **self._answer(decoder, question.ids, number)}
            for number in range(passes)
            for question in self.questions
        ]
        return {
            "section": law, "drafter": method.label, "verifier": method.rule, "lossless": verifier.lossless,
            "depth": drafter.depth, "nodes": drafter.num_draft_tokens, "requests": requests,
        }  # fmt: skip

    def _answer(self, decoder: SpeculativeDecoder, ids: list[int], seed: int) -> dict[str, Any]:
        trace = decoder.generate([ids], self.options.max_new_tokens, seed).trace.requests[0]
        counts = {name: list(getattr(trace, name)) for name in COUNTS}
        return counts | ({"logprobs": [round(value, 4) for value in trace.logprobs]} if decoder.logprobs else {})


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    run_benchmark(NAME, __doc__, partial(parse_options, Options, sections=[]), Benchmark, render, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
