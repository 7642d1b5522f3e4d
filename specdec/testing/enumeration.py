"""The exact law of what a verifier emits, from the outside.

Every draft tree of a small model is listed. For each, the verifier's own code is run on chosen noise: tokens it samples
are dictated and weighed by the law it hands over, and the space of its coins is cut into the boxes on which its verdict
is constant, by bisection. Sums over boxes are exact for coins on a grid of 2^22 values: 1e-7 a coin from uniform.

Shapes: A draft trees, N nodes with the root, V vocabulary, R rows of one call (= points of noise), M boxes, H prefixes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor

from specdec import sampling as noise
from specdec.sampling import STREAM_ACCEPT, STREAM_TOKEN, argmax, warp
from specdec.testing.prefix_model import PrefixModel, Topology, sibling_law
from specdec.types import DraftTree, Sampling
from specdec.verifier import Verifier

GRID = 1 << 22  # (k + 0.5) / GRID is exact in f32
SAME = 1e-6  # weights closer than this belong to one box


class NotEnumerableError(Exception):
    """The verifier takes its noise in a way that cannot be dictated; only sampling can test it."""


@dataclass
class Dictated:
    """Stands in for `specdec.sampling`: row r (= its seed) meets coins[r, node] and draws tokens[r, 0], [r, 1], ..."""

    coins: Tensor  # f32 [R, N]
    tokens: Tensor  # int64 [R, draws]
    weight: Tensor = field(init=False)  # f64 [R]  probability of the dictated tokens
    draws: int = 0
    coined: set[int] = field(default_factory=set)  # nodes whose coins were asked for

    def __post_init__(self) -> None:
        self.weight = torch.ones(len(self.coins), dtype=torch.float64)

    def uniform(self, seed: Tensor, position: Tensor, stream: int, index: Tensor) -> Tensor:
        """Coins are known by their node: any other stream or index cannot be dictated. The seed is the row."""
        if stream != STREAM_ACCEPT or int(index.max()) >= self.coins.shape[1]:
            raise NotEnumerableError(f"asks for coins of stream {stream} up to index {int(index.max())}")
        self.coined |= set(index.flatten().tolist())
        return self.coins[seed.long(), index.long()]

    def gumbel(self, seed: Tensor, position: Tensor, stream: int, size: int) -> Tensor:
        """Bare Gumbel noise does not say which law it meets."""
        raise NotEnumerableError("asks for Gumbel noise directly")

    def sample(self, probs: Tensor, sampling: Sampling, position: Tensor, stream: int) -> Tensor:
        """Dictate a draw from `probs` [R, V] and weigh it."""
        return self._draw(probs[:, None], sampling).squeeze(1)

    def choose(self, logits: Tensor, sampling: Sampling, position: Tensor, stream: int = STREAM_TOKEN) -> Tensor:
        """Dictate one token per prediction [R, N, V]; independently, since a path meets one node per position."""
        if sampling.mode == "greedy":
            return argmax(logits)
        return self._draw(warp(logits, sampling).softmax(-1), sampling)

    def _draw(self, probs: Tensor, sampling: Sampling) -> Tensor:
        count = probs.shape[1]
        token = self.tokens[sampling.seed, self.draws : self.draws + count]
        law = probs.double().gather(-1, token[..., None]).squeeze(-1) / probs.double().sum(-1)
        self.weight *= law.prod(1)
        self.draws += count
        return token


class _Switch:
    """The functions of `specdec.sampling`, forwarded to whichever `Dictated` is current."""

    current: Dictated

    def uniform(self, seed: Tensor, position: Tensor, stream: int, index: Tensor) -> Tensor:
        return self.current.uniform(seed, position, stream, index)

    def gumbel(self, seed: Tensor, position: Tensor, stream: int, size: int) -> Tensor:
        return self.current.gumbel(seed, position, stream, size)

    def sample(self, probs: Tensor, sampling: Sampling, position: Tensor, stream: int) -> Tensor:
        return self.current.sample(probs, sampling, position, stream)

    def choose(self, logits: Tensor, sampling: Sampling, position: Tensor, stream: int = STREAM_TOKEN) -> Tensor:
        return self.current.choose(logits, sampling, position, stream)


@contextmanager
def dictated_noise() -> Iterator[_Switch]:
    """Replace the noise functions in every loaded module that holds them, under whatever name it imported them."""
    switch = _Switch()
    fakes = {id(getattr(noise, name)): getattr(switch, name) for name in ("uniform", "gumbel", "sample", "choose")}
    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if id(value) in fakes:
                    stack.enter_context(patch.object(module, name, fakes[id(value)]))
        yield switch


@dataclass
class _Judge:
    """Runs a verifier on dictated noise for many draft trees at once."""

    verifier: Verifier
    model: PrefixModel
    tree: DraftTree  # A trees
    logits: Tensor
    sampling: Sampling  # of one row
    switch: _Switch

    def run(self, which: Tensor, coins: Tensor, tokens: Tensor) -> Tensor:
        """Judge tree which[r] with the coins and tokens of row r; f64 [R, 2]: prefix emitted, weight of its draws."""
        rows = len(which)
        probs = None if self.tree.probs is None else self.tree.probs[which]
        tree = DraftTree(
            self.tree.tokens[which], self.tree.parents[which], self.tree.num_nodes[which], self.tree.depth, probs
        )
        one = self.sampling
        sampling = Sampling(
            temperature=one.temperature.expand(rows),
            top_k=one.top_k.expand(rows),
            top_p=one.top_p.expand(rows),
            seed=torch.arange(rows),
            position=one.position.expand(rows),
            mode=one.mode,
        )
        self.switch.current = Dictated(coins, tokens)
        verdict = self.verifier.accept(tree, self.logits[which], sampling)
        return torch.stack([self.model.emitted(tree, verdict).double(), self.switch.current.weight], 1)

    def boxes(self, which: Tensor, tokens: Tensor, nodes: list[int]) -> Tensor:
        """Mass of every emitted prefix given each tree, f64 [A, H]. which [M], tokens [M, draws]; nodes have coins."""
        found = torch.zeros(len(self.tree.tokens), self.model.num_prefixes(), dtype=torch.float64)
        num, probe = len(nodes), torch.Generator().manual_seed(0)
        corners = torch.tensor(list(itertools.product([0, 1], repeat=num)), dtype=torch.bool).view(2**num, num)
        edges = [(c, c | bit, k) for k, bit in enumerate(2 ** (num - 1 - k) for k in range(num)) for c in range(2**num)]
        near, far, axis = torch.tensor([e for e in edges if e[0] != e[1]], dtype=torch.int64).view(-1, 3).T
        low, high = torch.zeros(len(which), num, dtype=torch.int64), torch.full((len(which), num), GRID)

        def at(points: Tensor, which: Tensor, tokens: Tensor) -> Tensor:
            coins = torch.full((len(points), self.tree.tokens.shape[1]), 0.5)
            coins[:, nodes] = ((points.double() + 0.5) / GRID).float()
            return self.run(which, coins, tokens)

        while True:
            points = torch.where(corners, high[:, None] - 1, low[:, None])
            inside = low + ((high - low) * torch.rand(low.shape, generator=probe)).long()
            points = torch.cat([points, inside[:, None]], 1)
            spread = points.shape[1]
            seen = at(points.flatten(0, 1), which.repeat_interleave(spread), tokens.repeat_interleave(spread, 0))
            seen = seen.view(len(which), spread, 2)
            differs = ((seen[:, near] - seen[:, far]).abs() > SAME).any(-1)
            cut = differs.any(1)
            if ((seen[:, -1] - seen[:, 0]).abs() > SAME).any(-1)[~cut].any():
                raise NotEnumerableError("judges a node by something else than one coin against one threshold")
            volume = ((high - low).double() / GRID).prod(1) * seen[:, 0, 1]
            found.index_put_((which[~cut], seen[~cut, 0, 0].long()), volume[~cut], accumulate=True)

            if not cut.any():
                return found
            which, tokens, low, high, seen, points = (x[cut] for x in (which, tokens, low, high, seen, points))
            edge = differs[cut].int().argmax(1)
            k, start = axis[edge][:, None], near[edge]
            point, here = points[torch.arange(len(which)), start], seen[torch.arange(len(which)), start]
            left, right = low.gather(1, k), high.gather(1, k) - 1
            for _ in range(GRID.bit_length()):
                middle = (left + right) // 2
                same = ((at(point.scatter(1, k, middle), which, tokens) - here).abs() <= SAME).all(-1, keepdim=True)
                left, right = torch.where(same, middle, left), torch.where(same, right, middle)
                right = torch.maximum(right, left + 1)
            low, high = torch.cat([low, low.scatter(1, k, right)]), torch.cat([high.scatter(1, k, right), high])
            which, tokens = torch.cat([which, which]), torch.cat([tokens, tokens])


def draft_weights(tree: DraftTree, topology: Topology, distinct: bool) -> Tensor:
    """Probability of drawing each tree's tokens. f64 [A]."""
    assert tree.probs is not None
    weight = torch.ones(len(tree.tokens), dtype=torch.float64)
    used = torch.zeros_like(tree.probs, dtype=torch.bool)
    for i, parent in enumerate(topology[1:], 1):
        token = tree.tokens[:, i : i + 1]
        weight *= sibling_law(tree.probs[:, parent].double(), used[:, parent]).gather(1, token).squeeze(1)
        if distinct:
            used[:, parent] = used[:, parent].scatter(1, token, True)
    return weight


