"""Our decode loop on one GPU: speed by method and by batch, and where the time of a step goes.

    python experiments/gpu_decoding.py [dataset.path=FILE.jsonl] [sections=[decode,forward]] [KEY=VALUE ...]
    python experiments/gpu_decoding.py --render       write the tables again from the JSON file
    python experiments/gpu_decoding.py --help         all keys with their defaults

ceiling: what plain torch reaches. decode: methods in turns at batch 1. batch: plain and drafted decoding at growing batches.
forward: M tokens in one graph, beside the memory's floor. host: launches, gaps, captures. prefill: beside the matrix ceiling.
fp8: speed and quality against bf16. bits: logits of a token for every M, as chain, tree and batch. Everything decodes greedily
to exactly max_new_tokens, past any end token. Stopped in between, the same command goes on; other sections add to the results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from _bench import with_facts
from _command import run_benchmark
from _gpu import Job, ceilings, parse_options, random_ids
from _gpu_forward import bits_row, forward_row, prefill_row, shapes_of
from _gpu_quality import compare
from _gpu_report import render
from _gpu_steps import Timed, decode, host_row
from _prompts import DatasetOptions, described, read_questions
from _runtimes import Question, target_words
from cpu_decoding import make_drafter

import specdec
from specdec.decoding.decoder import capacity

NAME = "gpu_decoding"
MOST_NODES = 128  # of any drafter's tree: one cache serves all, so that no graph is captured again for a larger one
SECTIONS = ["ceiling", "decode", "batch", "forward", "host", "prefill", "fp8", "bits"]


@dataclass
class Options:
    """The keys of the command line."""

    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    checkpoint: str | None = None  # a Llama-family folder; null: SmolLM2-135M-Instruct
    dtype: str = "bfloat16"
    device: str = "auto"
    max_new_tokens: int = 256
    passes: int = 3
    drafters: list[str] = field(default_factory=lambda: ["none", "ngram", "token_recycling", "suffix"])
    batches: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    batch_drafters: list[str] = field(default_factory=lambda: ["none", "ngram"])
    tokens: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])  # M of forward and bits
    contexts: list[int] = field(default_factory=lambda: [256, 1024, 4096])
    repeats: int = 200  # timings of each forward
    profile_steps: int = 50
    prefill_tokens: list[int] = field(default_factory=lambda: [1024, 8192])
    prefill_chunks: list[int] = field(default_factory=lambda: [256, 2048])
    fp8_prompts: int = 12
    read_megabytes: int = 2048  # memory that the ceiling's sum reads
    matmul: int = 8192  # rows and columns of the ceiling's product
    sections: list[str] = field(default_factory=lambda: list(SECTIONS))
    revision: str | None = None  # of the code, where the folder is no git checkout
    results: str = str(Path(__file__).parent / "results")


class Benchmark:
    """The target, its prompts, and the jobs of every section."""

    def __init__(self, options: Options) -> None:
        torch.manual_seed(0)
        self.options = options
        decoder = specdec.load(*self._target(), f"target.dtype={options.dtype}", "drafter=none")
        self.target: Any = decoder.target
        self.verifier = decoder.verifier
        self.questions = read_questions(options.dataset, self.target.tokenizer)
        self.target.tokenizer = None  # token ids only; nobody pays for text
        self.decoder = cache(self._decoder)

    def _target(self) -> list[str]:
        return [*target_words(self.options.checkpoint), f"target.device={self.options.device}"]

    @cached_property
    def quantized(self) -> Any:
        """The same checkpoint in FP8."""
        target = specdec.load(*self._target(), "target.quantize=fp8", "drafter=none").target
        target.tokenizer = None
        return target

    def setup(self) -> dict[str, Any]:
        """What every row must share: options that change measurements, the prompts' ids."""
        options = {name: value for name, value in vars(self.options).items() if name not in ("results", "sections")}
        options["checkpoint"] = self.target.checkpoint.name
        return {**options, **described(self.options.dataset, self.questions)}

    def _decoder(self, name: str, batch: int, quantized: bool, number: int) -> Timed:
        """One decoder for a whole pass, so that its graphs are captured once: warmed up with random tokens of all sizes."""
        target = self.quantized if quantized else self.target
        decoder = Timed(target, make_drafter(name), self.verifier, batch_size=batch)
        new = self.options.max_new_tokens
        target.allocate(batch, max(len(question.ids) for question in self.questions) + new, MOST_NODES)
        longest: dict[int, int] = {}
        for length in (len(question.ids) for question in self.questions):
            size = capacity(length + new + decoder.drafter.num_draft_tokens + 1)
            longest[size] = max(length, longest.get(size, 0))
        for length in longest.values():
            ids = random_ids(target.config.vocab_size, length).tolist()
            decode(decoder, [ids] * batch, new)
        return decoder

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def jobs(self) -> Iterator[Job]:
        """All measurements of the sections asked for."""
        makers: dict[str, Callable[[], Iterator[Job]]] = {
            "ceiling": self._ceiling, "bits": self._bits, "forward": self._forward, "prefill": self._prefill,
            "host": self._host, "decode": self._decode, "batch": self._batch, "fp8": self._fp8,
        }  # fmt: skip
        for section, maker in makers.items():
            if section in self.options.sections:
                for key, measure in maker():
                    yield f"{section}/{key}", partial(with_facts, {"section": section}, measure)

    def _ceiling(self) -> Iterator[Job]:
        o = self.options
        yield "all", partial(ceilings, self.target.device, o.read_megabytes, o.matmul, 20)

    def _bits(self) -> Iterator[Job]:
        most, context = max(self.options.tokens), min(self.options.contexts)
        for shape, m in shapes_of(self.options.tokens):
            yield f"{shape}/{m}", partial(bits_row, self.target, shape, m, context, most)

    def _forward(self) -> Iterator[Job]:
        for context in self.options.contexts:
            for m in self.options.tokens:
                yield f"{context}/{m}", partial(forward_row, self.target, m, context, self.options.repeats)

    def _prefill(self) -> Iterator[Job]:
        for length in self.options.prefill_tokens:
            for chunk in self.options.prefill_chunks:
                yield f"{length}/{chunk}", partial(prefill_row, self.target, length, chunk, 5)

    def _host(self) -> Iterator[Job]:
        for name in self.options.drafters:
            yield name, partial(with_facts, {"drafter": name}, partial(self._host_row, name))

    def _host_row(self, name: str) -> dict[str, Any]:
        decoder = Timed(self.target, make_drafter(name), self.verifier)
        return host_row(decoder, self.questions[0].ids, self.options.max_new_tokens, self.options.profile_steps)

    def _decode(self) -> Iterator[Job]:
        """Prompt by prompt, all methods in turns; another one begins each time. Drafters that learn begin each pass anew."""
        names = self.options.drafters
        for number in range(self.options.passes):
            for i, question in enumerate(self.questions):
                start = (i + number) % len(names)
                for name in (*names[start:], *names[:start]):
                    facts = {"drafter": name, "pass": number, "question": question.name, "task": question.task}
                    run = partial(self._run, name, [question], False, number)
                    yield f"{number}/{question.name}/{name}", partial(with_facts, facts, run)

    def _batch(self) -> Iterator[Job]:
        """Prompts spread over the tasks; where a batch is larger than the dataset they come again."""
        names = self.options.batch_drafters
        for size in self.options.batches:
            count = len(self.questions)
            group = [self.questions[i * max(1, count // size) % count] for i in range(size)]
            for number in range(self.options.passes):
                start = number % len(names)
                for name in (*names[start:], *names[:start]):
                    facts = {"drafter": name, "pass": number, "batch": size}
                    run = partial(self._run, name, group, False, -1)
                    yield f"{size}/{number}/{name}", partial(with_facts, facts, run)

    def _fp8(self) -> Iterator[Job]:
        """Answers of each of the two, scored by both; the speed of each, in turns."""
        step = max(1, len(self.questions) // self.options.fp8_prompts)
        for question in self.questions[::step][: self.options.fp8_prompts]:
            for writer in ("plain", "fp8"):
                facts = {"question": question.name, "writer": writer}
                yield f"{question.name}/{writer}", partial(with_facts, facts, partial(self._fp8_row, question, writer))

    def _fp8_row(self, question: Question, writer: str) -> dict[str, Any]:
        decoder = self.decoder("none", 1, writer == "fp8", -1)
        speed = decode(decoder, [question.ids], self.options.max_new_tokens)
        answer = decoder.generate([question.ids], self.options.max_new_tokens, ignore_eos=True).tokens[0]
        return {**speed, **compare(self.target, self.quantized, question.ids, answer)}

    def _run(self, name: str, questions: Sequence[Question], quantized: bool, number: int) -> dict[str, Any]:
        decoder = self.decoder(name, len(questions), quantized, number)
        return decode(decoder, [question.ids for question in questions], self.options.max_new_tokens)


def parse(arguments: Sequence[str]) -> Options:
    """Options from KEY=VALUE arguments; ValueError for a mistake."""
    options = parse_options(Options, arguments, SECTIONS)
    for name, needed in (("drafters", options.drafters), ("batch_drafters", options.batch_drafters)):
        if "none" not in needed:
            raise ValueError(f"{name}={needed} has nothing to compare with: add none")
    if min(options.max_new_tokens - 1, options.passes, options.repeats, options.profile_steps) < 1:
        raise ValueError("max_new_tokens must be at least 2; passes, repeats and profile_steps at least 1")
    return options


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    run_benchmark(NAME, __doc__, parse, Benchmark, render, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
