"""Chains that end early: where they end, that a pass less changes nothing else, and that the target's law is kept.

B rows, V vocabulary, K drafts at most.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from heads import random_head
from table_target import TableTarget
from test_decoding import COUNT, VOCAB, p_value, sampled_texts
from test_laws import exact
from test_medusa import heads_of
from torch import Tensor

from specdec.decoding import SamplingParams, SpeculativeDecoder
from specdec.drafter import Drafter
from specdec.drafter.eagle3 import Eagle3
from specdec.drafter.hydra import Hydra
from specdec.drafter.layer_skip import LayerSkip
from specdec.drafter.medusa import Medusa
from specdec.drafter.small_model import SmallModel
from specdec.structure import RootState, Structure, _static, adaptive
from specdec.structure.adaptive import GAMMA, Adaptive
from specdec.structure.chain import Chain
from specdec.target.toy import Toy
from specdec.testing import ConformanceError, check_drafter, check_no_sync
from specdec.testing.drafters import PROMPTS
from specdec.testing.laws import CHAIN
from specdec.testing.prefix_model import sampling_of
from specdec.types import Acceptance, DraftInputs, DraftTree, ModelInputs, Sampling
from specdec.verifier import Verifier
from specdec.verifier.block import Block
from specdec.verifier.rrs import RRS
from specdec.verifier.speculative_sampling import SpeculativeSampling
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.traversal import Traversal

RULES: list[Any] = ["path", "confidence", "entropy"]
NEVER_READ = patch.object(adaptive, "any_row_drafts", lambda drafting: True)  # as on a GPU: all passes run


# ---- where a chain ends ----------------------------------------------------------------------------------------------


class Table:
    """A model whose next law depends on the last token: logits [B, V, V]; counts its passes."""

    def __init__(self, seed: int, batch: int, vocab: int = 7) -> None:
        self.logits = 2.5 * torch.randn(batch, vocab, vocab, generator=torch.Generator().manual_seed(seed))
        self.passes = 0

    def __call__(self, inputs: ModelInputs, hidden: Tensor | None) -> tuple[Tensor, None]:
        self.passes += 1
        return self.logits[torch.arange(len(self.logits)), inputs.tokens[:, 0]][:, None], None

    def draft(self, structure: Structure, sampling: Sampling, law: Any = "any", known: bool = False) -> DraftTree:
        """Behind token 3 of every row; known: the root has been run."""
        root, prefix = torch.full((len(self.logits),), 3), torch.zeros(len(self.logits), dtype=torch.int32)
        state = RootState(self.logits[:, 3:4]) if known else None
        return structure.draft(self, root, prefix, sampling, law, state)


def searched(logits: Tensor, shape: Adaptive) -> list[int]:
    """The drafts of one row, a token at a time. logits [V, V]."""
    drafts, token, worth, path = [], 3, 1.0, 1.0
    while len(drafts) < shape.num_draft_tokens and worth >= shape.min_probability:
        law = logits[token].softmax(-1)
        token = int(law.argmax())
        drafts.append(token)
        path *= float(law.max())
        entropy = -float((law * law.log()).sum())
        worth = {"path": path, "confidence": float(law.max()), "entropy": 1 - (GAMMA * entropy) ** 0.5}[shape.rule]
    return drafts


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_rows_end_where_a_search_ends(rule: Any, known: bool) -> None:
    lengths = set()
    for seed, least in itertools.product(range(10), (0.3, 0.5, 0.7)):
        shape, table = Adaptive(4, least, rule), Table(seed, 2)
        tree = table.draft(shape, sampling_of(2, 0.0), known=known)
        passes, table.passes = table.passes, 0
        with NEVER_READ:
            whole = table.draft(shape, sampling_of(2, 0.0), known=known)
        assert table.passes == 4 - known
        assert whole.tokens.shape == (2, 5)
        expected = [searched(row, shape) for row in table.logits]
        longest = max(map(len, expected))
        assert passes == longest - known  # none in vain
        assert tree.tokens.shape == (2, longest + 1)
        for each in (tree, whole):
            assert each.is_chain
            assert [row[1:n] for row, n in zip(each.tokens.tolist(), each.num_nodes.tolist(), strict=True)] == expected
        lengths |= set(map(len, expected))
    assert lengths == {1, 2, 3, 4}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("law", ["any", "iid", "distinct"])
def test_without_a_threshold_it_is_a_chain(law: Any, rule: Any) -> None:
    """Tokens and recorded laws; with the highest one a row makes a single draft."""
    sampling = sampling_of(4, 0.8, 5)
    chain, same = (Table(1, 4).draft(shape, sampling, law) for shape in (Chain(3), Adaptive(3, 0.0, rule)))
    assert torch.equal(same.tokens, chain.tokens)
    assert torch.equal(same.num_nodes, chain.num_nodes)
    if chain.probs is not None:
        assert torch.equal(same.probs[:, :3], chain.probs[:, :3])
    assert Table(1, 4).draft(Adaptive(3, 1.0, rule), sampling, law).num_nodes.tolist() == [2] * 4


def test_a_low_temperature_makes_nobody_sure() -> None:
    table = Table(0, 2)
    table.logits = torch.zeros_like(table.logits)
    table.logits[..., 0] = 1.0  # 0.31 of the law, 0.99995 at this temperature
    assert table.draft(Adaptive(3, 0.5), sampling_of(2, 0.1), "iid").num_nodes.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens=0"),
        ({"min_probability": 1.5}, "min_probability=1.5"),
        ({"rule": "luck"}, "rule=luck does not exist; there are path, confidence, entropy"),
    ],
)
def test_chains_that_cannot_be(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Adaptive(**wrong)


# ---- with the drafters -----------------------------------------------------------------------------------------------

Make = Callable[[Structure], Drafter]


@pytest.fixture(scope="module")
def drafters(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Make]:
    folder = tmp_path_factory.mktemp("heads")
    random_head(folder / "eagle3", toy, 96)
    heads_of("medusa", toy, folder / "medusa")
    heads_of("hydra", toy, folder / "hydra")
    return {
        "small_model": lambda shape: SmallModel(model=Toy(backend="torch"), structure=shape),
        "layer_skip": lambda shape: LayerSkip(1, structure=shape),
        "eagle3": lambda shape: Eagle3(folder / "eagle3", structure=shape),
        "medusa": lambda shape: Medusa(folder / "medusa", structure=shape),
        "hydra": lambda shape: Hydra(folder / "hydra", structure=shape),
    }


NAMES = ["small_model", "layer_skip", "eagle3", "medusa", "hydra"]


@pytest.mark.parametrize("name", NAMES)
def test_drafters_conform(name: str, drafters: dict[str, Make], toy: Toy) -> None:
    check_drafter(lambda: drafters[name](Adaptive(3, 0.2)), TargetOnly(), toy)


class Noted(Drafter):
    """A drafter whose proposals are kept, padding left out."""

    def __init__(self, inner: Drafter) -> None:
        self.inner, self.seen = inner, list[list[list[int]]]()
        self.num_draft_tokens, self.depth, self.features = inner.num_draft_tokens, inner.depth, inner.features
        self.setup, self.prefill = inner.setup, inner.prefill  # type: ignore[method-assign]

    def propose(self, inputs: DraftInputs) -> DraftTree:
        tree = self.inner.propose(inputs)
        self.seen.append([row[:n] for row, n in zip(tree.tokens.tolist(), tree.num_nodes.tolist(), strict=True)])
        return tree


def proposals(drafter: Drafter, toy: Toy, batch: int, reads: bool) -> list[list[list[int]]]:
    """All that it proposes, in steps, refills and rollbacks; reads: whether passes behind every row's end are left out."""
    noted = Noted(drafter)
    decoder = SpeculativeDecoder(toy, noted, TargetOnly(), batch_size=batch)
    with nullcontext() if reads else NEVER_READ:
        decoder.generate([list(prompt) for prompt in PROMPTS], 40, ignore_eos=True)
    return noted.seen


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_pass_less_changes_no_draft(name: str, batch: int, drafters: dict[str, Make], toy: Toy) -> None:
    """What a drafter keeps is overwritten or was right."""
    seen = [proposals(drafters[name](Adaptive(3, 0.2)), toy, batch, reads) for reads in (True, False)]
    assert seen[0] == seen[1]
    assert {len(nodes) for step in seen[0] for nodes in step} == {2, 3, 4}


