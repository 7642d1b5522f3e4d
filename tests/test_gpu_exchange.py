"""Ranks that add up through one another's memory: streams of one GPU, or processes with shared memory in the interpreter.

M tokens, K channels, P partial sums of a rank.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial as partial_of
from typing import Any

import interpreter
import pytest
import torch
from test_gpu_parallel import DEVICE, EPS, INNER, half, randn, weight
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.gpu.exchange import Mailbox
from specdec.kernels.gpu.parallel import ParallelOps

ROOM, BLOCK, CHANNELS = 4, 128, 2 * 128 + 16  # three programs a token, the last one nearly empty
TURNS = [(3, 2), (1, 1), (4, 3), (2, 1)]  # M and P of the exchanges of a run
MODES = [("normed", "static"), ("normed", "dynamic"), ("no", "dynamic"), ("raw", "no"), ("no", "no")]
WORLDS = (2, 3)
PATIENCE = 1 << 22  # seconds at most


def stream(m: int, turn: int, channels: int = CHANNELS) -> Tensor:
    return randn(m, channels, seed=turn)


def partial(m: int, p: int, turn: int, rank: int, channels: int = CHANNELS) -> Tensor:
    return randn(p, m, channels, seed=1000 * turn + rank)


def exchange(mailbox: Mailbox, m: int, p: int, turn: int, mode: str, quantise: str) -> dict[str, Tensor]:
    """One exchange; everything it wrote."""
    x, norm = stream(m, turn), stream(1, 99)[0].abs()
    plain = torch.zeros(m, CHANNELS, dtype=torch.bfloat16, device=DEVICE)
    rounded, scale = torch.zeros(m, CHANNELS, dtype=reference.FP8, device=DEVICE), torch.zeros(m, device=DEVICE)
    squares, static = torch.zeros(m, -(-CHANNELS // BLOCK), device=DEVICE), torch.tensor(0.02, device=DEVICE)
    mailbox.add_norm(
        x, partial(m, p, turn, mailbox.rank), norm, EPS, plain, squares, rounded, scale,
        static if quantise == "static" else scale, mode, quantise, {"PDL": False},
    )  # fmt: skip
    return {"x": x, "plain": plain, "rounded": rounded.float(), "scale": scale, "squares": squares}


def layers(mailbox: Mailbox, kind: str) -> dict[str, Tensor]:
    """A product of split inputs, which stays pending, and the product behind the norm that adds it; then one that is flushed.

    Between the exchanges nothing is asked of the host, so that ranks can be streams of one process.
    """
    ops = ParallelOps(DEVICE, lambda x: pytest.fail("gathered"), mailbox)
    down, head, norm = weight(kind, CHANNELS, INNER), weight(kind, 24, CHANNELS, seed=1), stream(1, 99)[0].abs()
    out, x = stream(3, 7), randn(3, INNER, seed=4).to(reference.compute_dtype(down))
    mine, part = x.chunk(2, -1)[mailbox.rank].contiguous(), half(down, mailbox.rank, -1)
    ops.add_linear(out, mine, part, norm)
    logits = ops.norm_linear(out, norm, EPS, head)
    ops.add_linear(out, mine, part)
    ops.flush(out)
    return {"logits": logits, "stream": out}


def memory(rank: int, boxes: list[Tensor]) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A rank's box, and where everybody's lie in this process."""
    return lambda size: (boxes[rank][:size], torch.tensor([box.data_ptr() for box in boxes], device=DEVICE))


def mailboxes(rank: int, boxes: dict[Any, list[Tensor]]) -> dict[Any, Mailbox]:
    """A rank's mailboxes, by (ranks, whether in halves)."""
    return {
        (world, narrow): Mailbox.open(rank, world, ROOM, CHANNELS, narrow, memory(rank, shared), BLOCK)
        for (world, narrow), shared in boxes.items()
        if rank < world
    }


def works(boxes: dict[Any, Mailbox]) -> Iterator[tuple[Any, Callable[[], dict[str, Tensor]]]]:
    """All that a rank does, piece by piece, and at last whether it missed letters."""
    for key, box in boxes.items():
        for mode in MODES if key[0] == 2 else MODES[:2]:
            for turn, sizes in enumerate(TURNS):
                yield (*key, *mode, turn), partial_of(exchange, box, *sizes, turn, *mode)
    for kind in ("float32", "static") if (2, True) in boxes else ():
        yield kind, partial_of(layers, boxes[2, True], kind)
    yield "lost", partial_of(lambda: {str(key): box.lost | box.absent.cpu() for key, box in boxes.items()})


def run(rank: int, boxes: dict[Any, list[Tensor]], queue: Any) -> None:
    """A rank that is a process."""
    interpreter.install()
    interpreter.side_by_side("exchange_norm_kernel")
    queue.put((rank, {key: _plain(work()) for key, work in works(mailboxes(rank, boxes))}))


def _plain(value: dict[str, Tensor]) -> dict[str, Any]:
    """Arrays: tensors would travel through files that end with their process."""
    return {name: tensor.float().cpu().numpy() for name, tensor in value.items()}


