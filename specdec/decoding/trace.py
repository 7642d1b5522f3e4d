"""What happened at each step of each request. Every reported number is a function of this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

STEP_FIELDS = (
    "num_nodes",
    "draft_depth",
    "num_accepted",
    "num_emitted",
    "step_seconds",
    "propose_seconds",
    "verify_seconds",
    "accept_seconds",
)


class RowStep(NamedTuple):
    """What one row got from a step, or from its prefill."""

    num_nodes: int
    draft_depth: int
    num_accepted: int  # -1: it did not run
    tokens: list[int]
    logprobs: list[float]  # of the tokens; empty unless they are kept
    finish: str  # "" while running, then "stop" | "length"


@dataclass(slots=True)
class RequestTrace:
    """One request. Lists hold one entry a decode step; seconds are this request's share of a step's wall time.

    num_nodes counts the root; draft_depth is the deepest proposed node; num_emitted < num_accepted + 1 where a stop token or
    the limit cut the step short. The prefill emits the first token, steps the rest. The parts of a step are NaN where the
    device runs behind the host. logprobs are the tokens' own under the target, in nats, from the logits that verified them:
    at temperature 1, whatever the sampling and the verifier made of those. Empty unless the decoder keeps them.
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""  # "stop" | "length"
    prefill_seconds: float = 0.0
    num_nodes: list[int] = field(default_factory=list)
    draft_depth: list[int] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)
    num_emitted: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    propose_seconds: list[float] = field(default_factory=list)
    verify_seconds: list[float] = field(default_factory=list)
    accept_seconds: list[float] = field(default_factory=list)

    def emit(self, step: RowStep) -> None:
        """Append what the request got."""
        self.tokens += step.tokens
        self.logprobs += step.logprobs
        self.finish = step.finish

    def as_row(self) -> dict[str, Any]:
        """Plain values, as the trace file keeps them."""
        row: dict[str, Any] = {"prompt_tokens": self.prompt_tokens, "tokens": self.tokens, "finish": self.finish}
        row["prefill_seconds"] = self.prefill_seconds
        names = ("logprobs", *STEP_FIELDS) if self.logprobs else STEP_FIELDS
        return row | {name: [None if v != v else v for v in getattr(self, name)] for name in names}  # NaN: null


@dataclass(slots=True)
class Trace:
    """The requests of one `generate`, in the order of the prompts."""

    requests: list[RequestTrace]

    def _matrix(self, name: str, dtype: torch.dtype) -> Tensor:
        width = max((len(request.num_nodes) for request in self.requests), default=0)
        result = torch.full((len(self.requests), width), -1, dtype=dtype)
        for row, request in enumerate(self.requests):
            values = getattr(request, name)
            result[row, : len(values)] = torch.tensor(values, dtype=dtype)
        return result

    @property
    def num_accepted(self) -> Tensor:
        """Accepted drafts, int32 [requests, steps]; -1: not running."""
        return self._matrix("num_accepted", torch.int32)

    @property
    def num_nodes(self) -> Tensor:
        """Verified nodes with the root, int32 [requests, steps]; -1: not running."""
        return self._matrix("num_nodes", torch.int32)

    @property
    def step_seconds(self) -> Tensor:
        """Seconds, f64 [requests, steps]: a step's wall time over the rows that ran; -1: not running."""
        return self._matrix("step_seconds", torch.float64)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per decode step, pooled; steps cut short by a stop or the limit left out. NaN without steps."""
        pairs = [(a + 1, e) for r in self.requests for a, e in zip(r.num_accepted, r.num_emitted, strict=True)]
        whole = [emitted for full, emitted in pairs if emitted == full]
        return sum(whole) / len(whole) if whole else float("nan")


@dataclass(slots=True)
class GenerationResult:
    """What `generate` returns, in the order of the prompts."""

    tokens: list[list[int]]  # new ids; the stop token, if any, is the last one
    text: list[str]  # decoded without special tokens; empty strings without a tokenizer
    trace: Trace

    @property
    def logprobs(self) -> list[list[float]]:
        """Log-probability of each of `tokens`, in nats, see `RequestTrace`; empty lists unless the decoder keeps them."""
        return [request.logprobs for request in self.trace.requests]


@dataclass(slots=True)
class Chunk:
    """A piece of a streamed answer."""

    request: int  # index of the prompt
    tokens: list[int]  # ids emitted by one step
    text: str  # what they add to the text; a character whose bytes are not complete yet waits for the next chunk
    finish: str  # "" while running, then "stop" | "length"
    logprobs: list[float]  # of the tokens; empty unless the decoder keeps them
