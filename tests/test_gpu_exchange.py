"""Ranks that add up through one another's memory. Without a GPU they are processes in the interpreter, with shared memory.

M tokens, K channels, P partial sums of a rank.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import interpreter
import pytest
import torch
from test_gpu_parallel import EPS, INNER, half, randn, weight
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.gpu.exchange import Mailbox
from specdec.kernels.gpu.parallel import ParallelOps

ROOM, BLOCK, CHANNELS = 4, 64, 2 * 64 + 16  # three programs a token, the last one nearly empty
TURNS = [(3, 2), (1, 1), (4, 3), (2, 1)]  # M and P of the exchanges of a run
MODES = [("normed", "static"), ("normed", "dynamic"), ("no", "dynamic"), ("raw", "no"), ("no", "no")]
WORLDS = (2, 3)
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes share memory as the interpreter sees it")


def stream(m: int, turn: int, channels: int = CHANNELS) -> Tensor:
    return randn(m, channels, seed=turn).to(CPU)


def partial(m: int, p: int, turn: int, rank: int, channels: int = CHANNELS) -> Tensor:
    return randn(p, m, channels, seed=1000 * turn + rank).to(CPU)


def exchange(mailbox: Mailbox, m: int, p: int, turn: int, mode: str, quantise: str) -> dict[str, Tensor]:
    """One exchange; everything it wrote."""
    x, norm = stream(m, turn), stream(1, 99)[0].abs()
    plain = torch.zeros(m, CHANNELS, dtype=torch.bfloat16)
    rounded, scale = torch.zeros(m, CHANNELS, dtype=reference.FP8), torch.zeros(m)
    squares, static = torch.zeros(m, -(-CHANNELS // BLOCK)), torch.tensor(0.02)
    mailbox.add_norm(
        x, partial(m, p, turn, mailbox.rank), norm, EPS, plain, squares, rounded, scale,
        static if quantise == "static" else scale, mode, quantise, {"PDL": False},
    )  # fmt: skip
    return {"x": x, "plain": plain, "rounded": rounded.float(), "scale": scale, "squares": squares}


def layers(mailbox: Mailbox) -> dict[str, Tensor]:
    """A product of split inputs, which stays pending, and the product behind the norm that adds it, on both ways of weights."""
    ops, results = ParallelOps(CPU, lambda x: pytest.fail("gathered"), mailbox), {}
    for kind in ("float32", "static"):
        down, head = weight(kind, CHANNELS, INNER), weight(kind, 24, CHANNELS, seed=1)
        out, x = stream(3, 7), randn(3, INNER, seed=4).to(reference.compute_dtype(down))
        ops.add_linear(
            out, x.chunk(2, -1)[mailbox.rank].contiguous(), half(down, mailbox.rank, -1), stream(1, 99)[0].abs()
        )
        results[kind] = ops.norm_linear(out, stream(1, 99)[0].abs(), EPS, head)
        ops.add_linear(out, x.chunk(2, -1)[mailbox.rank].contiguous(), half(down, mailbox.rank, -1))
        ops.flush(out)
        results[f"{kind} stream"] = out
    return results


def memory(rank: int, boxes: list[Tensor]) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A rank's box, and where everybody's lie in this process."""
    return lambda size: (boxes[rank][:size], torch.tensor([box.data_ptr() for box in boxes]))


def run(rank: int, boxes: dict[Any, list[Tensor]], queue: Any) -> None:
    """All exchanges of one rank, by (ranks, whether in halves, mode)."""
    interpreter.install()
    interpreter.side_by_side("exchange_norm_kernel")
    results: dict[Any, Any] = {}
    for (world, narrow), shared in boxes.items():
        if rank >= world:
            continue
        mailbox = Mailbox.open(rank, world, ROOM, CHANNELS, narrow, memory(rank, shared), BLOCK)
        for mode in MODES if world == 2 else MODES[:2]:
            results[world, narrow, *mode] = [exchange(mailbox, *turn, i, *mode) for i, turn in enumerate(TURNS)]
        if (world, narrow) == (2, True):
            results["layers"] = layers(mailbox)
        assert not mailbox.absent.any()
        assert not mailbox.lost.any()
    queue.put((rank, {key: _plain(value) for key, value in results.items()}))


def _plain(value: Any) -> Any:
    """Arrays: tensors would travel through files that end with their process."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return {name: tensor.float().numpy() for name, tensor in value.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    """What each of three processes found."""
    context = multiprocessing.get_context("spawn")
    size = 2 * max(WORLDS) * ROOM * CHANNELS
    boxes = {
        (world, narrow): [torch.zeros(size, dtype=torch.int64).share_memory_() for _ in range(world)]
        for world in WORLDS
        for narrow in (False, True)
    }
    queue = context.Queue()
    processes = [context.Process(target=run, args=(rank, boxes, queue), daemon=True) for rank in range(max(WORLDS))]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(max(WORLDS))]


def wanted(m: int, p: int, turn: int, world: int, narrow: bool) -> Tensor:
    """The stream with everybody's parts."""
    sums = [partial(m, p, turn, rank).sum(0) for rank in range(world)]
    return stream(m, turn) + sum((s.bfloat16().float() if narrow else s) for s in sums)


