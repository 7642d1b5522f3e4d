"""Trees as tensors agree with trees as Python lists: paths, depths, masks, chains, trimming."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from specdec.decoding import SamplingParams
from specdec.types import DraftInputs, DraftTree, ascending, repeated


def walk(parents: list[int], node: int) -> list[int]:
    """Nodes from the root to `node`, one step at a time."""
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@st.composite
def trees(draw: Any, max_nodes: int = 10) -> DraftTree:
    """A batch of trees of one size that are no chains: the last node hangs on the root."""
    batch, nodes = draw(st.integers(1, 3)), draw(st.integers(3, max_nodes))
    parents = [[-1, *(draw(st.integers(0, i - 1)) for i in range(1, nodes - 1)), 0] for _ in range(batch)]
    depth = max(len(walk(row, i)) - 1 for row in parents for i in range(nodes))
    num_nodes = [draw(st.integers(1, nodes)) for _ in range(batch)]
    tokens = torch.arange(batch * nodes).view(batch, nodes)
    probs = torch.arange(batch * nodes * 2.0).view(batch, nodes, 2) if draw(st.booleans()) else None
    return DraftTree(tokens, torch.tensor(parents).int(), torch.tensor(num_nodes).int(), depth, probs)


@st.composite
def chains(draw: Any) -> DraftTree:
    """A batch of chains of one width and any lengths."""
    batch, k = draw(st.integers(1, 3)), draw(st.integers(0, 7))
    num_drafts = torch.tensor([draw(st.integers(0, k)) for _ in range(batch)])
    drafts = torch.arange(batch * k).view(batch, k)
    return DraftTree.chain(torch.full((batch,), 99), drafts, num_drafts, torch.rand(batch, k, 3) if k else None)


def padded(path: list[int], width: int) -> list[int]:
    return path + [-1] * (width - len(path))


@given(tree=trees() | chains())
def test_paths_and_depths(tree: DraftTree) -> None:
    paths, depths = tree.paths(), tree.node_depths()
    assert paths.dtype == depths.dtype == torch.int32
    for row, parents in enumerate(tree.parents.tolist()):
        expected = [walk(parents, node) for node in range(len(parents))]
        assert paths[row].tolist() == [padded(path, tree.depth + 1) for path in expected]
        assert depths[row].tolist() == [len(path) - 1 for path in expected]
    assert tree.paths() is paths  # made once


@given(tree=trees())
def test_paths_are_the_attention_mask(tree: DraftTree) -> None:
    """A node sees its ancestors and itself: the powers of the parent matrix, added up."""
    batch, nodes = tree.tokens.shape
    hangs = torch.zeros(batch, nodes, nodes)
    hangs.scatter_(2, tree.parents.clamp(min=0).long()[..., None], 1.0)
    hangs[:, 0] = 0
    sees, power = torch.eye(nodes).expand(batch, -1, -1), torch.eye(nodes).expand(batch, -1, -1)
    for _ in range(nodes):
        power = power @ hangs
        sees = sees + power
    mask = torch.nn.functional.one_hot(tree.paths().long() + 1, nodes + 1).sum(2)[..., 1:]
    assert torch.equal(mask, sees.long())


@pytest.mark.parametrize("fault", ["missing ancestor", "a sibling"])
def test_a_wrong_path_would_be_seen(fault: str) -> None:
    """Control: the oracle of the tests above tells trees apart that differ in one parent."""
    parents = [-1, 0, 1, 1]
    wrong = [-1, 0, 0, 1] if fault == "missing ancestor" else [-1, 0, 1, 2]
    tree = DraftTree(torch.zeros(1, 4).long(), torch.tensor([wrong]).int(), torch.tensor([4]).int(), 3)
    assert tree.paths()[0].tolist() != [padded(walk(parents, i), 4) for i in range(4)]


@given(tree=chains())
def test_a_chain_hangs_each_node_on_the_one_before(tree: DraftTree) -> None:
    nodes = tree.tokens.shape[1]
    assert tree.is_chain
    assert tree.depth == nodes - 1
    assert (tree.tokens[:, 0] == 99).all()
    assert tree.parents.tolist() == [list(range(-1, nodes - 1))] * len(tree.tokens)
    assert tree.parents.dtype == tree.num_nodes.dtype == torch.int32
    assert ((tree.num_nodes >= 1) & (tree.num_nodes <= nodes)).all()


def test_a_chain_is_full_unless_told_and_its_last_law_is_never_read() -> None:
    root, drafts, probs = torch.tensor([1, 2]), torch.tensor([[3, 4], [5, 6]]), torch.rand(2, 2, 7)
    tree = DraftTree.chain(root, drafts, probs=probs)
    assert tree.tokens.tolist() == [[1, 3, 4], [2, 5, 6]]
    assert tree.num_nodes.tolist() == [3, 3]
    assert tree.probs is not None
    assert tree.probs.shape == (2, 3, 7)
    assert torch.equal(tree.probs[:, :2], probs)
    whole = torch.rand(2, 3, 7)
    assert DraftTree.chain(root, drafts, probs=whole).probs is whole
    assert DraftTree.chain(root, drafts, torch.tensor([0, 1])).num_nodes.tolist() == [1, 2]


@settings(max_examples=200)
@given(tree=trees() | chains(), data=st.data())
def test_trimming_loses_padding_only(tree: DraftTree, data: st.DataObject) -> None:
    nodes = tree.tokens.shape[1]
    widest = int(tree.num_nodes.max())
    width = data.draw(st.integers(widest, nodes))
    small = tree.trim(width)
    kept = small.tokens.shape[1]
    assert width <= kept <= nodes
    assert small.is_chain == (tree.is_chain or kept == 1)  # whether a tree branches is static: the runtime relies on it
    assert kept == width or not tree.is_chain
    assert torch.equal(small.tokens, tree.tokens[:, :kept])
    assert torch.equal(small.parents, tree.parents[:, :kept])
    assert torch.equal(small.num_nodes, tree.num_nodes)
    assert (tree.probs is None) == (small.probs is None)
    if tree.probs is not None and small.probs is not None:
        assert torch.equal(small.probs, tree.probs[:, :kept])
    assert small.node_depths().max() <= small.depth
    assert torch.equal(small.node_depths(), tree.node_depths()[:, :kept])
    shared = min(small.depth, tree.depth) + 1
    assert torch.equal(small.paths()[..., :shared], tree.paths()[:, :kept, :shared])
    assert (tree.paths()[:, :kept, shared:] == -1).all()
    assert tree.trim(nodes) is tree
    assert tree.trim(nodes + 3) is tree


def test_the_root_is_the_last_token() -> None:
    tokens = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]])
    sampling = SamplingParams().tensors(2, torch.device("cpu"))
    inputs = DraftInputs(tokens, torch.tensor([3, 1]).int(), torch.tensor([2, 0]).int(), 2, None, sampling)
    assert inputs.root.tolist() == [7, 8]


def test_constants_are_made_once_and_a_fake_one_is_not_kept() -> None:
    """Sizes that nothing else here asks for: what is first made under a fake mode has no values."""
    cpu = torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(ascending(-3, 37, cpu), FakeTensor)
        assert isinstance(repeated(7, 37, cpu), FakeTensor)
    assert ascending(-3, 37, cpu).tolist() == list(range(-3, 34))
    assert repeated(7, 37, cpu).tolist() == [7] * 37
    assert ascending(-3, 37, cpu) is ascending(-3, 37, cpu)
    assert ascending(-3, 37, cpu).dtype == repeated(7, 37, cpu).dtype == torch.int32
