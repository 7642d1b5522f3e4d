"""K-SEQ: exact whatever the siblings, better than one draft, never better than optimal transport."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from specdec.testing.enumeration import enumerate_law
from specdec.testing.prefix_model import PrefixModel, Topology, depth_of, sampling_of
from specdec.testing.transport import optimal_acceptance
from specdec.types import Acceptance, DraftTree
from specdec.verifier import Verifier, kseq
from specdec.verifier._common import normalise, residual
from specdec.verifier.kseq import KSeq
from specdec.verifier.rrs import RRS
from specdec.verifier.speculative_sampling import SpeculativeSampling

CHAIN: Topology = (-1, 0, 1, 2)
TREE: Topology = (-1, 0, 0, 1, 1, 2, 0)


def exact(verifier: Verifier, model: PrefixModel, topology: Topology) -> tuple[float, float]:
    """Largest error of a text's probability with independent drafts, and the acceptance length."""
    found, length = enumerate_law(verifier, model, topology, sampling_of(1), "iid")
    nothing = torch.zeros(model.num_prefixes(), dtype=torch.float64)
    nothing[0] = 1.0
    want = model.complete(nothing, model.law(model.target_logits, sampling_of(1)))
    return float((found - want).abs().max()), length


def flat(num_drafts: int) -> Topology:
    return (-1, *[0] * num_drafts)


def laws(model: PrefixModel) -> tuple[Tensor, Tensor]:
    """The target's and the drafter's law of the first token. f64 [V]."""
    return model.target_logits[0].double().softmax(-1), model.draft_logits[0].double().softmax(-1)


def overlap(target: Tensor, draft: Tensor, rho: Tensor) -> Tensor:
    """beta at every rho. f64 [R]."""
    return torch.minimum(target / rho[:, None], draft).sum(-1)


def check_equal(got: Acceptance, want: Acceptance) -> None:
    for field in ("path", "num_accepted", "next_token"):
        assert torch.equal(getattr(got, field), getattr(want, field))


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", [flat(4), (-1, 0, 0, 1, 1)])
def test_the_law_is_the_targets_with_more_siblings(topology: Topology) -> None:
    assert exact(KSeq(), PrefixModel.random(3, depth_of(topology) + 1, 1), topology)[0] < 5e-7


FAULTS = {
    "rho is k": ("_rho", lambda target, draft, k, halvings: k.float()),
    "rho is 1": ("_rho", lambda target, draft, k, halvings: (k > 0).float()),
    "the residual of one draft": ("residual", lambda target, law: residual(target, normalise(law, law))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PrefixModel.random(3, 2, 1)
    monkeypatch.setattr(kseq, *FAULTS[fault])
    assert exact(KSeq(), model, flat(2))[0] > 3e-3


def test_on_a_chain_it_is_speculative_sampling_verdict_by_verdict() -> None:
    model, sampling = PrefixModel.random(6, 4, 3), sampling_of(3000)
    tokens = model.draw(CHAIN, sampling, False, torch.Generator().manual_seed(5))
    tree, logits = model.judged(tokens, CHAIN, sampling, drawn=True)
    check_equal(KSeq().accept(tree, logits, sampling), SpeculativeSampling().accept(tree, logits, sampling))


def test_a_single_child_in_a_tree_has_rho_1() -> None:
    target, draft = torch.rand(50, 8).softmax(-1), torch.rand(50, 8).softmax(-1)
    assert bool((kseq._rho(target, draft, torch.ones(50), kseq.HALVINGS) == 1).all())


def test_deterministic_drafts_are_tried_one_by_one() -> None:
    model, sampling = PrefixModel.random(4, 3, 3), sampling_of(3000)
    tokens = model.draw(TREE, sampling, False, torch.Generator().manual_seed(5))  # siblings that are equal among them
    tree, logits = model.judged(tokens, TREE, sampling, drawn=False)
    check_equal(KSeq().accept(tree, logits, sampling), RRS().accept(tree, logits, sampling))


def first_tokens(place: int, rows: int = 40_000) -> tuple[Tensor, Tensor]:
    """How often each token comes first when sibling number `place` of 4 is outside the draft law, and how often it should."""
    target, draft = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.5, 0.0, 0.4])
    tokens = torch.multinomial(draft, rows * 5, replacement=True, generator=torch.Generator().manual_seed(0))
    tokens = tokens.view(rows, 5)
    tokens[:, place] = 2
    parents = torch.tensor([[-1, 0, 0, 0, 0]], dtype=torch.int32).expand(rows, 5)
    num_nodes = torch.full((rows,), 5, dtype=torch.int32)
    tree = DraftTree(tokens, parents, num_nodes, 1, draft.expand(rows, 5, 4))
    verdict = KSeq().accept(tree, target.log().expand(rows, 5, 4), sampling_of(rows))
    accepted = tokens.gather(1, verdict.path[:, 1:].long()).squeeze(1)
    first = torch.where(verdict.num_accepted > 0, accepted, verdict.next_token)
    return torch.bincount(first, minlength=4) / rows, target


