"""The law suite passes every verifier and catches every planted fault."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specdec.sampling import STREAM_ACCEPT, STREAM_RESIDUAL, sample, uniform
from specdec.testing.enumeration import enumerate_law
from specdec.testing.errors import ConformanceError
from specdec.testing.laws import CHAIN, TREES, check_verifier
from specdec.testing.prefix_model import PrefixModel, Topology, depth_of, sampling_of
from specdec.types import Acceptance, DraftTree, Sampling
from specdec.verifier import Verifier
from specdec.verifier._common import chain_laws, mass, path_to, pick, real_nodes, residual, target_laws
from specdec.verifier.block import Block
from specdec.verifier.kseq import KSeq
from specdec.verifier.rrs import RRS
from specdec.verifier.speculative_sampling import SpeculativeSampling
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.traversal import Traversal
from specdec.verifier.typical import Typical

ROWS = 16_000


class Plain(Verifier):
    """Speculative sampling written apart from the library's, with a hook for each way to get it wrong."""

    supports_trees = False
    law = "iid"

    def coins(self, tree: DraftTree, sampling: Sampling) -> Tensor:
        index = torch.arange(1, tree.tokens.shape[1])
        return uniform(sampling.seed[:, None], sampling.position[:, None], STREAM_ACCEPT, index)

    def rate(self, target_x: Tensor, draft_x: Tensor) -> Tensor:
        return (target_x / draft_x.clamp(min=1e-30)).clamp(max=1.0)

    def real(self, tree: DraftTree) -> Tensor:
        return real_nodes(tree)

    def recovered(self, target: Tensor, draft: Tensor) -> Tensor:
        return residual(target, draft)

    def emission_row(self, node: Tensor) -> Tensor:
        return node

    def reported(self, node: Tensor, tree: DraftTree) -> Tensor:
        return node

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        target_probs = target_laws(logits, sampling)
        draft_probs = chain_laws(tree, target_probs)
        drafts = tree.tokens[:, 1:]
        rate = self.rate(mass(target_probs[:, :-1], drafts), mass(draft_probs[:, :-1], drafts))
        stands = (self.coins(tree, sampling) < rate) & self.real(tree)[:, 1:]
        node = stands.cumprod(1).sum(1)
        target = pick(target_probs, self.emission_row(node))
        probs = self.recovered(target, pick(draft_probs, node))
        next_token = sample(probs, sampling, sampling.position + node, STREAM_RESIDUAL)
        path, num_accepted = path_to(tree, self.reported(node, tree))
        return Acceptance(path, num_accepted, next_token)


class Generous(Plain):
    def rate(self, target_x: Tensor, draft_x: Tensor) -> Tensor:
        return super().rate(target_x, draft_x) * 1.15


class CappedBelowOne(Plain):
    def rate(self, target_x: Tensor, draft_x: Tensor) -> Tensor:
        return super().rate(target_x, draft_x).clamp(max=0.9)


class RecoversFromTarget(Plain):
    def recovered(self, target: Tensor, draft: Tensor) -> Tensor:
        return target


class WrongEmissionRow(Plain):
    def emission_row(self, node: Tensor) -> Tensor:
        return (node - 1).clamp(min=0)


class OneTooMany(Plain):
    def reported(self, node: Tensor, tree: DraftTree) -> Tensor:
        return torch.minimum(node + 1, tree.num_nodes - 1)


class OneTooFew(Plain):
    def reported(self, node: Tensor, tree: DraftTree) -> Tensor:
        return (node - 1).clamp(min=0)


class OneCoinForAll(Plain):
    def coins(self, tree: DraftTree, sampling: Sampling) -> Tensor:
        return super().coins(tree, sampling)[:, :1]


class Peeks(Plain):
    """Cuts the draft where a drawn token looked unlikely to the drafter: a length decided by what is being judged."""

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        if tree.probs is not None:
            sure = mass(tree.probs[:, :-1], tree.tokens[:, 1:]) > 0.35
            length = (sure.cumprod(1).sum(1) + 1).to(torch.int32)
            tree = replace(tree, num_nodes=torch.minimum(tree.num_nodes, length))
        return super().accept(tree, logits, sampling)


LAW_FAULTS = [
    Generous(),
    CappedBelowOne(),
    RecoversFromTarget(),
    WrongEmissionRow(),
    OneTooMany(),
    OneTooFew(),
    OneCoinForAll(),
    Peeks(),
]


class AcceptsPadding(Plain):
    def real(self, tree: DraftTree) -> Tensor:
        return torch.ones_like(real_nodes(tree))


class CoinsByPlace(Plain):
    def coins(self, tree: DraftTree, sampling: Sampling) -> Tensor:
        return super().coins(tree, replace(sampling, seed=torch.arange(len(sampling.seed))))


class CoinsFromGlobalState(Plain):
    def coins(self, tree: DraftTree, sampling: Sampling) -> Tensor:
        return torch.rand(tree.tokens.shape[0], tree.tokens.shape[1] - 1)


class CoinsRepeat(Plain):
    """The same coins at every step, though tokens are drawn afresh."""

    def coins(self, tree: DraftTree, sampling: Sampling) -> Tensor:
        return super().coins(tree, replace(sampling, position=torch.zeros_like(sampling.position)))


class TokensRepeat(Plain):
    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        fixed = replace(sampling, position=torch.zeros_like(sampling.position))
        verdict = super().accept(tree, logits, sampling)
        return replace(verdict, next_token=super().accept(tree, logits, fixed).next_token)


class WritesIntoLogits(Plain):
    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        verdict = super().accept(tree, logits, sampling)
        logits[:, 0] = 0.0
        return verdict


