"""Drafters on their own: what they propose from hand-made inputs, against slow oracles in plain Python."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from specdec.drafter import Drafter
from specdec.drafter.hybrid import Hybrid
from specdec.drafter.layer_skip import LayerSkip
from specdec.drafter.ngram import NGram
from specdec.drafter.none import NoDraft
from specdec.drafter.small_model import SmallModel
from specdec.drafter.suffix import SEPARATOR, Suffix, SuffixAutomaton
from specdec.drafter.token_recycling import BLOCK, TokenRecycling, top_indices
from specdec.sampling import warp
from specdec.structure import TreeShape, likely_paths, regular_paths
from specdec.types import Acceptance, DraftInputs, DraftTree, ModelInputs, ModelOutput, Sampling

VOCAB = 11
Text = list[int]


def sampling_for(batch: int, temperature: float = 0.0, top_k: int = 0) -> Sampling:
    mode: Any = "greedy" if temperature == 0 else "warped" if top_k else "sampled"
    return Sampling(
        torch.full((batch,), temperature),
        torch.full((batch,), top_k, dtype=torch.int32),
        torch.ones(batch),
        torch.arange(batch),
        torch.full((batch,), 5, dtype=torch.int32),
        mode,
    )


def inputs_for(texts: Sequence[Text], num_new: Sequence[int] | None = None, room: int = 12, **how: Any) -> DraftInputs:
    """Rows end in their root; what lies behind them is garbage that must not be read. num_new None: requests begin."""
    size = max(map(len, texts)) + room
    tokens = torch.full((len(texts), size), 1 << 40)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
    new = [len(text) - 1 for text in texts] if num_new is None else list(num_new)
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    sampling = sampling_for(len(texts), **how)
    return DraftInputs(tokens, lengths, torch.tensor(new, dtype=torch.int32), max(new), None, sampling)


def target_for(batch: int = 1, vocab: int = VOCAB, **more: Any) -> Any:
    config = SimpleNamespace(vocab_size=vocab, num_layers=4)
    return SimpleNamespace(config=config, lengths=torch.zeros(batch, dtype=torch.int32), **more)


def start(drafter: Drafter, batch: int = 1, law: Any = "any", vocab: int = VOCAB) -> Drafter:
    drafter.setup(target_for(batch, vocab), batch, 64, law)
    return drafter


def rows(tree: DraftTree) -> list[Text]:
    """Proposed tokens of each row, padding left out."""
    return [tokens[1:n] for tokens, n in zip(tree.tokens.tolist(), tree.num_nodes.tolist(), strict=True)]


def check_shape(drafter: Drafter, tree: DraftTree, inputs: DraftInputs) -> None:
    """What the loop relies on."""
    batch, nodes = inputs.lengths.shape[0], drafter.num_draft_tokens + 1
    assert tree.tokens.shape == tree.parents.shape == (batch, nodes)
    assert tree.tokens.dtype == torch.int64
    assert tree.parents.dtype == tree.num_nodes.dtype == torch.int32
    assert tree.depth == drafter.depth
    assert torch.equal(tree.tokens[:, 0], inputs.root)
    assert (tree.parents[:, 0] == -1).all()
    assert (tree.parents < torch.arange(nodes)).all()
    assert (tree.parents[:, 1:] >= 0).all()
    assert ((tree.num_nodes >= 1) & (tree.num_nodes <= nodes)).all()
    assert int(tree.node_depths().max()) <= tree.depth


texts_strategy = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=1, max_size=4)


# ---- none and n-gram -------------------------------------------------------------------------------------------------


def test_no_draft_is_the_root_alone() -> None:
    inputs = inputs_for([[1, 2, 3], [4]])
    tree = NoDraft().propose(inputs)
    check_shape(NoDraft(), tree, inputs)
    assert tree.tokens.tolist() == [[3], [4]]


def lookup(text: Text, k: int, longest: int, shortest: int, factor: float) -> Text:
    """Prompt lookup, written as its definition."""
    for n in range(min(longest, len(text) - 1), shortest - 1, -1):
        for end in range(len(text) - 1, n - 1, -1):  # end of an earlier occurrence
            if text[end - n : end] == text[-n:]:
                copied = list(text)
                for i in range(min(k, int(factor * n))):
                    copied.append(copied[end + i])
                return copied[len(text) :]
    return []


@settings(max_examples=150, deadline=None)
@given(texts_strategy, st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.5, 1.0, 3.0]))
def test_ngram_matches_its_definition(texts: list[Text], k: int, a: int, b: int, factor: float) -> None:
    drafter = NGram(k, max(a, b), min(a, b), factor)
    inputs = inputs_for(texts)
    tree = drafter.propose(inputs)
    check_shape(drafter, tree, inputs)
    assert tree.is_chain
    assert rows(tree) == [lookup(text, k, max(a, b), min(a, b), factor) for text in texts]


def test_ngram_prefers_longer_then_later() -> None:
    assert rows(NGram(2).propose(inputs_for([[1, 2, 7, 7, 2, 8, 8, 1, 2]]))) == [[7, 7]]
    assert rows(NGram(2).propose(inputs_for([[2, 7, 7, 2, 8, 8, 2]]))) == [[8, 8]]


@pytest.mark.parametrize("wrong", [{"min_ngram": 4}, {"min_ngram": 0}, {"num_draft_tokens": 0}, {"max_ngram": 300}])
def test_ngram_rejects(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        NGram(**wrong)


# ---- suffix ----------------------------------------------------------------------------------------------------------


def occurrences(text: Text, part: Text) -> int:
    return sum(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=30))
def test_automaton_counts_every_substring(text: Text) -> None:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.extend(token)
    for i in range(len(text)):
        state = 0
        for j in range(i, len(text)):
            state = automaton.next[state][text[j]]
            part = text[i : j + 1]
            assert automaton.count[state] == occurrences(text, part)
            assert automaton.seen[state] == max(
                e for e in range(len(text) + 1) if text[max(e - len(part), 0) : e] == part
            )
    repeated = max(n for n in range(len(text)) if n == 0 or occurrences(text, text[-n:]) > 1)
    assert automaton.length[automaton.link[automaton.last]] == repeated


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=40))
def test_match_survives_growth_of_the_shared_automaton(events: list[tuple[bool, int]]) -> None:
    """Texts are read and learnt in any order; the match stays the longest suffix read that was known in time."""
    automaton, read, learnt = SuffixAutomaton(), [], []
    state = match_len = 0
    for learn, token in events:
        if learn:
            automaton.extend(token)
            learnt.append(token)
            continue
        read.append(token)
        previous = match_len
        state, match_len = automaton.follow(state, match_len, token)
        known = [n for n in range(previous + 2) if occurrences(learnt, read[len(read) - n :])]
        assert match_len == max(known)
        assert occurrences(learnt, read[len(read) - match_len :]) == automaton.count[state] or not match_len


def run_suffix(drafter: Suffix, text: Text, prompt: int, step: int = 2) -> list[Text]:
    """Feed one request in steps, as the loop would; the proposals."""
    drafts = [rows(drafter.propose(inputs_for([text[: prompt + 1]])))[0]]
    for end in range(prompt + 1 + step, len(text) + 1, step):
        drafts += rows(drafter.propose(inputs_for([text[:end]], [step])))
    return drafts


def test_suffix_is_the_same_however_the_text_arrives() -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2]
    whole = Suffix()
    start(whole)
    for step in (1, 2, 3):
        drafter = Suffix()
        start(drafter)
        assert run_suffix(drafter, text, 11 - 3 * step - 1, step)[-1] == run_suffix(whole, text, 10)[-1]
    assert run_suffix(whole, text, 10)[-1][0] == 4  # after (3, 1, 2), not after the commoner (1, 2)


def test_suffix_takes_the_commonest_then_the_latest() -> None:
    drafter = start(Suffix(num_draft_tokens=1))
    assert rows(drafter.propose(inputs_for([[9, 5, 8, 9, 5, 7, 9, 5, 8, 6, 5]]))) == [[8]]
    assert rows(drafter.propose(inputs_for([[9, 5, 8, 7, 5, 7, 6, 5]]))) == [[7]]


def test_suffix_budget_threshold_and_period() -> None:
    text = [1, 2, 3, 4, 5, 6, 1]  # one precedent: shares 1/2, then 1
    assert rows(start(Suffix(8)).propose(inputs_for([text]))) == [[2, 3, 4]]
    assert rows(start(Suffix(8, max_spec_factor=9)).propose(inputs_for([text]))) == [[2, 3, 4, 5, 6, 1, 2, 3]]
    assert rows(start(Suffix(8, min_token_prob=0.6)).propose(inputs_for([text]))) == [[]]
    assert rows(start(Suffix(8, min_match=2)).propose(inputs_for([text]))) == [[]]


def test_suffix_rows_are_independent_and_begin_anew() -> None:
    drafter = start(Suffix(), 3)
    known, fresh = [1, 2, 3, 1], [4, 5, 6]
    assert rows(drafter.propose(inputs_for([known, fresh, known])))[1] == []
    drafts = rows(drafter.propose(inputs_for([[*known, 2], [1, 5, 6], known], [1, 2, 0])))
    assert drafts[0][:1] == [3]
    assert drafts[1] == []  # began anew: the row's earlier request is forgotten
    assert drafts[2] == []  # not running


def test_suffix_learns_from_past_outputs_and_corpus(tmp_path: Path) -> None:
    drafter = Suffix(past_outputs=True)
    start(drafter)
    run_suffix(drafter, [1, 2, 3, 4, 5, 6, 7, 8], 3)
    assert run_suffix(drafter, [8, 4, 5], 2)[-1] == [6, 7, 8]  # an output of the request before
    assert run_suffix(drafter, [8, 1, 2], 2)[-1] == []  # of its prompt nothing is kept
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps([1, 2, 3]) + "\n" + json.dumps([3, 9]))
    drafter = Suffix(corpus=str(corpus))
    start(drafter)
    assert run_suffix(drafter, [8, 1, 2], 2)[-1] == [3]  # and not across the end of a text
    assert SEPARATOR not in drafter.shared.next[0] or run_suffix(drafter, [8, 3], 1)[-1] == [9]
    corpus.write_text('"words"')
    with pytest.raises(ValueError, match="line 1"):
        Suffix(corpus=str(corpus))


@settings(max_examples=60, deadline=None)
@given(texts_strategy, st.integers(1, 7), st.booleans())
def test_suffix_trees_are_valid(texts: list[Text], k: int, tree: bool) -> None:
    drafter = start(Suffix(k, tree=tree, min_token_prob=0.01, max_spec_factor=7), len(texts))
    inputs = inputs_for(texts)
    drafted = drafter.propose(inputs)
    check_shape(drafter, drafted, inputs)
    assert drafted.is_chain == (not tree or k == 1)
    for tokens, parents, count in zip(
        drafted.tokens.tolist(), drafted.parents.tolist(), drafted.num_nodes, strict=True
    ):
        pairs = list(zip(parents[:count], tokens[:count], strict=True))
        assert len(set(pairs)) == len(pairs)  # siblings differ


def test_suffix_tree_hedges() -> None:
    drafter = start(Suffix(4, tree=True))
    tree = drafter.propose(inputs_for([[5, 8, 5, 7, 5]]))
    assert rows(tree) == [[7, 8, 5]]
    assert tree.parents[0, :4].tolist() == [-1, 0, 0, 1]


# ---- tree shapes -----------------------------------------------------------------------------------------------------


def test_tree_shapes() -> None:
    shape = TreeShape(regular_paths([2, 1]))
    assert shape.parents.tolist() == [-1, 0, 0, 1, 2]
    assert [slots.tolist() for slots in shape.slots] == [[[0]], [[0, 1], [0, 2]], [[0, 1, 3], [0, 2, 4]]]
    assert sorted(likely_paths(4, lambda depth: (0.5, 0.3, 0.1), 6)) == [(0,), (0, 0), (0, 1), (1,)]
    assert max(map(len, likely_paths(30, lambda depth: (0.5, 0.4), 3))) == 3
    for missing in ([[1]], [[0, 0]]):
        with pytest.raises(ValueError, match=r"needs \[0\]"):
            TreeShape(missing)


# ---- token recycling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [7, 64, 4 * BLOCK, 100 * BLOCK, 100 * BLOCK + 1])
def test_top_indices_are_those_of_topk(vocab: int) -> None:
    logits = torch.randn(2, 3, vocab, generator=torch.Generator().manual_seed(vocab))
    assert torch.equal(top_indices(logits, 5), logits.topk(5).indices)


def verified(tokens: list[Text], num_nodes: Text, accepted: Text, logits: Tensor) -> tuple[Any, ...]:
    tree = DraftTree(torch.tensor(tokens), torch.zeros(len(tokens), len(tokens[0])).int(), torch.tensor(num_nodes), 1)
    return tree, ModelOutput(logits), Acceptance(tree.parents, torch.tensor(accepted), tree.tokens[:, 0])


def test_recycling_keeps_the_last_nodes_successors() -> None:
    drafter = TokenRecycling(num_draft_tokens=3, top_k=3)
    start(drafter, 3)
    logits = torch.randn(3, 4, VOCAB, generator=torch.Generator().manual_seed(0))
    top = logits.topk(3).indices
    drafter.observe(*verified([[1, 2, 1, 3], [2, 4, 5, 6], [7, 7, 8, 9]], [3, 4, 4], [0, 3, -1], logits))
    expected = {1: top[0, 2], 2: top[1, 0], 4: top[1, 1], 5: top[1, 2], 6: top[1, 3]}
    for token in range(VOCAB):
        assert drafter.successors[token].tolist() == expected.get(token, torch.tensor([-1] * 3)).tolist(), token


def test_recycling_fills_its_tree() -> None:
    drafter = TokenRecycling(top_k=2, tree=[[0], [1], [0, 0], [0, 1], [1, 0]])
    start(drafter, 2)
    logits = torch.zeros(1, 3, VOCAB)
    for node, (first, second) in enumerate([(2, 3), (4, 5), (6, 7)]):  # successors of 1, 2, 3
        logits[0, node, first], logits[0, node, second] = 2.0, 1.0
    drafter.observe(*verified([[1, 2, 3]], [3], [0], logits))
    inputs = inputs_for([[9, 1], [1, 9]])
    tree = drafter.propose(inputs)
    check_shape(drafter, tree, inputs)
    assert tree.tokens[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert tree.parents[0].tolist() == [-1, 0, 0, 1, 1, 2]
    assert tree.num_nodes.tolist() == [6, 1]  # nothing is known of 9
    with pytest.raises(ValueError, match="top_k=1"):
        TokenRecycling(top_k=1, tree=[[0], [1]])


def test_recycling_forgets_between_calls_unless_told() -> None:
    for persistent in (False, True):
        drafter = TokenRecycling(top_k=2, persistent=persistent)
        start(drafter)
        drafter.successors[3] = 1
        start(drafter)
        assert (drafter.successors[3, 0] == 1) == persistent


# ---- drafting with a model -------------------------------------------------------------------------------------------


class FakeModel:
    """Its cache holds the tokens themselves, its prediction is a hash of all the tokens it sees, in order."""

    def __init__(self, vocab: int = VOCAB) -> None:
        self.config = SimpleNamespace(vocab_size=vocab, num_layers=4)
        self.sizes: list[int] = []

    def allocate(self, batch_size: int, max_len: int, num_nodes: int, features: Sequence[int | str] = ()) -> None:
        self.cache = torch.full((batch_size, max_len + num_nodes), -1)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32)

    def predict(self, text: Text) -> Tensor:
        generator = torch.Generator().manual_seed(hash(tuple(text)))
        return torch.randn(self.config.vocab_size, generator=generator)

    def forward(self, inputs: ModelInputs, layers: int | None = None) -> ModelOutput:
        batch, count = inputs.tokens.shape
        assert inputs.positions.dtype == inputs.prefix_lens.dtype == torch.int32
        assert inputs.positions.is_contiguous()
        self.sizes.append(count)
        self.layers = layers
        logits = torch.zeros(batch, count, self.config.vocab_size)
        for b in range(batch):
            prefix = int(inputs.prefix_lens[b])
            self.cache[b, prefix + inputs.offset : prefix + inputs.offset + count] = inputs.tokens[b]
            for t in range(count):
                seen = list(range(prefix + inputs.offset + t + 1))
                if inputs.paths is not None:
                    assert inputs.paths.is_contiguous()
                    seen = [*range(prefix), *(prefix + slot for slot in inputs.paths[b, t].tolist() if slot >= 0)]
                assert inputs.positions[b, t] == len(seen) - 1
                logits[b, t] = self.predict(self.cache[b, seen].tolist())
        return ModelOutput(logits)

    def continuation(self, text: Text, steps: int) -> Text:
        for _ in range(steps):
            text = [*text, int(self.predict(text).argmax())]
        return text[-steps:]


def small(model: FakeModel, batch: int, law: Any = "any", **params: Any) -> SmallModel:
    drafter = SmallModel(model, **params)
    drafter.setup(target_for(batch), batch, 64, law)
    return drafter


def test_small_model_follows_steps_rollbacks_and_refills() -> None:
    model = FakeModel()
    drafter = small(model, 3, num_draft_tokens=3, prefill_chunk=4)
    texts = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], [3, 1], [5]]

    def check(new: Sequence[int] | None) -> list[Text]:
        inputs = inputs_for(texts, new)
        if inputs.max_new > drafter.depth + 1:
            assert drafter.prefill(inputs)
        tree = drafter.propose(inputs)
        check_shape(drafter, tree, inputs)
        assert rows(tree) == [model.continuation(text, 3) for text in texts]
        return rows(tree)

    drafts = check(None)
    assert max(model.sizes) == 5  # the prompt came in chunks of 4, the window is depth + 2
    texts = [texts[0] + drafts[0] + [7], texts[1] + drafts[1][:1] + [0], texts[2]]  # all, one, not running
    drafts = check([4, 2, 0])
    texts = [[2, 4, 6, 8, 10, 1, 3, 5, 7], [*texts[1], 9], texts[2] + [4]]  # a refill beside rejected drafts
    check([8, 1, 1])
    texts = [[*texts[0], 1], [*texts[1], 2], [6, 6]]
    check([1, 1, 1])


@pytest.mark.parametrize("law", ["any", "distinct", "iid"])
def test_small_model_trees_have_the_law_they_record(law: Any) -> None:
    model = FakeModel()
    drafter = small(model, 2, law, structure=[3, 2])
    texts = [[1, 2, 3], [4, 5, 6, 7]]
    inputs = inputs_for(texts, temperature=0.7, top_k=6)
    tree = drafter.propose(inputs)
    check_shape(drafter, tree, inputs)
    assert tree.parents[0].tolist() == [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    paths = tree.paths()
    for b, text in enumerate(texts):
        for node in range(4):
            prefix = text + [int(tree.tokens[b, i]) for i in paths[b, node] if i > 0]
            logits = model.predict(prefix)
            children = tree.tokens[b, tree.parents[b] == node].tolist()
            if law == "any":
                assert children == logits.topk(len(children)).indices.tolist()
                continue
            expected = warp(logits.expand(2, 1, -1), inputs.sampling)[b, 0].softmax(-1)
            assert tree.probs is not None
            torch.testing.assert_close(tree.probs[b, node], expected)
            assert (expected[children] > 0).all()
            assert law == "iid" or len(set(children)) == len(children)
    assert (tree.probs is None) == (law == "any")


@pytest.mark.parametrize("law", ["distinct", "iid"])
def test_drawn_siblings_follow_their_joint_law(law: Any) -> None:
    """Frequencies of (first, second) child at the root, and of the grandchildren of both, over many seeds."""
    batch, probs = 20_000, torch.tensor([0.5, 0.3, 0.2])
    model = FakeModel(3)
    model.forward = lambda inputs, layers=None: ModelOutput(probs.log().expand(*inputs.tokens.shape, 3))  # type: ignore
    drafter = SmallModel(model, structure=[2, 1])
    drafter.setup(target_for(batch, 3), batch, 64, law)
    tree = drafter.propose(inputs_for([[1, 2]] * batch, temperature=1.0))
    second = probs.expand(3, 3).clone()
    if law == "distinct":
        second = second.fill_diagonal_(0)
        second /= second.sum(-1, keepdim=True)
    for columns, law_of_pair in (((1, 2), probs[:, None] * second), ((3, 4), probs[:, None] * probs)):
        a, b = tree.tokens[:, columns[0]], tree.tokens[:, columns[1]]
        seen = torch.bincount(3 * a + b, minlength=9).view(3, 3) / batch
        assert (seen - law_of_pair).abs().max() < 5 * (0.25 / batch) ** 0.5


def test_greedy_batches_draft_without_laws() -> None:
    tree = small(FakeModel(), 1, "iid").propose(inputs_for([[1, 2]]))
    assert tree.probs is None


def test_small_model_needs_the_targets_vocabulary() -> None:
    with pytest.raises(ValueError, match="11 token ids, the target 12"):
        SmallModel(FakeModel()).setup(target_for(vocab=12), 1, 64, "any")


@pytest.mark.parametrize("num_children", [None, [2, 2]])
def test_layer_skip_drafts_in_the_targets_cache(num_children: Sequence[int] | None) -> None:
    texts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    model = FakeModel()
    model.allocate(2, 32, 8)
    drafter = LayerSkip(exit_layer=2, num_draft_tokens=3, structure=num_children)
    drafter.setup(model, 2, 32, "any")
    for b, text in enumerate(texts):  # the committed tokens, without the root
        model.cache[b, : len(text) - 1] = torch.tensor(text[:-1])
    inputs = inputs_for(texts)
    tree = drafter.propose(inputs)
    check_shape(drafter, tree, inputs)
    assert model.layers == 2
    paths = tree.paths()
    for b, text in enumerate(texts):
        greedy = [int(tree.tokens[b, i]) for i in paths[b, -1] if i > 0] if num_children is None else None
        assert greedy is None or greedy == model.continuation(text, 3)
        for node in range(1, tree.tokens.shape[1]):
            parent = int(tree.parents[b, node])
            prefix = text + [int(tree.tokens[b, i]) for i in paths[b, parent] if i > 0]
            assert tree.tokens[b, node] in model.predict(prefix).topk(2).indices
        assert model.cache[b, : len(text) - 1].tolist() == text[:-1]


def test_layer_skip_needs_layers_left() -> None:
    for exit_layer in (0, 4):
        with pytest.raises(ValueError, match=f"exit_layer={exit_layer}"):
            start(LayerSkip(exit_layer))


# ---- no host reads ---------------------------------------------------------------------------------------------------


class ConstantModel:
    """Zero logits, without a cache."""

    config = SimpleNamespace(vocab_size=VOCAB, num_layers=4)
    lengths = torch.zeros(2, dtype=torch.int32)

    def allocate(self, *sizes: Any) -> None:
        pass

    def forward(self, inputs: ModelInputs, layers: int | None = None) -> ModelOutput:
        return ModelOutput(torch.zeros(*inputs.tokens.shape, VOCAB))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "drafter",
    [
        NoDraft(),
        NGram(),
        TokenRecycling(),
        LayerSkip(2),
        LayerSkip(2, structure=[2, 1]),
        SmallModel(ConstantModel(), structure=[2, 2]),
    ],
    ids=lambda drafter: type(drafter).__name__,
)
def test_graphable_drafters_read_nothing_on_the_host(drafter: Drafter, temperature: float) -> None:
    assert drafter.graphable
    drafter.setup(ConstantModel(), 2, 64, "distinct")
    real = inputs_for([[1, 2, 1], [3, 3, 3, 3]], temperature=temperature)
    refuse = {name: lambda *_: pytest.fail("read on the host") for name in ("tolist", "numpy", "cpu", "__array__")}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, patch.multiple(Tensor, **refuse):
        fake = {name: mode.from_tensor(getattr(real, name)) for name in ("tokens", "lengths", "num_new")}
        tree = drafter.propose(DraftInputs(**fake, max_new=real.max_new, features=None, sampling=real.sampling))
        logits = torch.zeros(*tree.tokens.shape, VOCAB)
        accepted = torch.zeros(2, dtype=torch.int32)
        drafter.observe(tree, ModelOutput(logits), Acceptance(tree.parents, accepted, tree.tokens[:, 0]))


# ---- two in one ------------------------------------------------------------------------------------------------------


class Said(NoDraft):
    """Proposes what it was given and notes what it was asked."""

    def __init__(self, drafts: Sequence[Sequence[int]], size: int, tree: bool = False) -> None:
        self.drafts, self.size, self.tree = drafts, size, tree
        self.num_draft_tokens, self.depth = size, size - 1 if tree else size
        self.asked: list[str] = []

    def prefill(self, inputs: DraftInputs) -> bool:
        self.asked.append("follow")
        return True

    def propose(self, inputs: DraftInputs) -> DraftTree:
        self.asked.append("propose")
        tokens = torch.tensor([[*drafts, *[0] * (self.size - len(drafts))] for drafts in self.drafts])
        counts = torch.tensor([len(drafts) for drafts in self.drafts], dtype=torch.int32)
        chain = DraftTree.chain(inputs.root, tokens, counts)
        if not self.tree:
            return chain
        parents = torch.tensor([-1, 0, 0, *range(2, self.size)], dtype=torch.int32).expand(len(counts), -1)
        return DraftTree(chain.tokens, parents, chain.num_nodes, self.depth)


def test_a_row_takes_the_first_drafts_where_there_are_enough() -> None:
    inputs = inputs_for([[1, 2], [3, 4], [5, 6]], [1, 1, 1])
    first, second = Said([[1, 2, 3], [1], []], 3), Said([[7, 8], [7, 8], [7]], 2)
    hybrid = Hybrid(first, second, min_drafts=2)
    tree = hybrid.propose(inputs)
    check_shape(hybrid, tree, inputs)
    assert tree.is_chain
    assert rows(tree) == [[1, 2, 3], [7, 8], [7]]
    assert second.asked == ["propose"]


def test_the_second_only_follows_while_the_first_serves_all() -> None:
    """A row that does not run asks for nothing."""
    first, second = Said([[1, 2], [], [3, 4]], 2), Said([[7], [7], [7]], 1)
    hybrid = Hybrid(first, second, min_drafts=2)
    tree = hybrid.propose(inputs_for([[1, 2], [3, 4], [5, 6]], [1, 0, 1]))
    assert rows(tree) == [[1, 2], [], [3, 4]]
    assert second.asked == ["follow"]


@pytest.mark.parametrize("size", [2, 4])
def test_a_chain_beside_a_tree_is_a_tree(size: int) -> None:
    """Padding keeps what each proposed; a chain as deep as there are nodes gets a node more, or it would be read as one."""
    inputs = inputs_for([[1, 2], [3, 4]], [1, 1])
    hybrid = Hybrid(Said([[1, 2][:size], []], size), Said([[5, 6, 7], [5, 6, 7]], 3, tree=True), min_drafts=2)
    tree = hybrid.propose(inputs)
    check_shape(hybrid, tree, inputs)
    assert not tree.is_chain
    assert tree.num_nodes.tolist() == [3, 4]
    assert tree.node_depths()[0, :3].tolist() == [0, 1, 2]
    assert tree.node_depths()[1, :4].tolist() == [0, 1, 1, 2]
    assert tree.tokens[0, :3].tolist() == [2, 1, 2]
    assert tree.tokens[1, :4].tolist() == [4, 5, 6, 7]


def test_each_part_of_a_hybrid_gets_the_room_it_would_get_alone() -> None:
    """The longest row and its own tree: more could be beyond the positions that a draft model has."""
    room: dict[int, int] = {}

    class Asked(Said):
        def setup(self, target: Any, batch_size: int, max_len: int, law: Any) -> None:
            room[self.size] = max_len

    Hybrid(Asked([[1]], 5), Asked([[1]], 2), min_drafts=1).setup(target_for(), 1, 100 + 5 + 1, "any")
    assert room == {5: 100 + 5 + 1, 2: 100 + 2 + 1}


def test_a_hybrid_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="min_drafts=6 must be 1 to 5, the most that NGram proposes"):
        Hybrid(NGram(), NoDraft(), min_drafts=6)
    taps = Said([[1]], 1)
    taps.features = ("hidden",)
    with pytest.raises(ValueError, match="Said and Said both read the target's features"):
        Hybrid(taps, taps, min_drafts=1)
