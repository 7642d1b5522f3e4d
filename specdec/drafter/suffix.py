"""Suffix drafting: SuffixDecoding (2411.04975) on the suffix automata of SAM-Decoding (2411.10666).

A text's longest suffix that occurred before says what comes next, weighed by how often each continuation followed it.
Pure Python on the host: a step adds a handful of tokens at amortised constant cost each.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from specdec.drafter import Drafter
from specdec.types import DraftInputs, DraftTree, Law

__all__ = ["Suffix", "SuffixAutomaton"]

SEPARATOR = -1  # between texts of one automaton; no token id, so no match crosses it
MAX_COUNTED = 64  # suffixes that learn of one occurrence; only text repeating itself dozens of times has more


class SuffixAutomaton:
    """All substrings of a growing text (Blumer et al. 1985); a state is a set of them that end at the same places.

    Per state: `next` token -> state, `link` to the state of the longest suffix that ends elsewhere too, `length` of the
    longest member, `count` of occurrences (exact up to MAX_COUNTED links), `seen`: the end of the last.
    """

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.count = [0]
        self.seen = [0]
        self.last = 0  # the state of the whole text

    def extend(self, token: int) -> None:
        """Append one token."""
        new = self._add({}, 0, self.length[self.last] + 1, 0)
        state = self.last
        while state >= 0 and token not in self.next[state]:
            self.next[state][token] = new
            state = self.link[state]
        if state >= 0:
            self.link[new] = self._split(state, token)
        self.last = state = new
        for _ in range(MAX_COUNTED):
            if state == 0:
                break
            self.count[state] += 1
            self.seen[state] = self.length[new]
            state = self.link[state]

    def _add(self, following: dict[int, int], link: int, length: int, count: int) -> int:
        for column, value in ((self.link, link), (self.length, length), (self.count, count), (self.seen, 0)):
            column.append(value)
        self.next.append(following)
        return len(self.next) - 1

    def _split(self, state: int, token: int) -> int:
        """The state of `state`'s longest member followed by token, cut out of a larger one where it must be."""
        target = self.next[state][token]
        length = self.length[state] + 1
        if self.length[target] == length:
            return target
        clone = self._add(dict(self.next[target]), self.link[target], length, self.count[target])
        self.link[target] = clone
        while state >= 0 and self.next[state].get(token) == target:
            self.next[state][token] = clone
            state = self.link[state]
        return clone

    def follow(self, state: int, match_len: int, token: int) -> tuple[int, int]:
        """The longest suffix of (a match, token) that occurs in the text: its state and length."""
        while self.length[self.link[state]] >= match_len > 0:  # the state was split since
            state = self.link[state]
        while state and token not in self.next[state]:
            state = self.link[state]
            match_len = self.length[state]
        return (self.next[state][token], match_len + 1) if token in self.next[state] else (0, 0)

    def continuations(self, state: int, min_match: int) -> list[tuple[float, int, int]]:
        """(share of occurrences, token, state) of what followed, commonest then latest first.

        The end of the text has no continuation yet: its longest earlier suffix speaks for it. A match at the end itself
        counts as an occurrence, so a single precedent has share 1/2.
        """
        while state and not self.next[state]:
            state = self.link[state]
        if self.length[state] < min_match:
            return []
        ranked = sorted(self.next[state].items(), key=lambda item: (self.count[item[1]], self.seen[item[1]]))
        return [(min(self.count[to] / self.count[state], 1.0), token, to) for token, to in reversed(ranked)]


@dataclass(slots=True)
class _Row:
    """One request: its text, that text's automaton, and the match in the shared one."""

    prompt_len: int = 0
    text: list[int] = field(default_factory=list)
    own: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    state: int = 0
    match_len: int = 0