@pytest.mark.parametrize("place", [1, 2, 4])
def test_a_point_mass_among_drawn_siblings_keeps_the_law(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, target = first_tokens(place)
    torch.testing.assert_close(seen, target, atol=0.01, rtol=0)
    honest = kseq._rho
    monkeypatch.setattr(kseq, "_rho", lambda target, draft, k, halvings: honest(target, draft, k + 1, halvings))
    seen, target = first_tokens(place)  # as if it had been drawn, too
    assert float((seen - target).abs().max()) > 0.02


# ---- how much is accepted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_acceptance_lies_between_the_papers_share_and_the_optimum(k: int, seed: int) -> None:
    model = PrefixModel.random(4, 2, seed)
    best = float(optimal_acceptance(*laws(model), k))
    accepted = exact(KSeq(), model, flat(k))[1] - 1
    assert (1 - (1 - 1 / k) ** k) * best - 1e-6 < accepted < best + 1e-6
    assert exact(RRS(), model, flat(k))[1] - 1 < best + 1e-6
    if k > 1:
        assert accepted > exact(KSeq(), model, flat(k - 1))[1] - 1 + 1e-3


@pytest.mark.parametrize("k", [2, 3])
def test_rho_is_the_smallest_that_is_exact(k: int) -> None:
    """Exact are those with 1 - (1 - beta)^k <= rho * beta; acceptance falls with rho."""
    model = PrefixModel.random(4, 2, 5)
    rho = torch.linspace(1, k, 20_001, dtype=torch.float64)
    beta = overlap(*laws(model), rho)
    accepted = 1 - (1 - beta) ** k
    most = float(accepted[accepted <= rho * beta].max())
    assert exact(KSeq(), model, flat(k))[1] - 1 == pytest.approx(most, abs=1e-4)


def test_rho_solves_its_equation_for_laws_of_every_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    target, draft = (torch.randn(400, 20, generator=generator).mul(scale).softmax(-1) for scale in (3.0, 5.0))
    target[:100], draft[:100] = draft[:100], draft[:100].clone()  # equal laws
    target[100:200, :10], draft[100:200, 10:] = 0.0, 0.0  # disjoint ones
    target[200:300], draft[300:] = torch.eye(20)[3], torch.eye(20)[3]  # one-hot ones
    target, draft = (law / law.sum(-1, keepdim=True) for law in (target, draft))
    k = torch.arange(400) % 7 + 1
    rho = kseq._rho(target, draft, k, kseq.HALVINGS)
    assert bool(((rho >= 1) & (rho <= k)).all())
    beta = torch.minimum(target.double() / rho[:, None], draft.double()).sum(-1)
    torch.testing.assert_close(rho * beta, 1 - (1 - beta) ** k, atol=2e-6, rtol=0)


# ---- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_optimum_is_a_minimum_over_all_sets(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    target, draft = (torch.rand(30, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    target[:10, :3], draft[5:15, 2:5] = 0.0, 0.0
    target, draft = (law / law.sum(-1, keepdim=True) for law in (target, draft))
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    least = (target @ sets.T - (draft @ sets.T) ** k).amin(-1)
    torch.testing.assert_close(optimal_acceptance(target, draft, k), 1 + least)


def test_the_optimum_of_one_draft_is_the_overlap_and_of_many_is_everything() -> None:
    target, draft = laws(PrefixModel.random(5, 2, 0))
    assert float(optimal_acceptance(target, draft, 1)) == pytest.approx(float(torch.minimum(target, draft).sum()))
    assert math.isclose(float(optimal_acceptance(target, draft, 500)), 1.0)
