"""Lookahead decoding (Fu et al. 2402.02057): Jacobi iteration ahead of the text leaves n-grams, which are drafted.

Shapes: B rows, W columns of the window, N tokens of an n-gram, G guesses, P = (N - 1) W window nodes with the root,
T tree nodes, D depth, V vocabulary, C n-grams of a row and M of all rows that are remembered at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.drafter import Drafter
from specdec.sampling import argmax
from specdec.types import Acceptance, DraftInputs, DraftTree, Law, ModelOutput

__all__ = ["Lookahead"]

AT_ONCE = 256  # n-grams of a text that are remembered together: work grows with their square
GOLDEN = 0.618034  # its multiples fall evenly between whole numbers


class Lookahead(Drafter):
    """Drafts one tree: the window, there for the target to continue, and the n-grams that the pool has of the root.

    Level 0 of the window is a chain of W tokens from the root on; below its column i hang levels 1 to N - 2, each newer
    than the one above. So the token of level j sees columns 0 to i and its own branch, i + j tokens behind the root, as
    the paper's attention mask has it. What the target chooses after the last level completes an n-gram a column, for
    the pool, and is the last level of the next step; the others stand one level higher there, and level 0 is forgotten.
    A guess of the window that comes true is accepted like any draft.

    The window goes on by one token a step, however many were accepted, as in the authors' code. Moved on by all of them
    it would fit the text better but lose columns to new guesses, and on a real model less was accepted.

    The pool keeps the last G different n-grams of every first token. All rows share it: what a request drafts, not what
    it emits, depends on those beside it. `persistent` keeps it from one generate call to the next; otherwise each
    starts cold.
    """

    window: Tensor  # int64 [B, P]  token of level j, column i at j W + i; the root first
    pool: Tensor  # int32 [V + 1, G, N - 1]  what follows a token, -1 = nothing yet; the last row: writes that do not count
    num_written: Tensor  # int64 [V + 1]  n-grams of a token so far; the next one goes to slot num_written % G

    def __init__(
        self, window: int = 2, ngram: int = 4, guesses: int = 3, from_text: bool = True, persistent: bool = False
    ) -> None:
        """from_text: n-grams of the request's own text, prompt and output, enter the pool as well."""
        if window < 2 or ngram < 2 or guesses < 1:
            raise ValueError(
                f"{window=}, {ngram=}, {guesses=}: need a window of 2 columns, n-grams of 2 tokens and 1 guess, or more"
            )
        self.columns, self.ngram, self.guesses = window, ngram, guesses
        self.from_text, self.persistent = from_text, persistent
        self.size = (ngram - 1) * window
        parents = [*range(-1, window - 1), *range(self.size - window)]
        for first in range(self.size, self.size + guesses * (ngram - 1), ngram - 1):
            parents += [0, *range(first, first + ngram - 2)]
        self.num_draft_tokens = len(parents) - 1
        self.depth = window + ngram - 3
        self._parents = torch.tensor(parents, dtype=torch.int32)
        tree = self._parents[None]
        self._paths = DraftTree(tree, tree, tree[0, :1], self.depth).paths()[0]  # int32 [T, D + 1]

    def setup(self, target: Any, batch_size: int, max_len: int, law: Law) -> None:
        device, vocab = target.lengths.device, target.config.vocab_size
        self._parents, self._paths = self._parents.to(device), self._paths.to(device)
        self.window = torch.zeros(batch_size, self.size, dtype=torch.int64, device=device)
        if self.persistent and hasattr(self, "pool") and self.pool.shape[0] == vocab + 1:
            return
        shape = (vocab + 1, self.guesses, self.ngram - 1)
        self.pool = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.num_written = torch.zeros(vocab + 1, dtype=torch.int64, device=device)

    def prefill(self, inputs: DraftInputs) -> bool:
        self._follow(inputs)
        return True

    def propose(self, inputs: DraftInputs) -> DraftTree:
        """The window first, as every row has it whole; then as many n-grams as the pool has."""
        self._follow(inputs)
        self.window = torch.cat([inputs.root[:, None], self.window[:, 1:]], 1)
        guesses = self.pool[inputs.root].flatten(1)
        tokens = torch.cat([self.window, guesses.clamp(min=0)], 1)
        num_nodes = self.size + (guesses >= 0).sum(1, dtype=torch.int32)
        return DraftTree(tokens, self._merged(tokens), num_nodes, self.depth)

    def _merged(self, tokens: Tensor) -> Tensor:
        """Parents int32 [B, T] that make a trie: of nodes that spell the same text the first has all children.

        A verifier goes to the first child with the right token, where another branch may be the one that goes on right.
        """
        spelled = torch.where(self._paths >= 0, tokens[:, self._paths.clamp(min=0)], -1)  # [B, T, D + 1]
        same = (spelled[:, :, None] == spelled[:, None]).all(-1)
        nodes = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
        first = torch.where(same, nodes, tokens.shape[1]).amin(-1).to(torch.int32)
        return torch.where(nodes > 0, first[:, self._parents.clamp(min=0)], -1)

    def observe(self, tree: DraftTree, output: ModelOutput, acceptance: Acceptance) -> None:
        """Complete the columns' n-grams and move the levels up; a row without this tree, or not running, waits."""
        if tree.tokens.shape[1] < self.size:
            return
        mine = (tree.tokens[:, : self.size] == self.window).all(1) & (acceptance.num_accepted >= 0)
        chosen = argmax(output.logits[:, self.size - self.columns : self.size])
        levels = torch.cat([self.window, chosen], 1)
        self._remember(levels.view(len(levels), self.ngram, self.columns).mT, mine[:, None])
        self.window = torch.where(mine[:, None], levels[:, self.columns :], self.window)

    def _follow(self, inputs: DraftInputs) -> None:
        """Start windows with tokens from all over the prompt; remember the n-grams that end in new tokens."""
        begins = inputs.num_new == inputs.lengths - 1
        spread = torch.arange(self.size, device=begins.device) * GOLDEN % 1
        guess = inputs.tokens.gather(1, (spread * inputs.lengths[:, None]).long())
        self.window = torch.where(begins[:, None], guess, self.window)
        if not self.from_text:
            return
        back = torch.arange(self.ngram - 1, -1, -1, device=begins.device)
        newest_last = torch.arange(inputs.max_new - 1, -1, -1, device=begins.device)
        for ago in torch.split(newest_last, max(1, AT_ONCE // len(begins))):
            place = (inputs.lengths - 1)[:, None, None] - ago[:, None] - back  # [B, C, N]
            counts = (ago < inputs.num_new[:, None]) & (place[:, :, 0] >= 0)
            ngrams = inputs.tokens.gather(1, place.clamp(min=0).flatten(1)).view(place.shape)
            self._remember(ngrams, counts)

    def _remember(self, ngrams: Tensor, counts: Tensor) -> None:
        """Write n-grams int64 [B, C, N] that count, bool [B, C] or [B, 1], over the oldest; a known one stays.

        Of equal ones the first is written, and of more than G of one first token the last G: no two writes meet.
        """
        dropped = self.pool.shape[0] - 1
        first = torch.where(counts, ngrams[:, :, 0], dropped).flatten()  # [M]
        rest = ngrams[:, :, 1:].flatten(0, 1).to(torch.int32)
        index = torch.arange(len(first), device=first.device)
        alike = first[:, None] == first  # [M, M]
        earlier = alike & (index < index[:, None])
        repeated = (earlier & (rest[:, None] == rest).all(-1)).any(1)
        known = (self.pool[first] == rest[:, None]).all(-1).any(1)
        new = (first < dropped) & ~repeated & ~known
        before = (earlier & new).sum(1)
        written = new & ((alike & new).sum(1) - before <= self.guesses)
        slot = (self.num_written[first] + before) % self.guesses
        self.pool[torch.where(written, first, dropped), slot] = rest
        self.num_written.index_add_(0, first, new.long())
