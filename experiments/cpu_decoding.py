"""Our decode loop beside transformers' generate on the CPU: same weights, prompts, lengths and threads, in turns.

    python experiments/cpu_decoding.py [dataset.path=FILE.jsonl] [dataset.per_task=4] [passes=2] [KEY=VALUE ...]
    python experiments/cpu_decoding.py --render       write the tables again from the JSON file
    python experiments/cpu_decoding.py --help         all keys with their defaults

Everything decodes greedily to exactly max_new_tokens, past any end-of-sequence token. A time line is cut in two where
the first token is there: before it prefill, behind it decoding, with all that either runtime does besides its forwards.
Stopped in between, the same command goes on where it was. Results: experiments/results/cpu_decoding.{json,md}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _bench import Journal, session, with_facts
from _command import read_options
from _cpu_report import render
from _forward import forward_jobs
from _gpu import Job, parse_options
from _prompts import DatasetOptions, described, read_questions
from _runtimes import Question, run_ours, run_transformers, target_words
from transformers import AutoModelForCausalLM

import specdec
from specdec.composition import build, compose_config
from specdec.drafter import Drafter

NAME = "cpu_decoding"
SECTIONS = ["decode", "batch", "forward", "product"]
# Does all the work of looking up, then proposes nothing: drafts = int(match length * factor) = 0.
NO_MATCH = {"ngram_no_match": ["drafter=ngram", "drafter.max_spec_factor=0.01"]}


@dataclass
class Options:
    """The keys of the command line."""

    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    checkpoint: str | None = None  # a Llama-family folder; null: SmolLM2-135M-Instruct
    max_new_tokens: int = 256
    passes: int = 2
    dtypes: list[str] = field(default_factory=lambda: ["bfloat16", "float32"])
    drafters: list[str] = field(default_factory=lambda: ["none", "ngram", "suffix", "token_recycling", *NO_MATCH])
    lookup: int = 5  # drafts of transformers' prompt lookup
    batch: int = 8  # rows of the section "batch"
    batch_drafters: list[str] = field(default_factory=lambda: ["none", "ngram"])
    threads: int | None = None  # null: as torch finds
    repeats: int = 20  # timings of every forward and product
    sections: list[str] = field(default_factory=lambda: list(SECTIONS))
    results: str = str(Path(__file__).parent / "results")


def make_drafter(name: str) -> Drafter:
    """A drafter with its config's defaults."""
    drafter: Drafter = build(compose_config(NO_MATCH.get(name, [f"drafter={name}"])).drafter, "drafter")
    return drafter


