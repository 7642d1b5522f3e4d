"""Every shipped drafter passes the suite, and the suite catches planted faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specdec.decoding import SamplingParams, SpeculativeDecoder
from specdec.decoding import decoder as loop
from specdec.decoding.state import DecodeState
from specdec.drafter import Drafter
from specdec.drafter.hybrid import Hybrid
from specdec.drafter.layer_skip import LayerSkip
from specdec.drafter.lookahead import Lookahead
from specdec.drafter.ngram import NGram
from specdec.drafter.none import NoDraft
from specdec.drafter.small_model import SmallModel
from specdec.drafter.suffix import Suffix
from specdec.drafter.token_recycling import TokenRecycling
from specdec.structure.dynamic import Dynamic
from specdec.structure.sequoia import Sequoia
from specdec.target.toy import Toy
from specdec.testing import ConformanceError, Replay, check_drafter, check_no_sync
from specdec.testing.drafters import PROMPTS
from specdec.types import Acceptance, DraftInputs, DraftTree, ModelOutput
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

DRAFTERS = {
    "hybrid": lambda: Hybrid(NGram(), SmallModel(model=Toy(backend="torch"), num_draft_tokens=3), min_drafts=4),
    "hybrid_host": lambda: Hybrid(Suffix(), TokenRecycling(), min_drafts=2),
    "hybrid_tree": lambda: Hybrid(NGram(3), SmallModel(model=Toy(backend="torch"), structure=[2, 1]), min_drafts=3),
    "none": NoDraft,
    "ngram": NGram,
    "suffix": Suffix,
    "suffix_tree": lambda: Suffix(tree=True, past_outputs=True),
    "lookahead": Lookahead,
    "token_recycling": TokenRecycling,
    "layer_skip": lambda: LayerSkip(exit_layer=1),
    "layer_skip_tree": lambda: LayerSkip(exit_layer=1, structure=[2, 2]),
    "layer_skip_dynamic": lambda: LayerSkip(exit_layer=1, structure=Dynamic(6, top_k=3, depth=3)),
    "small_model": lambda: SmallModel(model=Toy(backend="torch"), num_draft_tokens=3),
    "small_model_dynamic": lambda: SmallModel(model=Toy(backend="torch"), structure=Dynamic(5, top_k=3, depth=4)),
    "small_model_sequoia": lambda: SmallModel(model=Toy(backend="torch"), structure=Sequoia(7, rates=[0.5, 0.2, 0.1])),
    "small_model_tree": lambda: SmallModel(model=Toy(backend="torch"), structure=[2, 1]),
}


@pytest.fixture(scope="module")
def known(toy: Toy) -> list[list[int]]:
    """The suite's prompts with their plain output."""
    prompts = [list(p) for p in PROMPTS]
    plain = SpeculativeDecoder(toy, NoDraft(), TargetOnly()).generate(prompts, 40, ignore_eos=True)
    return [p + t for p, t in zip(prompts, plain.tokens, strict=True)]


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafter_conforms(name: str, toy: Toy) -> None:
    report = check_drafter(DRAFTERS[name], TargetOnly(), toy)
    assert report.acceptance_length > (1.05 if name != "none" else 0.99)


@pytest.mark.parametrize("tree", [False, True])
def test_replay_conforms_and_is_accepted(tree: bool, known: list[list[int]], toy: Toy) -> None:
    report = check_drafter(lambda: Replay(known, tree=tree), TargetOnly(), toy)
    assert report.acceptance_length > (2 if tree else 1.7)


LOSSLESS = [TargetOnly(), SpeculativeSampling(), Block(), RRS(), Traversal(), KSeq()]
LOSSY = [Typical(), StaticEnsemble(), RelaxedAcceptance(), FLy()]


@pytest.mark.parametrize("verifier", [*LOSSLESS, *LOSSY])
def test_verifiers_never_sync(verifier: Any) -> None:
    check_no_sync(NGram(), verifier)


