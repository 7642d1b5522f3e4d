"""The compiled CPU attention against the torch reference, for chains and trees, and the bits it promises not to change.

Shapes: B rows, T tokens a row, H query heads, G KV heads, S slots, E head size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import PARENTS, error, randn
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.cpu import ops
from specdec.kernels.cpu.append import from_blocks, to_blocks
from specdec.kernels.reference import AttentionRule
from specdec.types import DraftTree, ModelInputs

DTYPES = [torch.float32, torch.bfloat16]
SLOTS = 64
HEADS = [(6, 2, 32), (4, 4, 64), (3, 1, 96)]
NEAR_ATTENTION = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def rotary(size: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(SLOTS + 10)[:, None] * 10_000.0 ** (-torch.arange(size // 2) / (size // 2))
    return angle.cos().contiguous(), angle.sin().contiguous()


def chain_inputs(prefixes: list[int], tokens: int, offset: int = 0) -> ModelInputs:
    prefix = torch.tensor(prefixes, dtype=torch.int32)
    positions = prefix[:, None] + offset + torch.arange(tokens, dtype=torch.int32)
    return ModelInputs(torch.zeros(positions.shape, dtype=torch.int64), positions.contiguous(), prefix, None, offset)


def tree_inputs(prefixes: list[int], first: int = 0) -> ModelInputs:
    """Nodes of PARENTS from `first` on; those before it are in the cache already."""
    batch = len(prefixes)
    parents = torch.tensor(PARENTS, dtype=torch.int32).expand(batch, -1)
    tree = DraftTree(torch.zeros(parents.shape, dtype=torch.int64), parents, torch.full((batch,), 8), 4)
    paths = tree.paths()[:, first:].contiguous()
    prefix = torch.tensor(prefixes, dtype=torch.int32)
    positions = (prefix[:, None] + (paths >= 0).sum(-1) - 1).int().contiguous()
    return ModelInputs(tree.tokens[:, first:], positions, prefix, paths, first)


class Case:
    """Random projections and a cache whose unwritten slots hold `garbage`."""

    def __init__(self, inputs: ModelInputs, shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> None:
        self.heads, groups, size = shape
        batch, tokens = inputs.tokens.shape
        self.inputs = inputs
        self.qkv = 2 * randn(batch * tokens, (self.heads + 2 * groups) * size, seed=seed)
        self.keys = randn(batch, groups, SLOTS, size, seed=seed + 1, dtype=dtype)
        self.values = randn(batch, groups, SLOTS, size, seed=seed + 2, dtype=dtype)
        self.angles = rotary(size)

    def run(self, module: Any, garbage: float = 7.0, rope: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Output and the cache it leaves behind, on copies."""
        keys, values = self.keys.clone(), self.values.clone()
        first = self.inputs.prefix_lens + self.inputs.offset
        empty = (torch.arange(SLOTS) >= first[:, None])[:, None, :, None]
        keys.masked_fill_(empty, garbage)
        values.masked_fill_(empty, garbage)
        if module is ops:
            keys = to_blocks(keys)
        result = module.attention(self.qkv.clone(), keys, values, self.inputs, *self.angles, AttentionRule(rope))
        return result, from_blocks(keys) if module is ops else keys, values


def check(case: Case, rope: bool = True) -> None:
    """The compiled kernel, with NaN in every slot nobody may see, against the reference."""
    dtype = case.keys.dtype
    result, keys, values = case.run(ops, torch.nan, rope)
    wanted, wanted_keys, wanted_values = case.run(reference, 7.0, rope)
    assert result.dtype == dtype
    assert error(result, wanted) < NEAR_ATTENTION[dtype]
    written = ~keys.isnan()
    assert torch.equal(written, ~values.isnan())
    assert error(keys[written], wanted_keys[written]) < NEAR_ATTENTION[dtype]
    assert torch.equal(values[written], wanted_values[written])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize(
    "inputs",
    [
        chain_inputs([0], 1),
        chain_inputs([0, 15, 16, 40], 1),
        chain_inputs([33, 0, 7], 20),
        chain_inputs([5, 30], 3, offset=2),
        tree_inputs([0, 17, 50]),
        tree_inputs([31, 4], first=3),
        tree_inputs([12], first=1),
    ],
    ids=["first", "decode", "chain", "chain-offset", "tree", "tree-offset", "level"],
)
def test_attention(inputs: ModelInputs, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(Case(inputs, shape, dtype))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 17), st.integers(0, 3), st.booleans())
def test_attention_on_any_chain(prefixes: list[int], tokens: int, offset: int, rope: bool) -> None:
    check(Case(chain_inputs(prefixes, tokens, offset), HEADS[0], torch.float32, seed=tokens), rope)


def test_attention_without_rope_differs() -> None:
    """Negative control for the switch."""
    case = Case(chain_inputs([9], 4), HEADS[0], torch.float32)
    check(case, rope=False)
    assert error(case.run(ops, rope=False)[0], case.run(ops)[0]) > 0.01


def test_the_check_sees_a_wrong_path() -> None:
    """Negative control: one node that hangs on its aunt."""
    case = Case(tree_inputs([20]), HEADS[0], torch.float32)
    right = case.run(ops)[0]
    assert case.inputs.paths is not None
    assert case.inputs.paths[0, 3, 1] == 1
    case.inputs.paths[0, 3, 1] = 2
    wrong = case.run(ops)[0]
    changed = (wrong != right).any(-1)
    assert changed.tolist() == [node == 3 for node in range(8)]
    assert error(wrong, right) > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 14, 16, 29])
def test_a_path_has_the_bits_of_a_chain(dtype: torch.dtype, prefix: int) -> None:
    """Nodes 0, 1, 3, 6, 7 of the tree, equal a chain of the same tokens, and its tokens one by one."""
    path = [0, 1, 3, 6, 7]
    tree = Case(tree_inputs([prefix]), HEADS[0], dtype)
    chain = Case(chain_inputs([prefix], 5), HEADS[0], dtype)
    chain.qkv, chain.keys, chain.values = tree.qkv[path].clone(), tree.keys, tree.values
    wanted, keys, values = chain.run(ops)
    assert torch.equal(tree.run(ops)[0][path], wanted)
    for i in range(5):
        single = Case(chain_inputs([prefix + i], 1), HEADS[0], dtype)
        single.qkv, single.keys, single.values = chain.qkv[i : i + 1].clone(), keys, values
        assert torch.equal(single.run(ops)[0], wanted[i : i + 1])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_bits_do_not_depend_on_threads_or_batch(dtype: torch.dtype) -> None:
    prefixes = [33, 0, 7]
    case = Case(tree_inputs(prefixes), HEADS[0], dtype)
    two = case.run(ops)
    torch.set_num_threads(1)
    one = case.run(ops)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for row, prefix in enumerate(prefixes):
        alone = Case(tree_inputs([prefix]), HEADS[0], dtype)
        alone.qkv, alone.keys, alone.values = (
            case.qkv[8 * row : 8 * row + 8], case.keys[row : row + 1], case.values[row : row + 1]
        )  # fmt: skip
        assert torch.equal(alone.run(ops)[0], one[0][8 * row : 8 * row + 8])
