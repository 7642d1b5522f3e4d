"""Rules that give up the target's law: each does what it says, and one of them has a law that can be proved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from command import QUICK, CommandLine
from torch import Tensor

from specdec.sampling import choose
from specdec.testing.enumeration import enumerate_law
from specdec.testing.laws import check_verifier
from specdec.testing.prefix_model import PrefixModel, Topology, depth_of, sampling_of
from specdec.types import Acceptance, DraftTree, Sampling
from specdec.verifier import Verifier
from specdec.verifier.fly import FLy
from specdec.verifier.relaxed_acceptance import RelaxedAcceptance
from specdec.verifier.speculative_sampling import SpeculativeSampling
from specdec.verifier.static_ensemble import StaticEnsemble
from specdec.verifier.target_only import TargetOnly

CHAIN: Topology = (-1, 0, 1, 2)
TREE: Topology = (-1, 0, 0, 1, 1, 2)


def judged(
    topology: Topology, rows: int, temperature: float, drawn: bool, vocab: int = 5
) -> tuple[DraftTree, Tensor, Sampling]:
    """Drafts of a random model with rows of every length, the settings in a batch that is not greedy as a whole."""
    model = PrefixModel.random(vocab, depth_of(topology) + 1, 3)
    generator = torch.Generator().manual_seed(5)
    sampling = replace(sampling_of(rows, temperature), mode="sampled")
    tokens = model.draw(topology, sampling_of(rows), True, generator)  # siblings differ
    num_nodes = torch.randint(1, len(topology) + 1, (rows,), generator=generator, dtype=torch.int32)
    return *model.judged(tokens, topology, sampling, drawn, num_nodes), sampling


def check_equal(got: Acceptance, want: Acceptance) -> None:
    for field in ("path", "num_accepted", "next_token"):
        assert torch.equal(getattr(got, field), getattr(want, field))


@pytest.mark.parametrize(
    "verifier", [StaticEnsemble(0.3), FLy(window=1), FLy(), RelaxedAcceptance(2, 0.2), RelaxedAcceptance()]
)
def test_the_invariants_hold_and_the_report_says_lossy(verifier: Verifier) -> None:
    assert "lossy" in str(check_verifier(verifier, rows=4000))


@pytest.mark.parametrize(
    ("verifier", "options", "words"),
    [
        (StaticEnsemble, {"weight": 0.0}, "got 0.0"),
        (StaticEnsemble, {"weight": 1.1}, "got 1.1"),
        (FLy, {"window": 0}, "got 0, 0.3 and 3"),
        (FLy, {"threshold": -0.1}, "got 6, -0.1 and 3"),
        (FLy, {"top_k": 0}, "got 6, 0.3 and 0"),
        (RelaxedAcceptance, {"top_k": 0}, "got 0 and 0.6"),
        (RelaxedAcceptance, {"delta": 1.0}, "got 10 and 1.0"),
    ],
)
def test_options_that_make_no_sense_are_named(verifier: type[Verifier], options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        verifier(**options)


# ---- static ensemble -------------------------------------------------------------------------------------------------


class Mixed(PrefixModel):
    """A model whose law is the mixture wherever a chain of 2 drafts has one, and the target's behind them."""

    weight = 0.4

    def law(self, logits: Tensor, sampling: Sampling) -> Tensor:
        target, draft = super().law(self.target_logits, sampling), super().law(self.draft_logits, sampling)
        drafted = 1 + self.vocab  # prefixes of fewer than 2 tokens
        return torch.cat([(self.weight * target + (1 - self.weight) * draft)[:drafted], target[drafted:]])


class MixesTheBonus(StaticEnsemble):
    """Planted: draws the bonus token from the mixture, too."""

    def _mixture(self, tree: DraftTree, target_probs: Tensor, sampling: Sampling) -> Tensor:
        assert tree.probs is not None
        return torch.lerp(target_probs, tree.probs, 1 - self.weight)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_law_is_the_mixture_and_the_bonus_tokens_the_targets(temperature: float) -> None:
    sampling = sampling_of(1, temperature)
    model = Mixed.random(3, 3, 0)
    want = model.complete(torch.eye(1, model.num_prefixes(), dtype=torch.float64)[0], model.law(Tensor(), sampling))

    def error(verifier: Verifier) -> float:
        found, _ = enumerate_law(verifier, model, (-1, 0, 1), sampling, "iid")
        return float((found - want).abs().max())

    assert error(StaticEnsemble(Mixed.weight)) < 5e-7
    for wrong in (StaticEnsemble(0.5), SpeculativeSampling(), MixesTheBonus(Mixed.weight)):
        assert error(wrong) > 1e-3


