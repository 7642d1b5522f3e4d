"""The GPU's step operations equal their torch forms: on the CPU through Triton's interpreter, on a GPU as compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from _cross_compile import Job, compile_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec import sampling as torch_sampling
from specdec.kernels import steps
from specdec.kernels.gpu import sampling as gpu_sampling
from specdec.kernels.gpu import steps as gpu_steps
from specdec.kernels.gpu.sampling import gumbel, hash_bits, uniform
from specdec.types import Sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 10**6)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(found: Any, expected: Any) -> None:
    """Same types, same bits."""
    assert len(found) == len(expected)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == reference.dtype
        assert ours.shape == reference.shape
        assert torch.equal(ours.cpu(), reference.cpu())


def on(*values: Any) -> list[Any]:
    """Tensors where the kernels run; the rest as it is."""
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in values]


# ---- argmax ----------------------------------------------------------------------------------------------------------


@FEW
@given(st.integers(1, 5), st.integers(1, 700), SEEDS, st.integers(1, 40))
def test_argmax(rows: int, size: int, seed: int, levels: int) -> None:
    logits = torch.randint(-levels, levels, (1, rows, size), generator=rng(seed)).float()  # few values: many ties
    logits *= torch.randint(0, 2, logits.shape, generator=rng(seed + 1)) * 2 - 1  # 0 and -0
    check([gpu_steps.argmax(*on(logits))], [steps.argmax_reference(logits)])


@pytest.mark.parametrize("size", [8191, 8192, 8193, 49152, 202048])
def test_argmax_over_parts(size: int) -> None:
    """The best stands at a border, twice, in a row that is otherwise excluded; or nowhere."""
    places = [0, 8191, 8192, 49151, size - 1]
    logits = torch.full((len(places) + 1, size), -torch.inf)
    for row, place in enumerate(places):
        logits[row, min(place, size - 1) :: 5000] = -3.0
    check([gpu_steps.argmax(*on(logits))], [steps.argmax_reference(logits)])


# ---- lookup ----------------------------------------------------------------------------------------------------------


@FEW
@given(
    st.integers(1, 3), st.integers(1, 8), st.integers(1, 5), st.integers(1, 5), st.integers(2, 5), SEEDS,
    st.sampled_from([0.4, 1.5, 3.0]), st.sampled_from([30, 40, 64]),
)  # fmt: skip
def test_lookup(
    rows: int, drafts: int, longest: int, shortest: int, vocab: int, seed: int, factor: float, size: int
) -> None:
    tokens = torch.randint(0, vocab, (rows, size), generator=rng(seed))
    lengths = torch.randint(1, 31, (rows,), generator=rng(seed + 1), dtype=torch.int32)
    args = (tokens, lengths, drafts, max(longest, shortest), min(longest, shortest), factor)
    check(gpu_steps.lookup(*on(*args)), steps.lookup_reference(*args))


@pytest.mark.parametrize("vocab", [7, 400, 10**12])
def test_lookup_in_long_rows(vocab: int) -> None:
    """Matches in any block, of equals the latest; rows shorter than a block and as long as the buffer."""
    tokens = torch.randint(0, vocab, (5, 5001), generator=rng(vocab))
    lengths = torch.tensor([5001, 4097, 4096, 2049, 3], dtype=torch.int32)
    tokens[0, 2040:2050] = tokens[0, -10:]  # across a border
    tokens[1, 100:110] = tokens[1, 4087:4097]
    args = (tokens[:, :5001], lengths, 6, 5, 1, 3.0)
    check(gpu_steps.lookup(*on(*args)), steps.lookup_reference(*args))


@FEW
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 6), SEEDS)
def test_entries(rows: int, count: int, first: int, seed: int) -> None:
    draw = rng(seed)
    tokens = torch.randint(0, 99, (rows, 40), generator=draw)
    lengths = torch.randint(1, 40, (rows,), generator=draw, dtype=torch.int32)
    args = (tokens, lengths, (torch.rand(rows, generator=draw) * lengths).int(), first, count)
    check(gpu_steps.entries(*on(*args)), steps.entries_reference(*args))


# ---- trees -----------------------------------------------------------------------------------------------------------


def random_tree(draw: torch.Generator, rows: int, nodes: int, chain: bool) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, parents, num_nodes; rows of a wider buffer, and a chain's parents are one row for all."""
    parents = torch.full((rows, nodes + 3), -1, dtype=torch.int32)
    for i in range(1, nodes):
        parents[:, i] = torch.randint(0, i, (rows,), generator=draw)
    if chain:
        parents = torch.arange(-1, nodes - 1, dtype=torch.int32).expand(rows, nodes)
    tokens = torch.randint(0, 3, (rows, nodes + 2), generator=draw)
    num_nodes = torch.randint(1, nodes + 1, (rows,), generator=draw, dtype=torch.int32)
    return tokens[:, :nodes], parents[:, :nodes], num_nodes


