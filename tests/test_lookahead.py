"""Lookahead decoding against a Jacobi iteration and a pool in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from table_target import TableTarget
from torch import Tensor

from specdec.decoding import SpeculativeDecoder
from specdec.drafter.hybrid import Hybrid
from specdec.drafter.lookahead import GOLDEN, Lookahead
from specdec.drafter.ngram import NGram
from specdec.sampling import argmax
from specdec.target.toy import Toy
from specdec.testing import check_drafter
from specdec.testing.drafters import tree_problem
from specdec.testing.prefix_model import sampling_of
from specdec.types import Acceptance, DraftInputs, DraftTree, ModelOutput
from specdec.verifier.target_only import TargetOnly

VOCAB = 7
Text = list[int]
Pool = dict[int, list[tuple[int, ...]]]


def started(drafter: Lookahead, batch: int = 1, vocab: int = VOCAB) -> Lookahead:
    target = SimpleNamespace(config=SimpleNamespace(vocab_size=vocab), lengths=torch.zeros(batch, dtype=torch.int32))
    drafter.setup(target, batch, 64, "any")
    return drafter


def inputs_for(texts: Sequence[Text], num_new: Sequence[int] | None = None) -> DraftInputs:
    """Rows end in their root; what lies behind them must not be read. num_new None: requests begin."""
    tokens = torch.full((len(texts), max(map(len, texts)) + 8), 1 << 40)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
    new = [len(text) - 1 for text in texts] if num_new is None else list(num_new)
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    return DraftInputs(
        tokens, lengths, torch.tensor(new, dtype=torch.int32), max(new), None, sampling_of(len(texts), 0.0)
    )


def pool_of(drafter: Lookahead) -> Pool:
    """What the pool has, by first token and in the order of slots."""
    written = drafter.num_written.clamp(max=drafter.guesses).tolist()
    slots = drafter.pool.tolist()
    return {token: [tuple(rest) for rest in slots[token][: written[token]]] for token in range(VOCAB) if written[token]}


# ---- the method, in plain Python -------------------------------------------------------------------------------------


class Plain:
    """Every row's window and their pool, token by token. `choose` is the target: the token that it puts behind a text."""

    def __init__(self, drafter: Lookahead, prompts: Sequence[Text], choose: Any) -> None:
        self.columns, self.ngram, self.guesses = drafter.columns, drafter.ngram, drafter.guesses
        self.texts, self.choose = [list(prompt) for prompt in prompts], choose
        self.slots: Pool = {}
        self.written: dict[int, int] = {}
        self.windows = []
        for text in prompts:
            guess = [text[int(i * GOLDEN % 1 * len(text))] for i in range(self.columns * (self.ngram - 1))]
            self.windows.append([guess[i : i + self.columns] for i in range(0, len(guess), self.columns)])

    def iterate(self, running: Sequence[bool]) -> None:
        """The target continues every branch of every window; columns are remembered, levels move up."""
        columns: list[tuple[int, ...]] = []
        for row, runs in enumerate(running):
            window = self.windows[row]
            window[0][0] = self.texts[row][-1]
            if not runs:
                continue
            chosen = []
            for i in range(self.columns):
                branch = [level[i] for level in window[1:]]
                chosen.append(self.choose(self.texts[row] + window[0][1 : i + 1] + branch))
                columns.append((window[0][i], *branch, chosen[-1]))
            self.windows[row] = [*window[1:], chosen]
        self.remember(columns)

    def remember(self, ngrams: Sequence[tuple[int, ...]]) -> None:
        """Those that are not there yet, each in the slot that was written longest ago."""
        known = {(first, *rest) for first, kept in self.slots.items() for rest in kept}
        for ngram in dict.fromkeys(ngrams):
            if ngram not in known:
                first, kept = ngram[0], self.slots.setdefault(ngram[0], [])
                place = self.written.get(first, 0)
                self.written[first] = place + 1
                kept[place % self.guesses : place % self.guesses + 1] = [ngram[1:]]

    def remember_ends(self, num_new: Sequence[int]) -> None:
        """The n-grams of the texts that end in new tokens."""
        ngrams: list[tuple[int, ...]] = []
        for text, new in zip(self.texts, num_new, strict=True):
            ends = range(max(len(text) - new, self.ngram - 1), len(text))
            ngrams += [tuple(text[end + 1 - self.ngram : end + 1]) for end in ends]
        self.remember(ngrams)