@pytest.mark.parametrize("weight", [0.2, 0.7, 1.0])
def test_the_weight_scales_the_rejections_of_a_draft(weight: float) -> None:
    model = PrefixModel.random(4, 2, 1)
    target, draft = model.target_logits[0].softmax(-1), model.draft_logits[0].softmax(-1)
    distance = float((target - draft).relu().sum())
    accepted = enumerate_law(StaticEnsemble(weight), model, (-1, 0), sampling_of(1), "iid")[1] - 1
    assert accepted == pytest.approx(1 - weight * distance, abs=1e-6)


@pytest.mark.parametrize(
    ("weight", "temperature", "drawn"), [(1.0, 0.8, True), (0.3, 0.8, False), (0.3, 0.0, True), (0.3, 0.0, False)]
)
def test_with_nothing_to_mix_it_is_speculative_sampling(weight: float, temperature: float, drawn: bool) -> None:
    batch = judged(CHAIN, 3000, temperature, drawn)
    check_equal(StaticEnsemble(weight).accept(*batch), SpeculativeSampling().accept(*batch))


# ---- relaxed acceptance ----------------------------------------------------------------------------------------------


def flat_tree(*tokens: int) -> DraftTree:
    """Children of one root."""
    nodes = len(tokens) + 1
    parents = torch.tensor([[-1] + [0] * len(tokens)], dtype=torch.int32)
    return DraftTree(torch.tensor([[0, *tokens]]), parents, torch.tensor([nodes], dtype=torch.int32), 1)


@pytest.mark.parametrize(
    ("top_k", "delta", "standing"),
    [
        (4, 0.25, {0, 1}),  # 0.5 - 0.3 = 0.2; 0.5 - 0.15 = 0.35
        (4, 0.4, {0, 1, 2}),
        (4, 0.9, {0, 1, 2, 3}),
        (2, 0.9, {0, 1}),
        (1, 0.9, {0}),
        (4, 0.0, {0}),
        (99, 0.9, {0, 1, 2, 3}),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_relaxed_acceptance_by_hand(top_k: int, delta: float, standing: set[int], temperature: float) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 2, 4)
    for token in range(4):
        verdict = RelaxedAcceptance(top_k, delta).accept(flat_tree(token), logits, sampling_of(1, temperature))
        assert verdict.num_accepted.tolist() == [int(token in standing)]


def test_relaxed_acceptance_prefers_the_longest_path_then_the_likeliest() -> None:
    root, after = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), torch.tensor([0.05, 0.15, 0.3, 0.5]).log()
    rule, logits = RelaxedAcceptance(3, 0.3), torch.stack([root, after, after, after])[None]
    verdict = rule.accept(flat_tree(2, 1, 0), logits, sampling_of(1, 0.0))
    assert verdict.path.tolist() == [[0, 3]]  # 2 is not near enough
    assert verdict.next_token.tolist() == [3]
    deeper = DraftTree(
        torch.tensor([[0, 0, 1, 2]]), torch.tensor([[-1, 0, 0, 2]], dtype=torch.int32), torch.tensor([4]).int(), 2
    )
    assert rule.accept(deeper, logits, sampling_of(1, 0.0)).path.tolist() == [[0, 2, 3]]
    padded = replace(deeper, num_nodes=torch.tensor([3]).int())
    assert rule.accept(padded, logits, sampling_of(1, 0.0)).path.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("topology", [CHAIN, TREE])