@pytest.mark.parametrize("narrow", [False, True], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("world", "mode", "quantise"), [*((2, *mode) for mode in MODES), *((3, *mode) for mode in MODES[:2])]
)
def test_what_every_rank_gets(ranks: list[dict[Any, Any]], mode: str, quantise: str, world: int, narrow: bool) -> None:
    """The sum, and of it what the norm alone would give; the same bits on all ranks, turn by turn."""
    norm = stream(1, 99)[0].abs()
    for turn, (m, p) in enumerate(TURNS):
        first, *others = (found[world, narrow, mode, quantise][turn] for found in ranks[:world])
        for other in others:
            assert all((first[name] == other[name]).all() for name in first), (turn, m)
        x = torch.from_numpy(first["x"])
        torch.testing.assert_close(x, wanted(m, p, turn, world, narrow), rtol=1e-5, atol=1e-5)
        squares = torch.from_numpy(first["squares"]).sum(-1)
        if mode == "raw":
            torch.testing.assert_close(squares, x.square().sum(-1), rtol=1e-5, atol=0)
            torch.testing.assert_close(torch.from_numpy(first["plain"]), (x * norm).bfloat16().float())
        h = reference.rms_norm(x, norm, EPS).bfloat16()
        if mode == "normed":
            torch.testing.assert_close(torch.from_numpy(first["plain"]), h.float(), rtol=8e-3, atol=0)
        if quantise != "no":
            scale = torch.full((m,), 0.02) if quantise == "static" else h.abs().amax(-1).float() / 448
            torch.testing.assert_close(torch.from_numpy(first["scale"]), scale, rtol=8e-3, atol=0)
            back = torch.from_numpy(first["rounded"]) * scale[:, None]
            torch.testing.assert_close(back, h.float(), rtol=0.08, atol=0.01)


@pytest.mark.parametrize("kind", ["float32", "static"])
def test_layers_on_two_ranks(ranks: list[dict[Any, Any]], kind: str) -> None:
    """Nothing is gathered, and logits and stream are those of one rank."""
    first, second = (found["layers"] for found in ranks[:2])
    assert all((first[name] == second[name]).all() for name in first)
    down, head, norm = weight(kind, CHANNELS, INNER), weight(kind, 24, CHANNELS, seed=1), stream(1, 99)[0].abs()
    x, out = randn(3, INNER, seed=4).to(reference.compute_dtype(down)), stream(3, 7)
    out = out + reference.linear(x, down)
    logits = reference.norm_linear(out, norm, EPS, head)
    out = out + reference.linear(x, down)
    for name, value in ((kind, logits), (f"{kind} stream", out)):
        error = (torch.from_numpy(first[name]) - value).abs().amax() / value.abs().amax()
        assert error < (6e-2 if kind == "static" else 1e-2), name


@pytest.mark.parametrize("letters", ["none", "old"])
def test_a_rank_that_does_not_write_is_lost(letters: str) -> None:
    """After so many looks the kernel gives up and says so, on the device and to the host, and later ones do not wait again."""
    boxes = [torch.zeros(2 * 2 * ROOM * CHANNELS, dtype=torch.int64) for _ in range(2)]
    mailbox = Mailbox.open(0, 2, ROOM, CHANNELS, False, memory(0, boxes), BLOCK)
    mailbox.patience = 3
    if letters == "old":  # of turn 1, where turn 2 is due
        boxes[0] += 1 << 32
        mailbox.turns += 1
    exchange(mailbox, 1, 1, 0, "normed", "static")
    assert mailbox.absent.item() == mailbox.lost.item() == 1
    mailbox.patience = 1 << 30
    exchange(mailbox, 1, 1, 1, "normed", "static")


def test_forwards_beyond_the_room_are_gathered() -> None:
    """And so is everything without a mailbox."""
    boxes = [torch.zeros(2 * 2 * ROOM * CHANNELS, dtype=torch.int64) for _ in range(2)]
    mailbox = Mailbox.open(0, 2, ROOM, CHANNELS, False, memory(0, boxes), BLOCK)
    for tokens, box in ((ROOM + 1, mailbox), (1, None)):
        ops, x = ParallelOps(CPU, lambda parts: torch.stack([parts, parts]), box), stream(tokens, 0)
        ops.leave(x, partial(tokens, 2, 0, 0))
        ops.flush(x)
        torch.testing.assert_close(x, stream(tokens, 0) + 2 * partial(tokens, 2, 0, 0).sum(0), rtol=1e-5, atol=1e-5)


def test_an_odd_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="5 channels do not pair"):
        Mailbox.open(0, 2, ROOM, 5, True, lambda size: (torch.zeros(size), torch.zeros(2)))