def test_a_self_draft_is_accepted_whole(toy: Toy) -> None:
    drafter = SmallModel(model=Toy(), num_draft_tokens=4)
    for verifier in (TargetOnly(), SpeculativeSampling(), Block()):
        for sampling in (SamplingParams(), SamplingParams(temperature=0.8)):
            if isinstance(verifier, TargetOnly) and sampling.temperature:
                continue  # its argmax drafts are not the target's samples
            decoder = SpeculativeDecoder(toy, drafter, verifier, sampling)
            result = decoder.generate([[3, 4, 5, 6]], 60, ignore_eos=True)
            assert result.trace.acceptance_length == 5


# ---- negative controls: each planted fault must be caught -----------------------------------------------------------


class OffByOneCommit(Toy):
    """Keeps one node too many whenever something was accepted."""

    def commit(self, acceptance: Acceptance) -> None:
        extra = (acceptance.num_accepted > 0).int()
        super().commit(Acceptance(acceptance.path, acceptance.num_accepted + extra, acceptance.next_token))


class NoRollback(Toy):
    """Forgets to move a tree's accepted path behind the prefix."""

    def commit(self, acceptance: Acceptance) -> None:
        self._chain = True
        super().commit(acceptance)


class Greedy(TargetOnly):
    """Accepts the first draft of a chain whatever the target says."""

    def accept(self, tree: DraftTree, logits: Any, sampling: Any) -> Acceptance:
        verdict = super().accept(tree, logits, sampling)
        verdict.num_accepted = verdict.num_accepted.clamp(min=1).minimum(tree.num_nodes - 1)
        return verdict


@pytest.mark.parametrize(("target", "tree"), [(OffByOneCommit, False), (OffByOneCommit, True), (NoRollback, True)])
def test_commit_faults_are_caught(target: type[Toy], tree: bool, known: list[list[int]]) -> None:
    with pytest.raises(ConformanceError, match="changes the text"):
        check_drafter(lambda: Replay(known, tree=tree), TargetOnly(), target())


def test_a_lax_verifier_is_caught(toy: Toy) -> None:
    with pytest.raises(ConformanceError, match="changes the text"):
        check_drafter(NGram, Greedy(), toy)


def test_a_stop_token_inside_a_draft_is_caught(
    toy: Toy, known: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = DecodeState.advance

    def deaf(self: DecodeState, tree: DraftTree, output: ModelOutput, acceptance: Acceptance) -> Any:
        """Looks for stop tokens at the end of a step only."""
        whole = acceptance.num_accepted > 0
        kept = self.stop_ids
        self.stop_ids = torch.where(whole.any(), torch.full_like(kept, -1), kept)
        record = honest(self, tree, output, acceptance)
        self.stop_ids = kept
        return record

    monkeypatch.setattr(DecodeState, "advance", deaf)
    with pytest.raises(ConformanceError, match="stop token"):
        check_drafter(lambda: Replay(known), TargetOnly(), toy)


class Peeking(NGram):
    """Says it is graphable and reads a value."""

    def propose(self, inputs: DraftInputs) -> DraftTree:
        tree = super().propose(inputs)
        return tree.trim(int(tree.num_nodes.max()))


class Oversized(NGram):
    """Proposes more than it declares."""

    def __init__(self) -> None:
        super().__init__(num_draft_tokens=6)
        self.num_draft_tokens = self.depth = 3

    def propose(self, inputs: DraftInputs) -> DraftTree:
        self.num_draft_tokens = 6
        try:
            return super().propose(inputs)
        finally:
            self.num_draft_tokens = 3


class WrongRoot(NGram):
    """Forgets the root."""

    def propose(self, inputs: DraftInputs) -> DraftTree:
        tree = super().propose(inputs)
        tree.tokens = tree.tokens.roll(1, 1)
        return tree


@pytest.mark.parametrize(
    ("drafter", "words"), [(Peeking, "on the host"), (Oversized, "more than the declared"), (WrongRoot, "root")]
)
def test_drafter_faults_are_caught(drafter: type[Drafter], words: str, toy: Toy) -> None:
    with pytest.raises(ConformanceError, match=words):
        check_drafter(drafter, TargetOnly(), toy)


def test_the_loops_own_read_is_named() -> None:
    assert loop.widest_row(DraftTree.chain(torch.zeros(2).long(), torch.zeros(2, 3).long(), torch.tensor([1, 2]))) == 3