@dataclass(slots=True)
class _Draft:
    """Nodes behind the root; score = the number of them expected to be right (2411.04975, sec. 4.2)."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    score: float = 0.0


class Suffix(Drafter):
    """Drafts from the request itself and, if asked, from a corpus and from the outputs of earlier requests.

    A match of n tokens proposes at most max_spec_factor * n, best-first by the product of shares, none below
    min_token_prob. past_outputs shares outputs between rows and requests (about 0.5 kB a token, never forgotten): what
    is drafted, not what is emitted, then depends on them. A request's last step is not always seen.
    """

    graphable = False

    def __init__(
        self,
        num_draft_tokens: int = 5,
        min_match: int = 1,
        max_spec_factor: float = 3.0,
        min_token_prob: float = 0.1,
        tree: bool = False,
        past_outputs: bool = False,
        corpus: str | None = None,
    ) -> None:
        if num_draft_tokens < 1 or min_match < 1 or max_spec_factor <= 0:
            raise ValueError(f"{num_draft_tokens=}, {min_match=} and {max_spec_factor=} must be positive")
        self.num_draft_tokens = num_draft_tokens
        self.depth = max(num_draft_tokens - 1, 1) if tree else num_draft_tokens  # one more and it would be a chain
        self.min_match = min_match
        self.max_spec_factor = max_spec_factor
        self.min_token_prob = min_token_prob
        self.tree = tree
        self.past_outputs = past_outputs
        self.shared = SuffixAutomaton() if past_outputs or corpus else None
        self._rows: list[_Row] = []
        for text in read_corpus(corpus) if corpus else []:
            self._learn(text)

    def setup(self, target: Any, batch_size: int, max_len: int, law: Law) -> None:
        for row in self._rows:
            self._finish(row)
        self._rows = [_Row() for _ in range(batch_size)]

    def propose(self, inputs: DraftInputs) -> DraftTree:
        device, size = inputs.tokens.device, self.num_draft_tokens
        back = torch.arange(inputs.max_new, -1, -1, device=device)
        recent = inputs.tokens.gather(1, (inputs.lengths.long()[:, None] - 1 - back).clamp(min=0))
        drafts = []
        for i, (length, num_new, text) in enumerate(
            zip(inputs.lengths.tolist(), inputs.num_new.tolist(), recent.tolist(), strict=True)
        ):
            if num_new == length - 1:
                self._finish(self._rows[i])
                self._rows[i] = _Row(prompt_len=num_new)
                num_new += 1  # the root is new as well; later roots follow a root that is known
            self._read(self._rows[i], text[len(text) - num_new :])
            drafts.append(self._draft(self._rows[i]) if num_new else _Draft())
        tokens = torch.tensor([draft.tokens + [0] * (size - len(draft.tokens)) for draft in drafts], device=device)
        num_drafts = torch.tensor([len(draft.tokens) for draft in drafts], dtype=torch.int32, device=device)
        chain = DraftTree.chain(inputs.root, tokens, num_drafts)
        if not self.tree or size == 1:
            return chain
        parents = [[-1, *draft.parents, *[0] * (size - len(draft.parents))] for draft in drafts]
        parents_at = torch.tensor(parents, dtype=torch.int32, device=device)
        return DraftTree(chain.tokens, parents_at, chain.num_nodes, self.depth)

    def _read(self, row: _Row, tokens: Sequence[int]) -> None:
        row.text += tokens
        for token in tokens:
            row.own.extend(token)
            if self.shared is not None:
                row.state, row.match_len = self.shared.follow(row.state, row.match_len, token)

    def _finish(self, row: _Row) -> None:
        if self.past_outputs and len(row.text) > row.prompt_len:
            self._learn(row.text[row.prompt_len :])

    def _learn(self, text: Sequence[int]) -> None:
        assert self.shared is not None
        for token in (*text, SEPARATOR):
            self.shared.extend(token)

    def _draft(self, row: _Row) -> _Draft:
        """The better of the request's own draft and the shared one."""
        state = row.own.link[row.own.last]  # the longest suffix that also ends somewhere before
        best = self._expand(row.own, state, row.own.length[state])
        if self.shared is not None:
            best = max(best, self._expand(self.shared, row.state, row.match_len), key=lambda draft: draft.score)
        return best

    def _expand(self, automaton: SuffixAutomaton, state: int, match_len: int) -> _Draft:
        """Greedy expansion (2411.04975, alg. 1): always the likeliest node next; a path takes one child of each."""
        draft = _Draft()
        if match_len < self.min_match:
            return draft
        budget = min(self.num_draft_tokens, int(self.max_spec_factor * match_len))
        queue: list[tuple[float, int, int, int, int, int]] = []  # -probability, serial, depth, parent, token, state
        serial = node = depth = 0
        prob = 1.0
        while True:
            if depth < self.depth:
                children = automaton.continuations(state, self.min_match)
                for share, token, to in children if self.tree else children[:1]:
                    if token != SEPARATOR and prob * share >= self.min_token_prob:
                        heapq.heappush(queue, (-prob * share, serial, depth + 1, node, token, to))
                        serial += 1
            if not queue or len(draft.tokens) == budget:
                return draft
            negated, _, depth, parent, token, state = heapq.heappop(queue)
            prob = -negated
            draft.tokens.append(token)
            draft.parents.append(parent)
            draft.score += prob
            node = len(draft.tokens)


def read_corpus(path: str) -> list[list[int]]:
    """Texts of a JSONL file, one JSON list of token ids a line."""
    texts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        text = json.loads(line)
        if not isinstance(text, list) or not all(isinstance(token, int) and token >= 0 for token in text):
            raise ValueError(
                f"{path}, line {number}: {line[:40]!r} is not a JSON list of token ids; tokenise the corpus"
            )
        texts.append(text)
    return texts
