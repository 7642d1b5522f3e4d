"""Dynamic trees against a search that does what the paper says, one node at a time.

V vocabulary, K nodes run a level, D depth. The draft model is a table: what follows a token depends on it and the one before.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.structure.dynamic import Dynamic
from specdec.types import DraftTree, ModelInputs, Sampling

VOCABULARY = 7
Path = tuple[int, ...]


class Table:
    """A model with a cache of tokens: logits [B, n, V] of a node from its token and its parent's, read along its path."""

    def __init__(self, seed: int, batch: int) -> None:
        self.logits = 2 * torch.randn(
            batch, VOCABULARY, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)
        )
        self.cache = torch.full((batch, 64), -1)

    def __call__(self, inputs: ModelInputs, hidden: Tensor | None) -> tuple[Tensor, None]:
        batch, count = inputs.tokens.shape
        slots = inputs.prefix_lens[:, None] + inputs.offset + torch.arange(count)
        self.cache.scatter_(1, slots.long(), inputs.tokens)
        result = torch.empty(batch, count, VOCABULARY)
        for b in range(batch):
            for i in range(count):
                path = [0] if inputs.paths is None else inputs.paths[b, i].tolist()
                assert inputs.positions[b, i] == inputs.prefix_lens[b] + len(path) - 1
                seen = [int(self.cache[b, int(inputs.prefix_lens[b]) + slot]) for slot in path]
                assert seen[-1] == inputs.tokens[b, i]
                result[b, i] = self.of(b, seen)
        return result, None

    def of(self, row: int, seen: list[int]) -> Tensor:
        """What follows tokens, the root first; of the root as if a 0 stood before it."""
        return self.logits[row, ([0, *seen])[-2], seen[-1]]


def searched(table: Table, row: int, root: int, shape: Dynamic) -> set[Path]:
    """EAGLE-2, section 4: expand the best K of a level, then keep the best of all."""
    level: list[tuple[float, Path]] = [(0.0, ())]
    found: list[tuple[float, Path]] = []
    for _ in range(shape.depth):
        children = []
        for value, path in level:
            law = table.of(row, [root, *path]).log_softmax(-1)
            best = law.topk(shape.top_k).indices.tolist()
            children += [(value + float(law[token]), (*path, token)) for token in best]
        found += children
        level = sorted(children, reverse=True)[: shape.top_k]
    return {path for _, path in sorted(found, reverse=True)[: shape.num_draft_tokens]}


def paths_of(tree: DraftTree, row: int) -> list[Path]:
    """The tokens from the root's child to every node but the root."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    found: list[Path] = [()]
    for i in range(1, len(tokens)):
        assert parents[i] < i
        found.append((*found[parents[i]], tokens[i]))
    return found[1:]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6), st.data())
def test_the_tree_is_the_one_a_search_finds(top_k: int, depth: int, seed: int, data: st.DataObject) -> None:
    most = top_k + (depth - 1) * top_k**2
    shape = Dynamic(data.draw(st.integers(depth, most)), top_k, depth)
    table, root = Table(seed, 2), torch.tensor([3, 5])
    zero = torch.zeros(2)
    sampling = Sampling(zero, zero.int(), zero + 1, zero.long(), zero.int())
    tree = shape.draft(table, root, torch.tensor([4, 9], dtype=torch.int32), sampling, "any")
    assert tree.tokens[:, 0].equal(root)
    for row in range(2):
        found = paths_of(tree, row)
        assert len(set(found)) == shape.num_draft_tokens
        assert set(found) == searched(table, row, int(root[row]), shape)
    assert int((tree.paths() >= 0).sum(-1).max()) - 1 <= shape.depth


def test_a_sure_model_gives_a_chain_and_an_unsure_one_a_bush() -> None:
    zero = torch.zeros(1)
    sampling = Sampling(zero, zero.int(), zero + 1, zero.long(), zero.int())
    shape, root, prefix = Dynamic(4, top_k=4, depth=4), torch.tensor([1]), torch.zeros(1, dtype=torch.int32)
    table = Table(0, 1)
    table.logits = torch.zeros_like(table.logits)
    depths = shape.draft(table, root, prefix, sampling, "any").node_depths()[0].tolist()
    assert depths == [0, 1, 1, 1, 1]
    table.logits[..., 2] = 50.0  # parents and children tie at probability 1
    depths = shape.draft(table, root, prefix, sampling, "any").node_depths()[0].tolist()
    assert depths == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("sizes", [(0, 1, 1), (3, 0, 2), (3, 2, 0), (2, 2, 3), (7, 2, 2)])
def test_sizes_that_make_no_tree(sizes: Path) -> None:
    with pytest.raises(ValueError, match="has no sense"):
        Dynamic(*sizes)
