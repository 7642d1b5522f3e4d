"""On a GPU: the loop never synchronises, and drafting does not change the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from specdec.decoding import SamplingParams, SpeculativeDecoder
from specdec.drafter import Drafter
from specdec.drafter.lookahead import Lookahead
from specdec.drafter.ngram import NGram
from specdec.drafter.none import NoDraft
from specdec.drafter.token_recycling import TokenRecycling
from specdec.target.toy import Toy
from specdec.testing.replay import Replay
from specdec.verifier import Verifier
from specdec.verifier.block import Block
from specdec.verifier.fly import FLy
from specdec.verifier.kseq import KSeq
from specdec.verifier.relaxed_acceptance import RelaxedAcceptance
from specdec.verifier.rrs import RRS
from specdec.verifier.speculative_sampling import SpeculativeSampling
from specdec.verifier.static_ensemble import StaticEnsemble
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.traversal import Traversal
from specdec.verifier.typical import Typical

pytestmark = pytest.mark.gpu
PROMPTS = [[7, 8, 9, 7, 8, 9, 7, 8], [1], list(range(40, 57))]


@contextmanager
def no_syncs() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def stepped(drafter: Drafter, verifier: Verifier, sampling: SamplingParams) -> None:
    """A few steps as usual, then some during which a synchronisation raises."""
    decoder = SpeculativeDecoder(Toy(device="cuda"), drafter, verifier, sampling, batch_size=3, logprobs=True)
    steps = decoder.stream(PROMPTS, max_new_tokens=60, ignore_eos=True)
    for _ in range(12):
        next(steps)
    with no_syncs():
        for _ in range(3):
            decoder.step()


@pytest.mark.parametrize("drafter", [NoDraft, NGram, TokenRecycling, Lookahead])
def test_drafters_do_not_sync(drafter: type[Drafter]) -> None:
    stepped(drafter(), TargetOnly(), SamplingParams())


@pytest.mark.parametrize(
    "verifier",
    [TargetOnly, SpeculativeSampling, Block, RRS, KSeq, Traversal, Typical, RelaxedAcceptance, StaticEnsemble, FLy],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_verifiers_do_not_sync(verifier: type[Verifier], temperature: float) -> None:
    stepped(NGram(), verifier(), SamplingParams(temperature, 20 if temperature else 0))


@pytest.mark.parametrize("tree", [False, True])
def test_text_is_plain_text(tree: bool) -> None:
    """In f32 on the torch backend this holds up to ties; bit equality is the native kernels' promise."""
    target = Toy(device="cuda")
    alone = SpeculativeDecoder(target, NoDraft(), TargetOnly(), batch_size=3, logprobs=True)
    plain = alone.generate(PROMPTS, 60, ignore_eos=True)
    references = [p + t for p, t in zip(PROMPTS, plain.tokens, strict=True)]
    decoder = SpeculativeDecoder(target, Replay(references, tree=tree), TargetOnly(), batch_size=2, logprobs=True)
    drafted = decoder.generate(PROMPTS, 60, ignore_eos=True)
    assert drafted.tokens == plain.tokens
    assert drafted.logprobs == [pytest.approx(logprobs, abs=1e-4) for logprobs in plain.logprobs]
    assert drafted.trace.acceptance_length > 1.5