def on_streams(boxes: dict[Any, list[Tensor]]) -> list[dict[Any, Any]]:
    """What ranks find that are streams of one GPU. All do everything once without waiting, so that all kernels are loaded."""
    streams = [torch.cuda.Stream() for _ in range(max(WORLDS))]
    ranks = [mailboxes(rank, boxes) for rank in range(max(WORLDS))]
    found: list[dict[Any, Any]] = []
    for patience in (0, PATIENCE):
        found = [dict(works(own)) for own in ranks]
        for own in ranks:
            for box in own.values():
                box.patience = patience
        for key in found[0]:
            torch.cuda.synchronize()
            for pieces, on in zip(found, streams, strict=True):
                if key in pieces:
                    with torch.cuda.stream(on):
                        pieces[key] = pieces[key]()
        torch.cuda.synchronize()
    return [{key: _plain(value) for key, value in pieces.items()} for pieces in found]


def tensor(array: Any) -> Tensor:
    """What a rank found, back where it is compared."""
    return torch.from_numpy(array).to(DEVICE)


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    """What each of three ranks found."""
    context = multiprocessing.get_context("spawn")
    size = 2 * max(WORLDS) * ROOM * CHANNELS
    boxes = {
        (world, narrow): [torch.zeros(size, dtype=torch.int64, device=DEVICE) for _ in range(world)]
        for world in WORLDS
        for narrow in (False, True)
    }
    if DEVICE.type == "cuda":
        return on_streams(boxes)
    for shared in boxes.values():
        for box in shared:
            box.share_memory_()
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
        first, *others = (found[world, narrow, mode, quantise, turn] for found in ranks[:world])
        assert not any(lost.any() for found in ranks for lost in found["lost"].values())
        for other in others:
            assert all((first[name] == other[name]).all() for name in first), (turn, m)
        x = tensor(first["x"])
        torch.testing.assert_close(x, wanted(m, p, turn, world, narrow), rtol=1e-5, atol=1e-5)
        squares = tensor(first["squares"]).sum(-1)
        if mode == "raw":
            torch.testing.assert_close(squares, x.square().sum(-1), rtol=1e-5, atol=0)
            torch.testing.assert_close(tensor(first["plain"]), (x * norm).bfloat16().float())
        h = reference.rms_norm(x, norm, EPS).bfloat16()
        if mode == "normed":
            torch.testing.assert_close(tensor(first["plain"]), h.float(), rtol=8e-3, atol=0)
        if quantise != "no":
            scale = torch.full((m,), 0.02, device=DEVICE) if quantise == "static" else h.abs().amax(-1).float() / 448
            torch.testing.assert_close(tensor(first["scale"]), scale, rtol=8e-3, atol=0)
            back = tensor(first["rounded"]) * scale[:, None]
            torch.testing.assert_close(back, h.float(), rtol=0.08, atol=0.01)


@pytest.mark.parametrize("kind", ["float32", "static"])
def test_layers_on_two_ranks(ranks: list[dict[Any, Any]], kind: str) -> None:
    """Nothing is gathered, and logits and stream are those of one rank."""
    first, second = (found[kind] for found in ranks[:2])
    assert all((first[name] == second[name]).all() for name in first)
    down, head, norm = weight(kind, CHANNELS, INNER), weight(kind, 24, CHANNELS, seed=1), stream(1, 99)[0].abs()
    x, out = randn(3, INNER, seed=4).to(reference.compute_dtype(down)), stream(3, 7)
    out = out + reference.linear(x, down)
    logits = reference.norm_linear(out, norm, EPS, head)
    out = out + reference.linear(x, down)
    for name, value in (("logits", logits), ("stream", out)):
        error = (tensor(first[name]) - value).abs().amax() / value.abs().amax()
        assert error < (6e-2 if kind == "static" else 1e-2), name


@pytest.mark.parametrize("letters", ["none", "old"])
def test_a_rank_that_does_not_write_is_lost(letters: str) -> None:
    """After so many looks the kernel gives up and says so, on the device and to the host, and later ones do not wait again."""
    boxes = [torch.zeros(2 * 2 * ROOM * CHANNELS, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    mailbox = Mailbox.open(0, 2, ROOM, CHANNELS, False, memory(0, boxes), BLOCK)
    mailbox.patience = 3
    if letters == "old":  # of turn 1, where turn 2 is due
        boxes[0] += 1 << 32
        mailbox.turns += 1
    exchange(mailbox, 1, 1, 0, "normed", "static")
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert mailbox.absent.item() == mailbox.lost.item() == 1
    mailbox.patience = 1 << 30
    exchange(mailbox, 1, 1, 1, "normed", "static")


def test_forwards_beyond_the_room_are_gathered() -> None:
    """And so is everything without a mailbox."""
    boxes = [torch.zeros(2 * 2 * ROOM * CHANNELS, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    mailbox = Mailbox.open(0, 2, ROOM, CHANNELS, False, memory(0, boxes), BLOCK)
    for tokens, box in ((ROOM + 1, mailbox), (1, None)):
        ops, x = ParallelOps(DEVICE, lambda parts: torch.stack([parts, parts]), box), stream(tokens, 0)
        ops.leave(x, partial(tokens, 2, 0, 0))
        ops.flush(x)
        torch.testing.assert_close(x, stream(tokens, 0) + 2 * partial(tokens, 2, 0, 0).sum(0), rtol=1e-5, atol=1e-5)


def test_an_odd_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="5 channels do not pair"):
        Mailbox.open(0, 2, ROOM, 5, True, lambda size: (torch.zeros(size), torch.zeros(2)))