def test_relaxed_acceptance_contains_exact_match_and_chooses_as_plain_decoding(topology: Topology) -> None:
    tree, logits, sampling = judged(topology, 2000, 0.0, drawn=False)
    match, strict = TargetOnly().accept(tree, logits, sampling), RelaxedAcceptance(1).accept(tree, logits, sampling)
    assert torch.equal(strict.num_accepted, match.num_accepted)
    assert torch.equal(strict.next_token, match.next_token)
    relaxed = RelaxedAcceptance().accept(tree, logits, sampling)
    assert bool((relaxed.num_accepted >= match.num_accepted).all())
    assert bool((relaxed.num_accepted > match.num_accepted).any())

    tree, logits, sampling = judged(topology, 2000, 0.9, drawn=False)
    verdict = RelaxedAcceptance().accept(tree, logits, sampling)
    last = verdict.path.gather(1, verdict.num_accepted[:, None].long()).squeeze(1).long()
    position = (sampling.position + verdict.num_accepted)[:, None]
    plain = choose(logits[torch.arange(2000), last][:, None], sampling, position).squeeze(1)
    assert torch.equal(verdict.next_token, plain)


# ---- FLy -------------------------------------------------------------------------------------------------------------


def fly_reference(rule: FLy, tree: DraftTree, logits: Tensor, sampling: Sampling) -> list[tuple[int, int]]:
    """Accepted drafts and the next token of every row, draft by draft."""
    rows, nodes = tree.tokens.shape
    position = sampling.position[:, None] + torch.arange(nodes, dtype=torch.int32)
    chosen, found = choose(logits, sampling, position).tolist(), []
    for row in range(rows):
        drafts = tree.tokens[row, 1 : int(tree.num_nodes[row])].tolist()
        accepted = 0
        while accepted < len(drafts):
            if drafts[accepted] != chosen[row][accepted]:
                window = range(accepted + 1, accepted + 1 + rule.window)
                probs = logits[row, accepted].softmax(-1).sort(descending=True).values[: rule.top_k]
                unsure = -float((probs * probs.log()).sum()) >= rule.threshold
                if not unsure or not all(i < len(drafts) and drafts[i] == chosen[row][i] for i in window):
                    break
            accepted += 1
        found.append((accepted, chosen[row][accepted]))
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rule", [FLy(1), FLy(2, 0.8), FLy(1, 0.6, 2), FLy(1, 0.0, 99), FLy(3)])
def test_fly_is_its_definition_draft_by_draft(rule: FLy, temperature: float) -> None:
    tree, logits, sampling = judged((-1, 0, 1, 2, 3), 1500, temperature, drawn=False, vocab=3)
    verdict = rule.accept(tree, logits, sampling)
    want = fly_reference(rule, tree, logits, sampling)
    assert list(zip(verdict.num_accepted.tolist(), verdict.next_token.tolist(), strict=True)) == want
    match = TargetOnly().accept(tree, logits, sampling).num_accepted
    assert bool((verdict.num_accepted > match).any())


@pytest.mark.parametrize("rule", [FLy(1, threshold=9.0), FLy(1, top_k=1, threshold=0.4), FLy(window=4)])
def test_fly_with_a_gate_that_never_opens_is_exact_match(rule: FLy) -> None:
    """Entropy over one token is at most 1/e = 0.37; a window of 4 does not fit behind any of 4 drafts."""
    for temperature in (0.0, 0.8):
        batch = judged((-1, 0, 1, 2, 3), 1500, temperature, drawn=False, vocab=3)
        check_equal(rule.accept(*batch), TargetOnly().accept(*batch))


def test_the_baseline_is_plain_decoding_whatever_the_verifier(specdec: CommandLine) -> None:
    """Typical acceptance emits the target's favourite, also where nothing was drafted: as a baseline it would be greedy."""
    texts = []
    for verifier in ("typical", "target_only"):
        command = [*QUICK, "sampling.temperature=1", f"verifier={verifier}", f"run_dir={verifier}"]
        assert specdec(*command).code == 0
        rows = specdec.rows(f"{verifier}/trace.jsonl")
        texts.append([row["tokens"] for row in rows if row["drafter"] == "none"])
        assert {row["lossless"] for row in rows if row["drafter"] == "none"} == {True}
    assert texts[0] == texts[1] != []