class Trusting(SmallModel):
    """Takes it that drafting has run whatever was accepted."""

    def _run(self, inputs: DraftInputs, start: Tensor, count: int) -> Tensor:
        if count != self.depth + 2:  # a prompt
            return super()._run(inputs, start, count)
        at = inputs.lengths - 1
        return self._forward(ModelInputs(inputs.root[:, None], at[:, None], at))[0].expand(-1, count, -1)


def test_a_drafter_that_needs_all_passes_is_caught(toy: Toy) -> None:
    drafter = Trusting(model=Toy(backend="torch"), structure=Adaptive(3, 0.2))
    assert proposals(drafter, toy, 1, True) != proposals(drafter, toy, 1, False)


class Reads(Adaptive):
    """Another read than the named one."""

    def _worth(self, logits: Tensor, before: Tensor) -> Tensor:
        worth = super()._worth(logits, before)
        return worth if bool(worth.any()) else before


def test_only_the_named_read_is_exempt() -> None:
    check_no_sync(LayerSkip(1, structure=Adaptive(3)), TargetOnly())
    with pytest.raises(ConformanceError, match="on the host"):
        check_no_sync(LayerSkip(1, structure=Reads(3)), TargetOnly())


@pytest.mark.gpu
def test_a_step_is_a_graph(tmp_path: Path) -> None:
    target = Toy(device="cuda")
    folder = random_head(tmp_path, target, 96)
    traces = []
    for use_graphs in (False, True):
        drafter = Eagle3(folder, structure=Adaptive(3, 0.2))
        decoder = SpeculativeDecoder(target, drafter, TargetOnly(), batch_size=2, use_graphs=use_graphs)
        traces.append(decoder.generate([list(prompt) for prompt in PROMPTS], 40, ignore_eos=True).trace.num_nodes)
    assert torch.equal(*traces)
    assert {2, 3, 4} <= set(traces[0].flatten().tolist())