@FEW
@given(st.integers(1, 3), st.one_of(st.integers(1, 9), st.just(128)), st.booleans(), SEEDS)
def test_follow(rows: int, nodes: int, chain: bool, seed: int) -> None:
    draw = rng(seed)
    tree = random_tree(draw, rows, nodes, chain)
    chosen = torch.randint(0, 3, (rows, nodes), generator=draw)
    if chain and seed % 2:
        chosen[:, :-1] = tree[0][:, 1:]  # everything is accepted
    depth = min(nodes - 1, 6) if nodes > 9 and not chain else nodes - 1
    args = (*tree, chosen, depth)
    check(gpu_steps.follow(*on(*args)), steps.follow_reference(*args))


@FEW
@given(st.integers(1, 3), st.one_of(st.integers(1, 9), st.just(100)), st.booleans(), st.integers(0, 3), SEEDS)
def test_advance(rows: int, nodes: int, chain: bool, num_stops: int, seed: int) -> None:
    draw = rng(seed)
    tree = random_tree(draw, rows, nodes, chain)
    chosen = torch.randint(0, 3, (rows, nodes), generator=draw)
    path, accepted, following = steps.follow_reference(*tree, chosen, nodes - 1)
    running = torch.rand(rows, generator=draw) < 0.8
    accepted = torch.where(running, accepted, -1)
    lengths = torch.randint(1, 20, (rows,), generator=draw, dtype=torch.int32)
    limits = lengths + torch.randint(1, 6, (rows,), generator=draw, dtype=torch.int32)
    stop_ids = torch.randperm(3, generator=draw)[:num_stops]
    results = []
    for function in (gpu_steps.advance, steps.advance_reference):
        buffer = torch.zeros(rows, 20 + nodes, dtype=torch.int64)
        args = on(*tree, path, accepted, following, buffer, lengths.clone(), limits, running.clone(), stop_ids)
        results.append([*function(*args), args[6]])
    check(*results)


# ---- sampling --------------------------------------------------------------------------------------------------------


@triton.jit
def noise_kernel(seed, position, index, out, stream_number: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, size)
    seeds, places = tl.load(seed + lane), tl.load(position + lane)
    noise = uniform(hash_bits(seeds, places, tl.load(index + lane), stream_number))
    tl.store(out + lane, noise)
    tl.store(out + size + lane, gumbel(noise))


@FEW
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31 - 1), st.sampled_from(range(4)), st.integers(0, 10**6))
def test_noise_is_the_torch_forms(seed: int, position: int, stream: int, first: int) -> None:
    """Uniform noise to the bit, Gumbel noise up to the device's logarithms."""
    size = 64
    seeds = torch.full((size,), seed) ^ torch.arange(size)
    places = torch.full((size,), position, dtype=torch.int32)
    index = torch.arange(first, first + size, dtype=torch.int32)
    out = torch.empty(2, size, device=DEVICE)
    noise_kernel[(1,)](*on(seeds, places, index), out, stream_number=stream, size=size)
    defined = torch_sampling.uniform(seeds, places, stream, index)
    assert torch.equal(out[0].cpu(), defined)
    torch.testing.assert_close(out[1].cpu(), -torch.log(-torch.log1p(-defined)), rtol=2e-6, atol=2e-6)


@triton.jit
def gumbel_kernel(u, out, size: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, size)
    tl.store(out + lane, gumbel(tl.load(u + lane)))


def test_gumbel_noise_is_exact_where_it_is_large() -> None:
    """Over the whole range of u, from 2^-33 to 1 - 2^-24, against float64."""
    small = 2.0 ** -torch.linspace(1, 33, 448)
    u = torch.cat([small, 1 - 2.0 ** -torch.linspace(1, 24, 64)])
    out = torch.empty_like(u, device=DEVICE)
    gumbel_kernel[(1,)](*on(u), out, size=512)
    torch.testing.assert_close(out.cpu().double(), -(-torch.log1p(-u.double())).log(), rtol=1e-6, atol=1e-6)


def settings_of(rows: int, seed: int) -> Sampling:
    draw = rng(seed)
    temperature = torch.tensor([0.0, 0.3, 1.0, 1.7])[torch.randint(0, 4, (rows,), generator=draw)]
    zeros = torch.zeros(rows, dtype=torch.int32)
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=draw)
    return Sampling(temperature, zeros, zeros + 1.0, seeds, zeros, "sampled")


@FEW
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 7, 300, 2048, 5000]), SEEDS, st.sampled_from([0, 3]))
def test_choose(rows: int, nodes: int, vocab: int, seed: int, stream: int) -> None:
    """The torch form's token, or one whose score equals its score up to the last bits."""
    law = settings_of(rows, seed)
    logits = 3 * torch.randn(rows, nodes, vocab, generator=rng(seed))
    logits[..., ::3] = -torch.inf
    logits[..., 0] = 0.0
    position = torch.randint(0, 10**6, (rows, 1), generator=rng(seed), dtype=torch.int32).expand(rows, nodes)
    found = gpu_sampling.choose(*on(logits, law.temperature, law.seed, position, stream)).cpu()
    expected = torch_sampling.choose(logits, law, position, stream)
    assert found.dtype == torch.int64
    greedy = law.temperature == 0
    assert torch.equal(found[greedy], expected[greedy])
    noise = torch_sampling.gumbel(law.seed[:, None], position, stream, vocab)
    score = torch_sampling.warp(logits, law) + noise
    best = score.gather(-1, expected[..., None])
    torch.testing.assert_close(score.gather(-1, found[..., None]), best, rtol=1e-6, atol=1e-5)


