"""What verifiers promise beyond the law: exact agreement with plain decoding, graphability, and their edge cases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import specdec
from specdec.sampling import choose
from specdec.testing.prefix_model import PrefixModel, Topology, depth_of, sampling_of
from specdec.types import Acceptance, DraftTree, Sampling
from specdec.verifier import Verifier
from specdec.verifier._common import path_to
from specdec.verifier.block import Block
from specdec.verifier.fly import FLy
from specdec.verifier.kseq import KSeq
from specdec.verifier.relaxed_acceptance import RelaxedAcceptance
from specdec.verifier.rrs import RRS
from specdec.verifier.speculative_sampling import SpeculativeSampling
from specdec.verifier.static_ensemble import StaticEnsemble
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.traversal import Traversal, _tour
from specdec.verifier.typical import Typical

CHAIN: Topology = (-1, 0, 1, 2)
TREE: Topology = (-1, 0, 0, 1, 1, 2)
STOCHASTIC = [SpeculativeSampling(), Block(), RRS(True), RRS(False), Traversal(False), Traversal(True), KSeq()]
GREEDY_AT_0 = [TargetOnly(), *STOCHASTIC, Typical(), StaticEnsemble()]
ALL = [*GREEDY_AT_0, RelaxedAcceptance(), FLy()]


def name(value: object) -> str:
    return type(value).__name__ + ("" if getattr(value, "replacement", True) else "-distinct")


def batch(
    topology: Topology,
    rows: int = 500,
    temperature: float = 1.0,
    drawn: bool = True,
    vocab: int = 6,
    distinct: bool = False,
) -> tuple[PrefixModel, DraftTree, Tensor, Sampling]:
    model = PrefixModel.random(vocab, depth_of(topology) + 1, 3)
    sampling = sampling_of(rows, temperature)
    tokens = model.draw(topology, sampling_of(rows), distinct, torch.Generator().manual_seed(5))
    tree, logits = model.judged(tokens, topology, sampling, drawn)
    return model, tree, logits, sampling


def topologies(verifier: Verifier) -> list[Topology]:
    return [CHAIN, TREE] if verifier.supports_trees else [CHAIN]


def texts(tree: DraftTree, verdict: Acceptance) -> list[list[int]]:
    """The emitted tokens of every row."""
    drafts = tree.tokens.gather(1, verdict.path.long()).tolist()
    return [
        [*row[1 : n + 1], last]
        for row, n, last in zip(drafts, verdict.num_accepted.tolist(), verdict.next_token.tolist(), strict=True)
    ]


def plain(model: PrefixModel, sampling: Sampling, steps: int) -> list[list[int]]:
    """One token at a time from the target alone."""
    prefix, text = torch.zeros(len(sampling.seed), dtype=torch.int64), []
    for n in range(steps):
        text.append(choose(model.target_logits[prefix][:, None], sampling, sampling.position[:, None] + n).squeeze(1))
        prefix = prefix * model.vocab + 1 + text[-1]
    return torch.stack(text, 1).tolist()


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("topology", [CHAIN, TREE, (-1, 0, 1, 0, 3, 0)])
def test_target_only_emits_what_plain_decoding_emits(topology: Topology, temperature: float, drawn: bool) -> None:
    model, tree, logits, sampling = batch(topology, temperature=temperature, drawn=drawn)
    verdict = TargetOnly().accept(tree, logits, sampling)
    assert set(verdict.num_accepted.tolist()) == set(range(tree.depth + 1))
    for text, want in zip(texts(tree, verdict), plain(model, sampling, model.length), strict=True):
        assert text == want[: len(text)]


@pytest.mark.parametrize("mixed", [True, False], ids=["temperature 0 in a sampled batch", "greedy mode"])
@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("verifier", GREEDY_AT_0, ids=name)
def test_greedy_rows_follow_the_argmax_and_never_accept_less_than_it_allows(
    verifier: Verifier, drawn: bool, mixed: bool
) -> None:
    for topology in topologies(verifier):
        _, tree, logits, sampling = batch(topology, temperature=0.0, drawn=drawn)
        want = TargetOnly().accept(tree, logits, sampling)
        got = verifier.accept(tree, logits, replace(sampling, mode="sampled") if mixed else sampling)
        assert torch.equal(got.num_accepted, want.num_accepted)
        assert torch.equal(got.next_token, want.next_token)
        assert texts(tree, got) == texts(tree, want)


@pytest.mark.parametrize("verifier", STOCHASTIC, ids=name)
def test_a_drafter_equal_to_the_target_is_always_accepted(verifier: Verifier) -> None:
    model = PrefixModel.random(6, 4, 3)
    model.draft_logits = model.target_logits
    sampling = sampling_of(2000)
    tokens = model.draw(CHAIN, sampling, False, torch.Generator().manual_seed(1))
    tree, logits = model.judged(tokens, CHAIN, sampling, drawn=True)
    assert bool((verifier.accept(tree, logits, sampling).num_accepted == 3).all())


@pytest.mark.parametrize("verifier", ALL, ids=name)
def test_a_row_with_nothing_proposed_emits_from_the_target_after_the_root(verifier: Verifier) -> None:
    for topology in ((-1,), CHAIN):
        model, tree, logits, sampling = batch(topology, rows=4000)
        tree = replace(tree, num_nodes=torch.ones_like(tree.num_nodes))
        verdict = verifier.accept(tree, logits, sampling)
        assert not verdict.num_accepted.any()
        assert not verdict.path.any()
        if verifier.lossless:
            seen = torch.bincount(verdict.next_token, minlength=6) / 4000
            torch.testing.assert_close(seen, model.target_logits[0].softmax(-1), atol=0.04, rtol=0)


@pytest.mark.parametrize("verifier", [SpeculativeSampling(), Block(), StaticEnsemble(), FLy()], ids=name)
def test_chain_rules_refuse_trees(verifier: Verifier) -> None:
    _, tree, logits, sampling = batch(TREE, rows=2)
    assert not verifier.supports_trees
    with pytest.raises(ValueError, match="6 nodes and depth 2"):
        verifier.accept(tree, logits, sampling)


@pytest.mark.parametrize("verifier", [v for v in ALL if v.supports_trees], ids=name)
def test_verdicts_do_not_depend_on_whether_a_path_is_called_a_chain(verifier: Verifier) -> None:
    _, chain, logits, sampling = batch(CHAIN)
    padded = DraftTree(
        torch.cat([chain.tokens, chain.tokens[:, :1]], 1),
        torch.cat([chain.parents, torch.zeros_like(chain.parents[:, :1])], 1),
        chain.num_nodes,
        chain.depth,
        None if chain.probs is None else torch.cat([chain.probs, chain.probs[:, :1]], 1),
    )
    assert chain.is_chain
    assert not padded.is_chain
    want = verifier.accept(chain, logits, sampling)
    got = verifier.accept(padded, torch.cat([logits, logits[:, :1]], 1), sampling)
    for field in ("path", "num_accepted", "next_token"):
        assert torch.equal(getattr(got, field), getattr(want, field))


@pytest.mark.parametrize("verifier", [TargetOnly(), *[v for v in STOCHASTIC if v.supports_trees]], ids=name)
def test_equal_siblings_do_not_make_a_token_likelier(verifier: Verifier) -> None:
    rows, topology = 20_000, (-1, 0, 0, 0)
    model = PrefixModel.random(4, 2, 0)
    sampling = sampling_of(rows)
    tree, logits = model.judged(torch.tensor([0, 2, 2, 1]).repeat(rows, 1), topology, sampling, drawn=False)
    verdict = verifier.accept(tree, logits, sampling)
    assert not bool((verdict.path == 2).any())
    first = torch.tensor([text[0] for text in texts(tree, verdict)])
    seen = torch.bincount(first, minlength=4) / rows
    torch.testing.assert_close(seen, model.target_logits[0].softmax(-1), atol=0.015, rtol=0)


def test_exhausted_siblings_are_point_masses() -> None:
    rows = 20_000
    sampling = sampling_of(rows)
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(rows, 3, 3)
    probs = torch.tensor([1.0, 0.0, 0.0]).expand(rows, 3, 3)
    parents = torch.tensor([[-1, 0, 0]], dtype=torch.int32).expand(rows, 3)
    tree = DraftTree(torch.tensor([[0, 0, 1]]).expand(rows, 3), parents, torch.full((rows,), 3).int(), 1, probs)
    for verifier in (RRS(replacement=False), Traversal()):
        verdict = verifier.accept(tree, logits, sampling)
        assert float(verdict.num_accepted.float().mean()) == pytest.approx(0.8, abs=0.015)
        recovered = verdict.next_token[verdict.num_accepted == 0]
        assert bool((recovered == 2).all())


def test_traversal_on_a_chain_is_block_verification_verdict_by_verdict() -> None:
    _, tree, logits, sampling = batch(CHAIN, rows=3000)
    block, traversal = Block().accept(tree, logits, sampling), Traversal().accept(tree, logits, sampling)
    assert torch.equal(block.path, traversal.path)
    assert torch.equal(block.next_token, traversal.next_token)


def test_rrs_on_a_chain_is_speculative_sampling_verdict_by_verdict() -> None:
    _, tree, logits, sampling = batch(CHAIN, rows=3000)
    single, recursive = SpeculativeSampling().accept(tree, logits, sampling), RRS().accept(tree, logits, sampling)
    assert torch.equal(single.path, recursive.path)
    assert torch.equal(single.next_token, recursive.next_token)


def test_typical_acceptance_by_hand() -> None:
    """The root's entropy is 0.76 nats: threshold min(0.09, 0.3 * exp(-0.76)) = 0.09; 0.2 stands, 0.08 does not."""
    root, after = torch.tensor([0.72, 0.08, 0.2]).log(), torch.tensor([0.1, 0.3, 0.6]).log()
    tree = DraftTree(
        tokens=torch.tensor([[0, 1, 2, 0, 1]]),
        parents=torch.tensor([[-1, 0, 0, 1, 2]], dtype=torch.int32),
        num_nodes=torch.tensor([5], dtype=torch.int32),
        depth=2,
    )
    logits = torch.stack([root, after, after, after, after])[None]
    verdict = Typical().accept(tree, logits, sampling_of(1))
    assert verdict.path.tolist() == [[0, 2, 4]]
    assert verdict.num_accepted.tolist() == [2]
    assert verdict.next_token.tolist() == [2]
    strict = Typical(epsilon=0.5, delta=0.9).accept(tree, logits, sampling_of(1))
    assert strict.num_accepted.tolist() == [0]
    assert strict.next_token.tolist() == [0]


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.3), (0.09, 1.0), (1.0, 0.3)])
def test_typical_names_thresholds_that_make_no_sense(epsilon: float, delta: float) -> None:
    with pytest.raises(ValueError, match=f"{epsilon} and {delta}"):
        Typical(epsilon, delta)


