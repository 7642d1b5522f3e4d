"""Verify equals decode, bit for bit: a token's logits do not depend on what shares its forward."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.decoding import SpeculativeDecoder
from specdec.drafter.none import NoDraft
from specdec.target.toy import Toy
from specdec.testing import Replay
from specdec.types import Acceptance, DraftTree
from specdec.verifier.target_only import TargetOnly

LENGTH = 40  # of the text whose logits are known


@cache
def toy(dtype: str) -> Toy:
    return Toy(dtype=dtype, num_heads=6, num_kv_heads=2, hidden_size=96)


@cache
def known(dtype: str) -> tuple[Tensor, Tensor]:
    """A text and its logits, one token a forward, alone in the batch: int64 [L], f32 [L, V]."""
    target = toy(dtype)
    text = torch.randint(0, 256, (LENGTH,), generator=torch.Generator().manual_seed(1))
    target.allocate(1, LENGTH, 1)
    logits = []
    for token in text:
        logits.append(target.verify(DraftTree.chain(token.view(1), torch.zeros(1, 0).long())).logits[0, 0])
        target.commit(Acceptance(torch.zeros(1, 1).int(), torch.zeros(1).int(), token.view(1)))
    return text, torch.stack(logits)


def random_tree(draw: torch.Generator, batch: int, nodes: int, row: int, spine: Tensor) -> tuple[DraftTree, Tensor]:
    """A random tree whose row `row` holds `spine` (root first) along some path. Also that path's nodes."""
    parents = torch.full((batch, nodes), -1, dtype=torch.int32)
    for i in range(1, nodes):
        parents[:, i] = torch.randint(0, max(1, i - 1), (batch,), generator=draw)  # never one chain of all nodes
    places = 1 + torch.randperm(nodes - 1, generator=draw)[: len(spine) - 1].sort().values
    path = torch.cat([torch.zeros(1).long(), places])
    tokens = torch.randint(0, 256, (batch, nodes), generator=draw)
    tokens[row, path] = spine
    parents[row, path[1:]] = path[:-1].int()
    depth = torch.zeros(batch, nodes, dtype=torch.int64)
    for i in range(1, nodes):
        depth[:, i] = depth.gather(1, parents[:, i : i + 1].long()).squeeze(1) + 1
    deepest = min(int(depth.max()), nodes - 2)  # N - 1 would say that every row is a chain
    tree = DraftTree(tokens, parents, torch.full((batch,), nodes, dtype=torch.int32), deepest)
    return tree, path


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["float32", "bfloat16"]),
    batch=st.integers(1, 5),
    nodes=st.integers(2, 12),
    row=st.integers(0, 4),
    prefix=st.integers(1, 25),
    chunk=st.integers(1, 40),
    chain=st.booleans(),
    seed=st.integers(0, 2**31),
    threads=st.integers(1, 3),
)
def test_logits_do_not_depend_on_company(
    dtype: str, batch: int, nodes: int, row: int, prefix: int, chunk: int, chain: bool, seed: int, threads: int
) -> None:
    text, logits = known(dtype)
    target, draw, row = toy(dtype), torch.Generator().manual_seed(seed), row % batch
    count = min(nodes, LENGTH - prefix - 1)
    others = torch.randint(1, 30, (batch,), generator=draw).int()
    others[row] = prefix
    prompts = torch.randint(0, 256, (batch, int(others.max())), generator=draw)
    prompts[row, :prefix] = text[:prefix]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        target.prefill_chunk = chunk
        target.allocate(batch, LENGTH + 40, nodes)
        first = target.prefill(prompts, others)
        spine = text[prefix : prefix + count]
        if chain or nodes < 4:
            drafts = torch.randint(0, 256, (batch, count), generator=draw)
            drafts[row] = spine
            tree, path = DraftTree.chain(drafts[:, 0], drafts[:, 1:]), torch.arange(count)
        else:
            tree, path = random_tree(draw, batch, nodes, row, spine[: max(1, count // 2)])
        output = target.verify(tree)
        depth = tree.depth + 1
        accepted = torch.zeros(batch, dtype=torch.int32)
        accepted[row] = len(path) - 1
        walked = torch.zeros(batch, depth, dtype=torch.int32)
        walked[row] = torch.cat([path, path[-1:].expand(depth - len(path))])
        target.commit(Acceptance(walked, accepted, torch.zeros(batch).long()))
        following = target.verify(DraftTree.chain(text[prefix + len(path)].expand(batch), torch.zeros(batch, 0).long()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first.logits[row, 0], logits[prefix - 1])
    assert torch.equal(output.logits[row, path], logits[prefix : prefix + len(path)])
    assert torch.equal(following.logits[row, 0], logits[prefix + len(path)])


@pytest.mark.parametrize("nodes", [1, 2, 7, 8, 9, 16, 17, 33, 64])
def test_every_width_up_to_64(nodes: int) -> None:
    text, logits = known("bfloat16")
    target = toy("bfloat16")
    target.allocate(1, 200, nodes)
    target.prefill(text[None, :10], torch.tensor([10]))
    chain = torch.cat([text[10:], torch.zeros(64).long()])[None, :nodes]
    output = target.verify(DraftTree.chain(chain[:, 0], chain[:, 1:]))
    shared = min(nodes, LENGTH - 10)
    assert torch.equal(output.logits[0, :shared], logits[10 : 10 + shared])


def test_the_torch_backend_does_not_promise_it() -> None:
    """Control: the property is the native kernels' doing; library products change bits with the number of tokens."""
    x = torch.randn(64, 576)
    weight = torch.randn(960, 576)
    whole = torch.nn.functional.linear(x, weight)
    alone = torch.cat([torch.nn.functional.linear(x[i : i + 1], weight) for i in range(64)])
    if torch.equal(whole, alone):
        pytest.skip("this machine's library happens to agree")
    assert torch.allclose(whole, alone, atol=1e-3)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speculative_text_is_plain_text(dtype: str, tree: bool) -> None:
    target = toy(dtype)
    prompts = [[1, 2, 3], list(range(60)), [9] * 17]
    plain = SpeculativeDecoder(target, NoDraft(), TargetOnly()).generate(prompts, 100, ignore_eos=True)
    references = [p + t for p, t in zip(prompts, plain.tokens, strict=True)]
    drafter = Replay(references, depth=5, tree=tree)
    drafted = SpeculativeDecoder(target, drafter, TargetOnly(), batch_size=2).generate(prompts, 100, ignore_eos=True)
    assert drafted.tokens == plain.tokens
    assert drafted.trace.acceptance_length > 1.5