class UnrelatedPath(TargetOnly):
    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        verdict = super().accept(tree, logits, sampling)
        return replace(verdict, path=torch.cat([verdict.path[:, :1], verdict.path[:, :-1]], 1))


class WithReplacementMislabelled(RRS):
    """Judges siblings as independent but asks for distinct ones."""

    def __init__(self) -> None:
        super().__init__(replacement=True)
        self.law = "distinct"


class LastSiblingWins(TargetOnly):
    """Emits the target's choice at the root whatever the path: right on chains of nothing, wrong on trees."""

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        verdict = super().accept(tree, logits, sampling)
        first = super().accept(replace(tree, num_nodes=torch.ones_like(tree.num_nodes)), logits, sampling)
        return replace(verdict, next_token=first.next_token)


FAULTS = [
    (AcceptsPadding(), "leaves the real nodes"),
    (CoinsByPlace(), "its neighbours"),
    (CoinsFromGlobalState(), "between two calls"),
    (CoinsRepeat(), "depend on the position"),
    (TokensRepeat(), "depend on the position"),
    (WritesIntoLogits(), "inputs in place"),
    (UnrelatedPath(), "parent to child"),
    (WithReplacementMislabelled(), "not lossless"),
    (LastSiblingWins(), "not lossless"),
    *((fault, "not lossless") for fault in LAW_FAULTS),
]
LOSSLESS = [
    TargetOnly(),
    SpeculativeSampling(),
    Block(),
    RRS(replacement=True),
    RRS(replacement=False),
    Traversal(replacement=False),
    Traversal(replacement=True),
    KSeq(),
    Plain(),
]


def name(value: object) -> str:
    return type(value[0] if isinstance(value, tuple) else value).__name__


def exact(verifier: Verifier, topology: Topology, law: str, seed: int = 0, vocab: int = 3) -> tuple[float, float]:
    """Largest error of a text's probability, and the acceptance length; both exact."""
    model = PrefixModel.random(vocab, depth_of(topology) + 1, seed)
    found, length = enumerate_law(verifier, model, topology, sampling_of(1), law)
    nothing = torch.zeros(model.num_prefixes(), dtype=torch.float64)
    nothing[0] = 1.0
    want = model.complete(nothing, model.law(model.target_logits, sampling_of(1)))
    return float((found - want).abs().max()), length


@pytest.mark.parametrize("verifier", LOSSLESS, ids=name)
def test_lossless_verifiers_pass_enumerated_and_sampled(verifier: Verifier) -> None:
    report = check_verifier(verifier, rows=ROWS)
    assert report.enumerated, report.reason
    assert {case.exact for case in report.cases} == {True, False}
    assert "enumerated and sampled" in str(report)


def test_lossy_verifier_is_held_to_the_invariants_and_the_report_says_so() -> None:
    report = check_verifier(Typical(), rows=ROWS)
    assert not report.cases
    assert "lossy" in str(report)


@pytest.mark.parametrize("fault", FAULTS, ids=name)
def test_planted_faults_are_caught(fault: tuple[Verifier, str]) -> None:
    verifier, sentence = fault
    with pytest.raises(ConformanceError, match=sentence):
        check_verifier(verifier, rows=ROWS)


@pytest.mark.parametrize("verifier", LAW_FAULTS, ids=name)
def test_enumeration_alone_sees_the_faults_of_law(verifier: Verifier) -> None:
    assert exact(verifier, (-1, 0, 1), "iid")[0] > 3e-3
    assert exact(Plain(), (-1, 0, 1), "iid")[0] < 5e-7


def test_noise_that_cannot_be_dictated_is_tested_by_sampling_and_said() -> None:
    class OtherStream(Plain):
        def coins(self, tree: DraftTree, sampling: Sampling) -> Tensor:
            index = torch.arange(1, tree.tokens.shape[1])
            return uniform(sampling.seed[:, None], sampling.position[:, None], 7, index)

    report = check_verifier(OtherStream(), rows=ROWS)
    assert not report.enumerated
    assert "stream 7" in str(report)
    assert not any(case.exact for case in report.cases)


@pytest.mark.parametrize("seed", range(3))
def test_acceptance_lengths_are_ordered_as_theory_says(seed: int) -> None:
    speculative = exact(SpeculativeSampling(), CHAIN, "iid", seed)[1]
    block = exact(Block(), CHAIN, "iid", seed)[1]
    assert block > speculative + 1e-4
    assert exact(Traversal(), CHAIN, "distinct", seed)[1] == pytest.approx(block, abs=1e-6)
    assert exact(RRS(), CHAIN, "iid", seed)[1] == pytest.approx(speculative, abs=1e-6)
    assert exact(TargetOnly(), CHAIN, "iid", seed)[1] < speculative
    for tree in TREES:
        with_replacement, without = (
            exact(RRS(r), tree, law, seed)[1] for r, law in ((True, "iid"), (False, "distinct"))
        )
        assert without > with_replacement
        assert exact(Traversal(), tree, "distinct", seed)[1] >= without - 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_acceptance_rate_of_one_draft_is_the_overlap_of_the_laws(seed: int) -> None:
    model = PrefixModel.random(5, 2, seed)
    target, draft = model.target_logits[0].softmax(-1), model.draft_logits[0].softmax(-1)
    overlap = float(torch.minimum(target, draft).sum())
    for verifier in (SpeculativeSampling(), Block(), RRS(), Traversal()):
        assert exact(verifier, (-1, 0), "iid", seed, vocab=5)[1] - 1 == pytest.approx(overlap, abs=1e-6)
    by_target = float((target * draft).sum())
    assert exact(TargetOnly(), (-1, 0), "iid", seed, vocab=5)[1] - 1 == pytest.approx(by_target, abs=1e-6)