@pytest.mark.parametrize("verifier", ALL, ids=name)
def test_accept_never_reads_a_tensor_on_the_host(verifier: Verifier) -> None:
    for topology in topologies(verifier):
        for drawn in (True, False):
            _, tree, logits, sampling = batch(topology, rows=3, drawn=drawn)
            with FakeTensorMode(allow_non_fake_inputs=True):
                for mode in ("greedy", "sampled", "warped"):
                    verdict = verifier.accept(tree, logits, replace(sampling, mode=mode))
                    assert verdict.path.shape == (3, tree.depth + 1)
                    assert (verdict.path.dtype, verdict.num_accepted.dtype) == (torch.int32, torch.int32)


class CountKernels(TorchDispatchMode):
    """Operations that launch work: everything but views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = ("slice", "squeeze", "unsqueeze", "alias", "expand", "view", "select")
        if func.overloadpacket.__name__ not in views:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@st.composite
def forests(draw: st.DrawFn) -> list[int]:
    return [0] + [draw(st.integers(0, i - 1)) for i in range(1, draw(st.integers(1, 12)))]


def brackets(parents: list[int], node: int = 0) -> list[tuple[int, bool]]:
    """The tour by recursion."""
    inner = [b for child in range(node + 1, len(parents)) if parents[child] == node for b in brackets(parents, child)]
    return [(node, True), *inner, (node, False)]


@settings(max_examples=40, deadline=None)
@given(forests())
def test_traversal_visits_nodes_depth_first_in_draw_order(parents: list[int]) -> None:
    tour, opens = _tour(torch.tensor([parents, parents]))
    assert list(zip(tour[1].tolist(), opens[1].tolist(), strict=True)) == brackets(parents)


@settings(max_examples=40, deadline=None)
@given(forests(), st.data())
def test_paths_lead_from_the_root_and_repeat_their_end(parents: list[int], data: st.DataObject) -> None:
    node = data.draw(st.integers(0, len(parents) - 1))
    want = [node]
    while want[0]:
        want.insert(0, parents[want[0]])
    topology = (-1, *parents[1:])
    tree = DraftTree(
        torch.zeros(1, len(parents), dtype=torch.int64),
        torch.tensor([topology], dtype=torch.int32),
        torch.tensor([len(parents)], dtype=torch.int32),
        depth_of(topology),
    )
    path, num_accepted = path_to(tree, torch.tensor([node]))
    assert num_accepted.tolist() == [len(want) - 1]
    assert path.tolist() == [want + [node] * (tree.depth + 1 - len(want))]


CONFIGS = sorted((Path(specdec.__path__[0]) / "conf" / "verifier").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_its_verifier(path: Path) -> None:
    config = OmegaConf.load(path)
    verifier = instantiate(config)
    assert isinstance(verifier, Verifier)
    assert type(verifier).__module__ == f"specdec.verifier.{path.stem}"
    assert set(config) - {"_target_"} == set(vars(verifier)) - {"law"}