# ---- the law ---------------------------------------------------------------------------------------------------------


class Peeks(Adaptive):
    """Drops a draft for its own probability: decided by the drawn token that is to be judged."""

    def draft(self, *args: Any) -> DraftTree:
        tree = super().draft(*args)
        assert tree.probs is not None
        own = tree.probs[:, :-1].gather(-1, tree.tokens[:, 1:, None]).squeeze(-1)
        kept = (own >= self.min_probability).cumprod(1).sum(1, dtype=torch.int32)
        return replace(tree, num_nodes=torch.minimum(tree.num_nodes, kept + 1))


class Ended(Verifier):
    """A verifier behind a chain that ends early: the structure drafts the tokens of every tree, and says how many of them."""

    supports_trees = False

    def __init__(self, inner: Verifier, structure: Structure) -> None:
        self.inner, self.structure, self.law = inner, structure, inner.law

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        def forward(inputs: ModelInputs, hidden: Tensor | None) -> tuple[Tensor, None]:
            assert tree.probs is not None
            return tree.probs[:, inputs.offset, None].log(), None

        root, prefix = tree.tokens[:, 0], torch.zeros_like(tree.num_nodes)
        dictated = patch.object(_static, "_children", lambda logits, shape, d, *_: tree.tokens[:, d + 1, None])
        with dictated:
            drafted = self.structure.draft(forward, root, prefix, sampling, self.law)
        assert torch.equal(drafted.tokens, tree.tokens[:, : drafted.tokens.shape[1]])
        return self.inner.accept(replace(tree, num_nodes=drafted.num_nodes), logits, sampling)


CASES = [
    (SpeculativeSampling(), "path", 0.45),
    (SpeculativeSampling(), "confidence", 0.65),
    (SpeculativeSampling(), "entropy", 0.58),
    (Block(), "path", 0.45),
    (Traversal(), "confidence", 0.65),
    (RRS(), "entropy", 0.58),
]


@pytest.mark.parametrize(("verifier", "rule", "least"), CASES)
def test_the_law_is_kept_to_the_last_digit(verifier: Verifier, rule: Any, least: float) -> None:
    """Every draft and every coin of a 3-token model; behind some first drafts a chain ends, behind others not."""
    lengths = []
    for at_least in (1.0, least, 0.0):
        deviation, length = exact(Ended(verifier, Adaptive(3, at_least, rule)), CHAIN, verifier.law)
        assert deviation < 5e-7
        lengths.append(length)
    assert lengths[0] < lengths[1] - 1e-3 < lengths[2] - 2e-3


@pytest.mark.parametrize("verifier", [SpeculativeSampling(), Block()])
def test_a_rule_that_looks_at_the_drawn_token_is_caught(verifier: Verifier) -> None:
    assert exact(Ended(verifier, Peeks(3, 0.3)), CHAIN, "iid")[0] > 1e-3


@pytest.mark.parametrize("case", range(4))
def test_several_steps_follow_the_joint_law(case: int) -> None:
    """In the loop, with real draws; the last case looks at what was drawn."""
    verifier: Verifier = [SpeculativeSampling(), Block(), Traversal(), SpeculativeSampling()][case]
    shape = [Adaptive(3, 0.5), Adaptive(3, 0.5, "confidence"), Adaptive(3, 0.6, "entropy"), Peeks(3, 0.3)][case]
    target = TableTarget(VOCAB, seed=1)
    drafter = SmallModel(model=TableTarget(VOCAB, seed=2, like=target), structure=shape)
    value = p_value(
        sampled_texts(target, drafter, verifier, SamplingParams(1.0)), target.law([0, 1], COUNT, sampling_of(1))
    )
    assert value > 1e-4 if case < 3 else value < 1e-9
