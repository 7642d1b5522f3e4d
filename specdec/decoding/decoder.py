"""The decode loop: one for every drafter, every verifier, every target, and for plain decoding.

propose -> verify -> accept -> commit -> observe -> stop test and advance -> one row of the trace
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from specdec.decoding.chat import Prompt, TextStream
from specdec.decoding.graph import GraphedStep
from specdec.decoding.params import SamplingParams, check_pair, check_whole, config_name, needs_whole_logits
from specdec.decoding.reader import StepReader, note_step, read_record
from specdec.decoding.requests import Request, make_requests, stop_ids
from specdec.decoding.state import DecodeState
from specdec.decoding.trace import Chunk, GenerationResult, RequestTrace, RowStep, Trace
from specdec.drafter import Drafter
from specdec.sampling import choose
from specdec.target import Target
from specdec.types import Acceptance, DraftTree
from specdec.verifier import Verifier


class SpeculativeDecoder:
    """A target, a drafter and a verifier in one loop. `generate` and `stream` are the whole use of it."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        verifier: Verifier,
        sampling: SamplingParams | None = None,
        batch_size: int = 1,
        use_graphs: bool = True,
        refill: int = 1,
        logprobs: bool = False,
        max_new_tokens: int = 128,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> None:
        """max_new_tokens, seed and ignore_eos are what `generate` and `stream` take where they are given none.

        refill: rows that must have ended before waiting prompts begin: more of them share a forward, some wait longer.

        logprobs: keep what every emitted token's log-probability is under the target's own law (see `RequestTrace`).
        """
        check_pair(drafter, verifier)
        check_whole("batch_size", batch_size, 1)
        check_whole("refill", refill, 1)
        self.target, self.drafter, self.verifier = target, drafter, verifier
        self.sampling = sampling or SamplingParams()
        self.batch_size = batch_size
        self.use_graphs, self.refill, self.logprobs = use_graphs, refill, logprobs
        self.max_new_tokens, self.seed, self.ignore_eos = max_new_tokens, seed, ignore_eos
        self.state: DecodeState | None = None
        self._lengths: Tensor | None = None  # the target's, as this decoder left them
        self.record: Tensor | None = None  # what the last step did, on the device
        self.marks = (0.0, 0.0, 0.0, 0.0)  # times at which its parts began and ended
        self._graphs: GraphedStep[tuple[Acceptance, Tensor]] = GraphedStep()

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={config_name(getattr(self, name))}" for name in ("target", "drafter", "verifier"))
        asked = f"batch_size={self.batch_size}, max_new_tokens={self.max_new_tokens}, seed={self.seed}"
        return f"SpeculativeDecoder({parts}, temperature={self.sampling.temperature}, {asked})"

    @property
    def tokenizer(self) -> Any:
        """The target's, or None."""
        return self.target.tokenizer

    # ---- one step ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> Acceptance:
        """Propose, verify, accept, commit, observe, advance. Reads nothing on the host (but see `widest_row`).

        On a GPU a step is one CUDA graph, unless the drafter must run on the host.
        """
        state = self.state
        assert state is not None, "generate starts the requests"
        if state.tokens.device.type == "cuda" and self.drafter.graphable and self.target.graphable and self.use_graphs:
            static = (state.sampling.mode, state.max_new, state.logprobs)
            roots = (state, self.target, self.drafter, self.verifier)
            acceptance, self.record = self._graphs(self._step, roots, static)
        else:
            acceptance, self.record = self._step()
        self._lengths = self.target.lengths
        return acceptance

    def _step(self) -> tuple[Acceptance, Tensor]:
        """What happens, and its record on the device."""
        state = self.state
        assert state is not None
        begin = perf_counter()
        tree = self.drafter.propose(state.draft_inputs())
        if tree.tokens.device.type == "cpu" and tree.tokens.shape[1] > 1:
            tree = tree.trim(widest_row(tree))
        proposed = perf_counter()
        output = self.target.verify(tree)
        if needs_whole_logits(self.drafter, self.verifier, state.sampling, state.logprobs):
            output = output.whole()
        verified = perf_counter()
        sampling = replace(state.sampling, vocabulary=output.vocabulary) if output.vocabulary else state.sampling
        acceptance = self.verifier.accept(tree, output.logits, sampling)
        acceptance.num_accepted = torch.where(state.running, acceptance.num_accepted, -1)
        self.target.commit(acceptance)
        self.drafter.observe(tree, output, acceptance)
        record = state.advance(tree, output, acceptance)
        self.marks = (begin, proposed, verified, perf_counter())
        return acceptance, record

    # ---- requests ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        seed: int | Sequence[int] | None = None,
        stop: Sequence[int | str] = (),
        ignore_eos: bool | None = None,
    ) -> GenerationResult:
        """Answer prompts: text (one user turn), chat messages, or token ids; one or a list of them.

        Where max_new_tokens, seed or ignore_eos is None the decoder's own holds. `stop`: token ids, or strings that are one
        token, besides the model's own. More prompts than batch rows wait in a queue. Noise is a function of seed and prompt:
        the same two give the same tokens again, whatever shares the batch, and samples of one prompt take a seed each, as in
        generate([prompt] * 8, seed=range(8)).
        """
        requests, traces, new = self._requests(prompts, max_new_tokens, seed)
        for _ in self._run(requests, traces, new, stop, ignore_eos):
            pass
        texts = [self._text(trace.tokens) for trace in traces]
        return GenerationResult([trace.tokens for trace in traces], texts, Trace(traces))

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        seed: int | Sequence[int] | None = None,
        stop: Sequence[int | str] = (),
        ignore_eos: bool | None = None,
    ) -> Iterator[Chunk]:
        """`generate`, a chunk at a time as steps emit tokens."""
        requests, traces, new = self._requests(prompts, max_new_tokens, seed)
        texts = [TextStream(self.tokenizer) for _ in requests]
        for index, step in self._run(requests, traces, new, stop, ignore_eos):
            text = texts[index].add(step.tokens, last=step.finish != "")
            yield Chunk(index, step.tokens, text, step.finish, step.logprobs)

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], max_new_tokens: int | None, seed: int | Sequence[int] | None
    ) -> tuple[list[Request], list[RequestTrace], int]:
        """The requests with traces to fill, and how many tokens each may get."""
        new = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        requests = make_requests(self.target, prompts, new, self.seed if seed is None else seed)
        return requests, [RequestTrace(len(request.ids)) for request in requests], new

    def _text(self, tokens: list[int]) -> str:
        return "" if self.tokenizer is None else str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def _run(
        self,
        requests: list[Request],
        traces: list[RequestTrace],
        new: int,
        stop: Sequence[int | str],
        ignore_eos: bool | None,
    ) -> Iterator[tuple[int, RowStep]]:
        """Run all requests; yields (request, what it got) as steps are read."""
        nodes = self.drafter.num_draft_tokens + 1
        batch = min(self.batch_size, len(requests))
        max_len = max(len(request.ids) for request in requests) + new
        device = self.target.lengths.device
        room = max_len + nodes if device.type == "cpu" else capacity(max_len + nodes)
        self.drafter.setup(self.target, batch, room, self.verifier.law)  # knows now which features it needs
        self.target.allocate(batch, max_len, nodes, self.drafter.features)
        sampling = self.sampling.tensors(batch, device)
        stops = stop_ids(self.target, stop, self.ignore_eos if ignore_eos is None else ignore_eos)
        state = DecodeState.empty(batch, room, stops, sampling, self.logprobs)
        self.state, self._lengths = state, self.target.lengths
        waiting = deque(requests)
        owner: list[int | None] = [None] * batch
        reader = StepReader(device.type == "cuda", self.logprobs)
        while True:
            if self.state is not state or self.target.lengths is not self._lengths:
                raise ValueError(
                    "another generate or stream began on this target before this one ended: let one finish first"
                )
            free = [row for row in range(batch) if owner[row] is None]
            if waiting and len(free) >= min(self.refill, batch, len(waiting)):
                yield from self._begin(waiting, free, owner, traces, new)
                reader.restart()
                continue
            if all(index is None for index in owner):
                return
            self.step()
            assert self.record is not None
            done = reader.swap(self.record, self.marks, list(owner))
            self.target.check()
            if done is not None:
                yield from note_step(*done, owner, traces)

    def _begin(
        self, waiting: deque[Request], free: list[int], owner: list[int | None], traces: list[RequestTrace], new: int
    ) -> Iterator[tuple[int, RowStep]]:
        """Prefill waiting requests into free rows, and choose their first tokens."""
        taken = {row: waiting.popleft() for row in free[: len(waiting)]}
        begin = perf_counter()
        started = self._prefill(taken, new)
        seconds = perf_counter() - begin
        for row, request in taken.items():
            step, trace = started[row], traces[request.index]
            trace.prefill_seconds = seconds / len(taken)
            trace.emit(step)
            if not step.finish:
                owner[row] = request.index
            yield request.index, step

    @torch.inference_mode()
    def _prefill(self, taken: dict[int, Request], new: int) -> list[RowStep]:
        """Fill rows with prompts and start them from the target's next token, which is what every row got."""
        state = self.state
        assert state is not None
        batch, device = len(state.tokens), state.tokens.device
        width = max(len(request.ids) for request in taken.values())
        prompts = torch.zeros(batch, width, dtype=torch.int64)
        lengths = torch.zeros(batch, dtype=torch.int32)
        seeds = torch.zeros(batch, dtype=torch.int64)
        for row, request in taken.items():
            prompts[row, : len(request.ids)] = torch.tensor(request.ids)
            lengths[row], seeds[row] = len(request.ids), request.seed
        rows = (lengths > 0).to(device)
        prompts = prompts.to(device)
        state.begin(rows, prompts, lengths.to(device), (lengths + new).to(device), seeds.to(device))
        output = self.target.prefill(prompts, lengths)
        self._lengths = self.target.lengths
        if bool(output.logits[rows].isnan().any()):  # the host reads the first tokens anyway
            raise ValueError(
                f"the target's logits are NaN after a prompt of {width} tokens or fewer, so no token can be chosen: "
                "its weights are at fault, or its dtype is too narrow for them (try target.dtype=float32)"
            )
        roots = choose(output.logits, state.sampling, state.lengths[:, None] - 1)[:, 0]
        record = state.set_roots(rows, roots, output)
        state.max_new = max(width, state.max_new)
        if self.drafter.prefill(state.draft_inputs()):
            state.keep_last(self.drafter.depth + 1)
        self._graphs.changed()
        return read_record(record.cpu(), state.logprobs)


def capacity(length: int) -> int:
    """Room for a row in powers of two, so that few sets of shapes, and graphs, serve all requests."""
    return max(1024, 1 << (length - 1).bit_length())


def widest_row(tree: DraftTree) -> int:
    """Nodes of the fullest row: the loop's one host read, on the CPU only, where a node more costs time."""
    widths: list[int] = tree.num_nodes.tolist()
    return max(widths)