def enumerate_law(
    verifier: Verifier, model: PrefixModel, topology: Topology, sampling: Sampling, law: str
) -> tuple[Tensor, float]:
    """Exact law of the first `model.length` tokens, completed by the target, and exact acceptance length.

    law: how drafts come about. "any": each tree on its own, deterministic -> f64 [A, V^L]; "iid" / "distinct": drawn
    -> f64 [1, V^L]. sampling has one row. Raises NotEnumerableError for noise that cannot be dictated.
    """
    vocab = model.vocab
    drafts = torch.tensor(list(itertools.product(range(vocab), repeat=len(topology) - 1)))
    tokens = torch.cat([torch.zeros(len(drafts), 1, dtype=torch.int64), drafts], 1)
    tree, logits = model.judged(tokens, topology, sampling, drawn=law != "any")
    weight = torch.full((len(tokens),), 1 / len(tokens), dtype=torch.float64)
    if tree.probs is not None:
        weight = draft_weights(tree, topology, law == "distinct")
    with dictated_noise() as switch:
        judge = _Judge(verifier, model, tree, logits, sampling, switch)
        judge.run(torch.zeros(1, dtype=torch.int64), torch.full((1, len(topology)), 0.5), torch.zeros(1, 32).long())
        draws, nodes = switch.current.draws, sorted(switch.current.coined)
        if not draws and not nodes and sampling.mode != "greedy":
            raise NotEnumerableError("draws no noise from specdec.sampling in a sampled row")
        dictated = torch.tensor(list(itertools.product(range(vocab), repeat=draws))).view(vocab**draws, draws).long()
        which = weight.nonzero().squeeze(1)
        found = judge.boxes(which.repeat_interleave(len(dictated)), dictated.repeat(len(which), 1), nodes)
    levels = torch.cat([torch.full((vocab**n,), float(n)) for n in range(model.length + 1)]).double()
    length = float((weight @ found) @ levels)
    if tree.probs is not None:
        found = (weight @ found)[None]
    return model.complete(found, model.law(model.target_logits, sampling)), length
