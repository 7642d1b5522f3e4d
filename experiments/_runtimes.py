"""One prompt through transformers' generate, some through our loop: the same clock on both.

Prefill ends where the first token is there; decoding is everything behind it, so that prefill and decoding are all the
time there is. A row's whole_tokens / whole_steps is the acceptance length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from specdec.decoding import GenerationResult, SpeculativeDecoder
from specdec.drafter import Drafter
from specdec.types import Acceptance


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt as token ids."""

    name: str
    task: str
    ids: list[int]


class Stamps(BaseStreamer):  # type: ignore[misc]
    """When generate handed out tokens, and how many; the first entry is the prompt."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.counts: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.seconds.append(perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        """Nothing is held back."""


class Stopwatch(SpeculativeDecoder):
    """The decoder, noting when its first step begins."""

    first_step: float | None = None

    def step(self) -> Acceptance:
        if self.first_step is None:
            self.first_step = perf_counter()
        return super().step()


def target_words(checkpoint: str | None) -> list[str]:
    """Overrides for a Llama-family folder; None: SmolLM2-135M-Instruct."""
    return ["target=smollm2"] if checkpoint is None else ["target=llama", f"target.checkpoint={checkpoint}"]


def run_transformers(model: Any, lookup: int | None, question: Question, new: int) -> dict[str, Any]:
    """One prompt through `generate`. tau leaves out the last forward, whose drafts the limit cuts short."""
    stamps = Stamps()
    options = {} if lookup is None else {"prompt_lookup_num_tokens": lookup}
    ids = torch.tensor([question.ids])
    begin = perf_counter()
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, streamer=stamps, **options
    )
    end = perf_counter()
    tokens = output[0, len(question.ids) :].tolist()
    _check_length(tokens, new)
    whole = stamps.counts[2:-1]
    return {
        "prefill_seconds": stamps.seconds[1] - begin,
        "decode_seconds": end - stamps.seconds[1],
        "decode_tokens": new - stamps.counts[1],
        "steps": len(stamps.counts) - 2,
        "whole_tokens": sum(whole),
        "whole_steps": len(whole),
        "digests": [digest(tokens)],
    }


def run_ours(target: Any, drafter: Drafter, verifier: Any, questions: Sequence[Question], new: int) -> dict[str, Any]:
    """Prompts as one batch through our loop."""
    decoder = Stopwatch(target, drafter, verifier, batch_size=len(questions))
    begin = perf_counter()
    result = decoder.generate([question.ids for question in questions], new, ignore_eos=True)
    end = perf_counter()
    requests = result.trace.requests
    first = decoder.first_step or end
    return {
        "prefill_seconds": first - begin,
        "decode_seconds": end - first,
        **counted(result, new),
        "step_seconds": sum(sum(r.step_seconds) for r in requests),
        "verify_seconds": sum(sum(r.verify_seconds) for r in requests),
    }


def counted(result: GenerationResult, new: int) -> dict[str, Any]:
    """What a batch of prompts to exactly `new` tokens each was decoded in.

    whole_*: steps that the limit did not cut short. full_*: tokens and seconds while no row had ended; a batch that begins
    together is as slow as its slowest row, one that is refilled goes on at this speed.
    """
    for tokens in result.tokens:
        _check_length(tokens, new)
    requests = result.trace.requests
    pairs = [pair for r in requests for pair in zip(r.num_accepted, r.num_emitted, strict=True)]
    whole = [emitted for accepted, emitted in pairs if emitted == accepted + 1]
    full = min(len(r.num_emitted) for r in requests)
    return {
        "decode_tokens": sum(len(tokens) - 1 for tokens in result.tokens),
        "steps": len(pairs),
        "whole_tokens": sum(whole),
        "whole_steps": len(whole),
        "full_tokens": sum(sum(r.num_emitted[:full]) for r in requests),
        "full_seconds": sum(sum(r.step_seconds[:full]) for r in requests),
        "digests": [digest(tokens) for tokens in result.tokens],
    }


def _check_length(tokens: list[int], new: int) -> None:
    if len(tokens) != new:
        raise RuntimeError(f"a runtime made {len(tokens)} tokens of {new}: lengths must be equal to be compared")


def digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(repr(list(tokens)).encode()).hexdigest()[:16]