# ---- on the GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [49152, 202048])
def test_one_graph_holds_every_operation(vocab: int) -> None:
    """Dispatched, captured and replayed with other values: what the torch forms give."""
    draw = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(3, 8, vocab, device="cuda", generator=draw)
    law = settings_of(3, 5)
    law = replace(law, temperature=law.temperature.cuda(), seed=law.seed.cuda())
    position = torch.arange(24, dtype=torch.int32, device="cuda").view(3, 8)
    tokens = torch.randint(0, 9, (3, 2000), device="cuda", generator=draw)
    lengths = torch.tensor([2000, 700, 5], dtype=torch.int32, device="cuda")

    def step() -> tuple[Tensor, ...]:
        nodes, count = steps.lookup(tokens, lengths, 7, 3, 1, 3.0)
        parents = torch.arange(-1, 7, dtype=torch.int32, device="cuda").expand(3, 8)
        picked = torch_sampling.choose(logits, law, position)
        return steps.argmax(logits), picked, *steps.follow(nodes, parents, count, nodes.roll(-1, 1), 7)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    logits.copy_(torch.randn(logits.shape, device="cuda", generator=draw))
    tokens.copy_(tokens.roll(3, 1))
    graph.replay()
    again = step()
    check(captured, again)
    assert torch.equal(captured[0], logits.argmax(-1))


# ---- compiled for GPUs that are not here -----------------------------------------------------------------------------

STEPS, SAMPLING = "specdec.kernels.gpu.steps", "specdec.kernels.gpu.sampling"
KINDS = {
    "logits": "*fp32", "temperature": "*fp32", "factor": "fp32",
    "num_nodes": "*i32", "parents": "*i32", "path": "*i32", "accepted": "*i32", "lengths": "*i32", "limits": "*i32",
    "counts": "*i32", "position": "*i32", "running": "*i1",
    **dict.fromkeys(("num_new", "positions", "begins"), "*i32"), "first": "i32", "count": "i32",
    **dict.fromkeys(("vocab", "parts", "stride", "node_stride", "parent_stride", "chosen_stride", "token_stride"), "i32"),
    **dict.fromkeys(("size", "num_stops", "row_stride", "nodes_per_row"), "i32"),
}  # fmt: skip
TREE = {"NODES": 64, "COLUMNS": 8}
SHAPES: list[tuple[str, str, str, dict[str, Any], int]] = [  # module, kernel, arguments, constants, warps
    (STEPS, "argmax_kernel", "logits out vocab", {"BLOCK": 8192, "FINAL": True}, 8),
    (STEPS, "argmax_kernel", "logits out vocab", {"BLOCK": 8192, "FINAL": False}, 8),
    (STEPS, "combine_kernel", "keys out parts", {"PARTS": 32}, 1),
    (STEPS, "lookup_kernel", "tokens stride lengths out counts factor",
     {"DRAFTS": 8, "MAX_NGRAM": 3, "MIN_NGRAM": 1, "BLOCK": 2048, "COLUMNS": 16}, 8),
    (STEPS, "entries_kernel", "tokens stride lengths num_new following positions begins places first count", {"BLOCK": 4}, 1),
    (STEPS, "follow_kernel",
     "nodes node_stride parents parent_stride num_nodes chosen chosen_stride path accepted following",
     {"DEPTH": 7, **TREE}, 1),
    (STEPS, "advance_kernel",
     "nodes node_stride parents parent_stride num_nodes path accepted next_token tokens token_stride size lengths limits "
     "running stop_ids num_stops counts record", {"E": 8, "LEVELS": 6, "STOPS": 2, **TREE}, 1),
    (SAMPLING, "choose_kernel", "logits temperature seed position row_stride node_stride keys vocab nodes_per_row",
     {"STREAM": 0, "BLOCK": 2048}, 4),
]  # fmt: skip


def jobs() -> list[Job]:
    """Every kernel as the GPUs of two generations would get it; what KINDS does not name points to int64."""
    return [
        Job(module, kernel, {name: KINDS.get(name, "*i64") for name in arguments.split()}, constants, arch,
            {"num_warps": warps}, ["vocab"])
        for module, kernel, arguments, constants, warps in SHAPES
        for arch in (90, 100)
    ]  # fmt: skip


def test_kernels_compile_for_hopper_and_blackwell() -> None:
    """Within the registers of their warps, nothing spilled, and the logits are read four at a time."""
    for job, found in zip(jobs(), compile_kernels(jobs()), strict=True):
        assert f".target sm_{job.arch}" in found.ptx
        assert found.spills == 0, job
        assert 0 < found.registers <= 65536 // (32 * job.options["num_warps"]), job
        if "logits" in job.signature:
            assert "v4.b32" in found.ptx, job