def whole_text(text: Text) -> int:
    """A target that looks at every token, but mostly at the last two."""
    return (3 * text[-1] + text[-2] + (sum(text) % 4 == 0)) % VOCAB


def continued(tree: DraftTree, texts: Sequence[Text], choose: Any) -> Tensor:
    """Logits f32 [B, T, V] of a target that chooses so after every node."""
    logits = torch.zeros(*tree.tokens.shape, VOCAB)
    for row, text in enumerate(texts):
        for node, path in enumerate(tree.paths()[row].tolist()):
            logits[row, node, choose(text + [int(tree.tokens[row, i]) for i in path if i > 0])] = 1.0
    return logits


def compare(drafter: Lookahead, prompts: Sequence[Text], steps: int = 12) -> int:
    """Run a drafter and the plain one side by side, the second row only every other step. Returns accepted drafts."""
    started(drafter, len(prompts))
    plain = Plain(drafter, prompts, whole_text)
    num_new, accepted = [len(text) - 1 for text in prompts], 0
    for step in range(steps):
        inputs = inputs_for(plain.texts, num_new)
        if step == 0:
            drafter.prefill(inputs)
        if drafter.from_text:
            plain.remember_ends(num_new)
        tree = drafter.propose(inputs)
        assert tree_problem(tree, drafter, inputs, VOCAB) is None
        logits = continued(tree, plain.texts, whole_text)
        verdict = TargetOnly().accept(tree, logits, inputs.sampling)
        running = [row == 0 or step % 2 == 0 for row in range(len(prompts))]
        verdict.num_accepted = torch.where(torch.tensor(running), verdict.num_accepted, -1)
        drafter.observe(tree, ModelOutput(logits), verdict)
        plain.iterate(running)
        assert drafter.window.unflatten(1, (-1, drafter.columns)).tolist() == plain.windows
        assert pool_of(drafter) == plain.slots
        for row, runs in enumerate(running):
            path = verdict.path[row, 1 : 1 + int(verdict.num_accepted[row])].long() if runs else []
            emitted = [*tree.tokens[row, path].tolist(), int(verdict.next_token[row])] if runs else []
            plain.texts[row] += emitted
            num_new[row] = len(emitted)
            accepted += len(path)
    return accepted


@pytest.mark.parametrize("from_text", [False, True])
@pytest.mark.parametrize("sizes", [(3, 4, 2), (2, 2, 1), (4, 3, 3), (2, 5, 4)])
def test_window_and_pool_are_those_of_the_plain_method(sizes: tuple[int, int, int], from_text: bool) -> None:
    assert compare(Lookahead(*sizes, from_text=from_text), [[1, 2, 3, 1, 2], [4, 5]]) > 0


class Aslant(Lookahead):
    """Hangs the levels one column to the left."""

    def _merged(self, tokens: Tensor) -> Tensor:
        parents = super()._merged(tokens)
        parents[:, 4:6] -= 1
        return parents


class Unmoved(Lookahead):
    """Writes the newest level over the last one and leaves the others where they are."""

    def observe(self, tree: DraftTree, output: ModelOutput, acceptance: Acceptance) -> None:
        kept = self.window[:, : -self.columns]
        super().observe(tree, output, acceptance)
        self.window = torch.cat([kept, self.window[:, -self.columns :]], 1)


class Deaf(Lookahead):
    """Takes rows that do not run for running ones."""

    def observe(self, tree: DraftTree, output: ModelOutput, acceptance: Acceptance) -> None:
        acceptance = Acceptance(acceptance.path, acceptance.num_accepted.clamp(min=0), acceptance.next_token)
        super().observe(tree, output, acceptance)


@pytest.mark.parametrize("fault", [Aslant, Unmoved, Deaf])
def test_the_comparison_can_tell(fault: type[Lookahead]) -> None:
    with pytest.raises(AssertionError):
        compare(fault(3, 4, 2), [[1, 2, 3, 1, 2], [4, 5]])


