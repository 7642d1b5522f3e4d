"""The compiled small operations agree with their torch forms to the bit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels import steps


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(1, 700), st.integers(0, 10**6), st.integers(1, 40))
def test_argmax(rows: int, size: int, seed: int, levels: int) -> None:
    logits = torch.randint(-levels, levels, (1, rows, size), generator=rng(seed)).float()  # few values: many ties
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(steps.argmax(logits), first)
    assert torch.equal(steps.argmax_reference(logits), first)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 8), st.integers(1, 5), st.integers(1, 5), st.integers(2, 5), st.integers(0, 10**6)
)
def test_lookup(rows: int, drafts: int, longest: int, shortest: int, vocab: int, seed: int) -> None:
    draw = rng(seed)
    tokens = torch.randint(0, vocab, (rows, 40), generator=draw)
    lengths = torch.randint(1, 30, (rows,), generator=draw, dtype=torch.int32)
    args = (tokens, lengths, drafts, max(longest, shortest), min(longest, shortest), 1.5)
    for compiled, reference in zip(steps.lookup(*args), steps.lookup_reference(*args), strict=True):
        assert torch.equal(compiled, reference)


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 6), st.integers(0, 10**6))
def test_entries(rows: int, count: int, first: int, seed: int) -> None:
    """The tokens behind the new ones, one after another, and of those behind the end the last; rows without any, too."""
    draw = rng(seed)
    tokens = torch.randint(0, 99, (rows, 40), generator=draw)
    lengths = torch.randint(1, 40, (rows,), generator=draw, dtype=torch.int32)
    num_new = (torch.rand(rows, generator=draw) * lengths).int()
    args = (tokens, lengths, num_new, first, count)
    following, positions, begin, place = found = steps.entries(*args)
    for compiled, reference in zip(found, steps.entries_reference(*args), strict=True):
        assert torch.equal(compiled, reference)
        assert compiled.dtype == reference.dtype
    for row in range(rows):
        length, new = int(lengths[row]), int(num_new[row])
        start = min(length - 1 - new + first, length - 1)
        assert begin[row] == start
        assert positions[row].tolist() == list(range(start, start + count))
        assert following[row].tolist() == [int(tokens[row, min(start + i + 1, length - 1)]) for i in range(count)]
        if first < new <= first + count:
            assert positions[row, place[row]] == length - 2


def random_tree(draw: torch.Generator, rows: int, nodes: int) -> tuple[torch.Tensor, ...]:
    parents = torch.full((rows, nodes), -1, dtype=torch.int32)
    for i in range(1, nodes):
        parents[:, i] = torch.randint(0, i, (rows,), generator=draw)
    tokens = torch.randint(0, 3, (rows, nodes), generator=draw)
    return tokens, parents, torch.randint(1, nodes + 1, (rows,), generator=draw, dtype=torch.int32)


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 10**6))
def test_follow(rows: int, nodes: int, seed: int) -> None:
    draw = rng(seed)
    tokens, parents, num_nodes = random_tree(draw, rows, nodes)
    chosen = torch.randint(0, 3, (rows, nodes), generator=draw)
    args = (tokens, parents, num_nodes, chosen, nodes - 1)
    for compiled, reference in zip(steps.follow(*args), steps.follow_reference(*args), strict=True):
        assert torch.equal(compiled, reference)
        assert compiled.dtype == reference.dtype


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 10**6))
def test_advance(rows: int, nodes: int, num_stops: int, seed: int) -> None:
    draw = rng(seed)
    tokens, parents, num_nodes = random_tree(draw, rows, nodes)
    chosen = torch.randint(0, 3, (rows, nodes), generator=draw)
    path, accepted, following = steps.follow_reference(tokens, parents, num_nodes, chosen, nodes - 1)
    running = torch.rand(rows, generator=draw) < 0.8
    accepted = torch.where(running, accepted, -1)
    lengths = torch.randint(1, 20, (rows,), generator=draw, dtype=torch.int32)
    limits = lengths + torch.randint(1, 6, (rows,), generator=draw, dtype=torch.int32)
    stop_ids = torch.randperm(3, generator=draw)[:num_stops]
    results = []
    for function in (steps.advance, steps.advance_reference):
        buffer = torch.zeros(rows, 40, dtype=torch.int64)
        args = (tokens, parents, num_nodes, path, accepted, following, buffer, lengths, limits, running, stop_ids)
        results.append([*function(*args), buffer])
    for row in range(rows):
        used = slice(None) if running[row] else slice(0, 0)  # of a row that does not run only the lengths count
        for compiled, reference in zip(*results, strict=True):
            assert compiled.dtype == reference.dtype
            assert torch.equal(compiled[row : row + 1][used], reference[row : row + 1][used])
    assert torch.equal(results[0][0], results[1][0])
    assert not results[0][2][~running].any()