class Benchmark:
    """Both runtimes with every dtype's weights, and the jobs that compare them."""

    def __init__(self, options: Options) -> None:
        self.options = options
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        kind = target_words(options.checkpoint)
        decoders = {dtype: specdec.load(*kind, "drafter=none", f"target.dtype={dtype}") for dtype in options.dtypes}
        self.verifier = next(iter(decoders.values())).verifier
        self.targets: dict[str, Any] = {dtype: decoder.target for dtype, decoder in decoders.items()}
        self.models = {dtype: self._transformers(target, dtype) for dtype, target in self.targets.items()}
        self.questions = read_questions(options.dataset, next(iter(self.targets.values())).tokenizer)
        for target in self.targets.values():
            target.tokenizer = None  # both runtimes make token ids; neither pays for text

    @staticmethod
    def _transformers(target: Any, dtype: str) -> Any:
        """The same folder as a user of transformers loads it; without an end token both runtimes do the same work."""
        model = AutoModelForCausalLM.from_pretrained(target.checkpoint, dtype=dtype)
        model.generation_config.eos_token_id = None
        return model

    def setup(self) -> dict[str, Any]:
        """What every row of a journal must share: options without paths, the prompts' ids, the code."""
        options = {name: value for name, value in vars(self.options).items() if name != "results"}
        options["checkpoint"] = next(iter(self.targets.values())).checkpoint.name
        prompts = described(self.options.dataset, self.questions)
        return {**options, **prompts, "threads": torch.get_num_threads()}

    def warm_up(self) -> None:
        """Touch the weights and compile what compiles, before anything is timed."""
        warm = Question("", "", self.questions[0].ids[-16:])
        for dtype, target in self.targets.items():
            run_transformers(self.models[dtype], None, warm, 8)
            run_transformers(self.models[dtype], self.options.lookup, warm, 8)
            for name in self.options.drafters:
                run_ours(target, make_drafter(name), self.verifier, [warm], 8)

    def jobs(self) -> Iterator[Job]:
        """All measurements in order. Drafters that learn begin each pass anew."""
        options = self.options
        yield from forward_jobs(self.targets, self.models, options.repeats, options.sections)
        for number in range(options.passes):
            if "decode" in options.sections:
                yield from self._decode_jobs(number)
            if "batch" in options.sections:
                yield from self._batch_jobs(number)

    def _decode_jobs(self, number: int) -> Iterator[Job]:
        """Prompt by prompt, all runtimes and dtypes in turns; another one begins each time."""
        new = self.options.max_new_tokens
        runtimes: dict[tuple[str, str], Callable[[Question, int], dict[str, Any]]] = {}
        for dtype, target in self.targets.items():
            runtimes[dtype, "transformers"] = partial(run_transformers, self.models[dtype], None)
            runtimes[dtype, "transformers prompt_lookup"] = partial(
                run_transformers, self.models[dtype], self.options.lookup
            )
            for name in self.options.drafters:
                runtimes[dtype, f"specdec {name}"] = partial(self._single, target, make_drafter(name))
        order = list(runtimes)
        for i, question in enumerate(self.questions):
            start = (i + number * len(order) // 2) % len(order)
            for dtype, name in (*order[start:], *order[:start]):
                facts = {"section": "decode", "dtype": dtype, "runtime": name, "pass": number}
                facts |= {"question": question.name, "task": question.task, "prompt_tokens": len(question.ids)}
                key = f"decode/{number}/{question.name}/{dtype}/{name}"
                yield key, partial(with_facts, facts, partial(runtimes[dtype, name], question, new))

    def _single(self, target: Any, drafter: Drafter, question: Question, new: int) -> dict[str, Any]:
        return run_ours(target, drafter, self.verifier, [question], new)

    def _batch_jobs(self, number: int) -> Iterator[Job]:
        """Prompts of mixed tasks as whole batches; a remainder that fills no batch is left out."""
        groups = len(self.questions) // self.options.batch
        for i in range(groups):
            group = self.questions[i::groups][: self.options.batch]
            for name in self.options.batch_drafters:
                for dtype, target in self.targets.items():
                    facts = {
                        "section": "batch",
                        "dtype": dtype,
                        "runtime": f"specdec {name}",
                        "pass": number,
                        "group": i,
                    }
                    facts["questions"] = [question.name for question in group]
                    run = partial(
                        run_ours, target, make_drafter(name), self.verifier, group, self.options.max_new_tokens
                    )
                    yield f"batch/{number}/{i}/{dtype}/{name}", partial(with_facts, facts, run)


def parse(arguments: Sequence[str]) -> Options:
    """Options from KEY=VALUE arguments; ValueError for a mistake."""
    options = parse_options(Options, arguments, SECTIONS)
    if "batch" in options.sections and not ("decode" in options.sections and "none" in options.drafters):
        raise ValueError("the section batch is compared with batch 1: keep decode in sections and none in drafters")
    if min(options.max_new_tokens - 1, options.passes, options.batch, options.repeats) < 1:
        raise ValueError("max_new_tokens must be at least 2; passes, batch and repeats at least 1")
    return options


def write_report(folder: Path) -> None:
    """The tables, from the JSON file alone."""
    document = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
    (folder / f"{NAME}.md").write_text(render(document), encoding="utf-8")


def run(options: Options, arguments: Sequence[str]) -> None:
    """Measure what is missing, then write both result files; the journal is needed no longer then."""
    folder = Path(options.results)
    benchmark = Benchmark(options)
    here = session(f"experiments/{NAME}.py", arguments)
    setup = {**benchmark.setup(), "revision": (here["git"] or {}).get("revision")}
    journal = Journal(folder / f"{NAME}.partial.jsonl", setup)
    journal.add({"key": f"session/{here['date']}/{len(journal.rows)}", "section": "session", **here})
    jobs = list(benchmark.jobs())
    benchmark.warm_up()
    for number, (key, measure) in enumerate(jobs, 1):
        print(f"{number}/{len(jobs)} {key}", file=sys.stderr, flush=True)
        journal.measure(key, measure)
    sessions = [row for row in journal.rows if row["section"] == "session"]
    rows = [row for row in journal.rows if row["section"] != "session"]
    text = json.dumps({"setup": setup, "sessions": sessions, "rows": rows}, indent=1)
    (folder / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")
    write_report(folder)
    journal.path.unlink()


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    options = read_options(NAME, __doc__, parse, arguments)
    if "--render" in arguments:
        write_report(Path(options.results))
    else:
        run(options, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