# ---- the tree --------------------------------------------------------------------------------------------------------


def test_levels_hang_below_their_column() -> None:
    """W = 3 and N = 4 by hand: the root and two trunk tokens, two levels of three; then a guess below the root."""
    drafter = started(Lookahead(3, 4, 1))
    drafter._remember(torch.tensor([[[6, 5, 4, 3]]]), torch.tensor([[True]]))
    drafter.window = torch.tensor([[6, 0, 1, 2, 3, 4, 1, 2, 3]])
    tree = drafter.propose(inputs_for([[0, 1, 6]], [1]))
    assert tree.tokens.tolist() == [[6, 0, 1, 2, 3, 4, 1, 2, 3, 5, 4, 3]]
    assert tree.parents.tolist() == [[-1, 0, 1, 0, 1, 2, 3, 4, 5, 0, 9, 10]]
    assert tree.node_depths().tolist() == [[0, 1, 2, 1, 2, 3, 2, 3, 4, 1, 2, 3]]
    assert tree.num_nodes.tolist() == [12]


def num_accepted(drafter: Lookahead, right: Text) -> int:
    """Drafts accepted behind a root 6 where the target goes on like this."""
    text = [0, 1, 6]
    tree = drafter.propose(inputs_for([text], [1]))
    logits = continued(tree, [text], lambda longer: [*right, 0, 0, 0][len(longer) - 3])
    return int(TargetOnly().accept(tree, logits, sampling_of(1, 0.0)).num_accepted)


def test_branches_that_begin_alike_do_not_hide_one_another() -> None:
    """Guesses 5 4 3 and 5 2 1 behind a window that guesses 5 as well: what is right is reached, wherever it stands."""
    drafter = started(Lookahead(2, 4, 2))
    drafter._remember(torch.tensor([[[6, 5, 4, 3], [6, 5, 2, 1]]]), torch.ones(1, 2).bool())
    drafter.window = torch.tensor([[6, 5, 3, 3, 3, 3]])
    assert num_accepted(drafter, [5, 2, 1]) == 3
    drafter._merged = lambda tokens: drafter._parents.expand(tokens.shape)  # type: ignore[method-assign]
    assert num_accepted(drafter, [5, 2, 1]) == 1


def test_rows_take_as_many_nodes_as_they_have_guesses() -> None:
    drafter = started(Lookahead(2, 3, 3), batch=3)
    drafter._remember(torch.tensor([[[6, 5, 4], [6, 5, 2], [3, 1, 1]]]), torch.ones(1, 3).bool())
    tree = drafter.propose(inputs_for([[0, 1, 6], [0, 1, 3], [0, 1, 2]], [1, 1, 1]))
    assert tree.num_nodes.tolist() == [4 + 4, 4 + 2, 4]
    assert tree.tokens[0, 4:8].tolist() == [5, 4, 5, 2]
    assert tree.tokens[1, 4:6].tolist() == [1, 1]


# ---- the pool --------------------------------------------------------------------------------------------------------


def remember(drafter: Lookahead, *rows: Sequence[Text], counts: Tensor | None = None) -> Pool:
    ngrams = torch.tensor(rows)
    drafter._remember(ngrams, torch.ones(ngrams.shape[:2]).bool() if counts is None else counts)
    return pool_of(drafter)


def test_an_ngram_is_kept_once() -> None:
    drafter = started(Lookahead(2, 3, 4), batch=2)
    assert remember(drafter, [[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [1, 2, 4]]) == {1: [(2, 3), (2, 4)]}
    assert remember(drafter, [[1, 2, 4], [2, 2, 4]]) == {1: [(2, 3), (2, 4)], 2: [(2, 4)]}
    assert remember(drafter, [[0, 0, 0]])[0] == [(0, 0)]  # not taken for a slot that was never written


def test_the_oldest_is_overwritten() -> None:
    drafter = started(Lookahead(2, 3, 2))
    assert remember(drafter, [[1, 0, 0], [1, 1, 1]]) == {1: [(0, 0), (1, 1)]}
    assert remember(drafter, [[1, 2, 2]]) == {1: [(2, 2), (1, 1)]}
    assert remember(drafter, [[1, 3, 3], [1, 4, 4], [1, 5, 5]]) == {1: [(4, 4), (5, 5)]}  # of three the last two
    assert remember(drafter, [[1, 6, 6]]) == {1: [(6, 6), (5, 5)]}


def test_what_does_not_count_is_not_kept() -> None:
    drafter = started(Lookahead(2, 3, 2), batch=2)
    counts = torch.tensor([[True, False], [False, False]])
    assert remember(drafter, [[1, 2, 3], [1, 2, 4]], [[2, 2, 2], [1, 2, 3]], counts=counts) == {1: [(2, 3)]}


def test_a_prompt_is_remembered_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.randint(0, VOCAB, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    pools = []
    for at_once in (256, 7):
        monkeypatch.setattr("specdec.drafter.lookahead.AT_ONCE", at_once)
        drafter = started(Lookahead(2, 3, 60))
        assert drafter.prefill(inputs_for([text]))
        pools.append(pool_of(drafter))
    plain = Plain(drafter, [text], None)
    plain.remember_ends([len(text) - 1])
    assert pools == [plain.slots, plain.slots]


def test_calls_start_cold_unless_told() -> None:
    for persistent in (False, True):
        drafter = started(Lookahead(2, 3, 2, persistent=persistent))
        remember(drafter, [[1, 2, 3]])
        assert pool_of(started(drafter)) == ({1: [(2, 3)]} if persistent else {})
        assert pool_of(started(drafter, vocab=VOCAB + 1)) == {}


# ---- in the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 2, 1), (5, 5, 5)])
def test_conforms(sizes: tuple[int, int, int], toy: Toy) -> None:
    """Without the text's own n-grams: what is accepted comes from the iteration."""
    report = check_drafter(lambda: Lookahead(*sizes, from_text=False), TargetOnly(), toy)
    assert report.acceptance_length > 1.2


def test_a_text_that_repeats_itself_is_drafted() -> None:
    """A target that counts in a circle: no prompt holds an n-gram, iteration finds them all."""
    target = TableTarget(VOCAB, seed=0)
    target.table = torch.eye(VOCAB).roll(1, 1).expand(VOCAB, VOCAB, VOCAB).contiguous()
    drafter = Lookahead(3, 4, 2, from_text=False)
    result = SpeculativeDecoder(target, drafter, TargetOnly()).generate([[0, 1]], 83)
    assert result.tokens[0] == [(2 + i) % VOCAB for i in range(83)]
    assert result.trace.acceptance_length > 3.0


def test_another_drafters_tree_teaches_nothing() -> None:
    """In a hybrid the first drafter's rows, and its narrower trees, pass by."""
    drafter = started(Lookahead(2, 3, 2), batch=2)
    inputs = inputs_for([[1, 2, 1, 2], [3, 4, 5]], [1, 1])
    tree = drafter.propose(inputs)
    window = drafter.window.clone()
    tree.tokens[1, 1] = (tree.tokens[1, 1] + 1) % VOCAB
    logits = torch.randn(*tree.tokens.shape, VOCAB, generator=torch.Generator().manual_seed(0))
    verdict = TargetOnly().accept(tree, logits, inputs.sampling)
    drafter.observe(tree, ModelOutput(logits), verdict)
    assert drafter.window[1].tolist() == window[1].tolist()
    assert drafter.window[0, 2:].tolist() == argmax(logits)[0, 2:4].tolist()
    window, pool = drafter.window.clone(), drafter.pool.clone()
    narrow = DraftTree.chain(inputs.root, tree.tokens[:, 1:3])
    drafter.observe(narrow, ModelOutput(logits[:, :3]), verdict)
    assert torch.equal(drafter.window, window)
    assert torch.equal(drafter.pool, pool)


def test_conforms_in_a_hybrid(toy: Toy) -> None:
    check_drafter(lambda: Hybrid(NGram(), Lookahead(), min_drafts=4), TargetOnly(), toy)


@pytest.mark.parametrize("wrong", [{"window": 1}, {"ngram": 1}, {"guesses": 0}])
def test_sizes_that_cannot_be(wrong: dict[str, int]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Lookahead(**wrong)
