"""The GPU's products against the torch reference: on the CPU through Triton's interpreter, on a GPU as compiled.

M tokens, K inputs, N outputs, P pending partial sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import interpreter
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.gpu import ops as gpu_ops
from specdec.kernels.gpu.ops import Ops
from specdec.kernels.gpu.table import Tile
from specdec.kernels.reference import Fp8Weight, Weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    interpreter.install()

EPS = 1e-5
KINDS = ["float32", "bfloat16", "dynamic", "static"]  # the last two: FP8, by how its inputs are scaled
NEAR = {"float32": 2e-6, "bfloat16": 1.5e-2, "dynamic": 1.5e-2, "static": 1.5e-2}  # roundings fall elsewhere
STATIC = 0.004  # of inputs of size 1: some saturate

few = settings(max_examples=10, deadline=None, phases=[Phase.reuse, Phase.generate])  # to shrink would take minutes
seeds, kinds = st.integers(0, 10**6), st.sampled_from(KINDS)
odd_tokens = st.integers(1, 19)
odd_rows = st.sampled_from([10, 16, 36, 66, 80])
odd_inputs = st.sampled_from([64, 192, 320])  # each part of a row is whole 16 bytes, as bulk requests to the L2 must be
tiles = st.builds(
    Tile, st.sampled_from([16, 32, 64]), st.sampled_from([32, 64, 128]), st.sampled_from([1, 2, 4]), st.just(4), st.just(2)
)  # fmt: skip


class Case:
    """Seeded tensors, made on the CPU for both sides."""

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw)

    def norm(self, k: int) -> Tensor:
        return 0.5 + torch.rand(k, generator=self.draw)

    def weight(self, kind: str, n: int, k: int) -> Weight:
        value = self.randn(n, k) * k**-0.5
        if kind in ("float32", "bfloat16"):
            return value.to(getattr(torch, kind))
        return Fp8Weight(*reference.quantize(value), torch.tensor(STATIC) if kind == "static" else None)


def on(value: Any) -> Any:
    """A copy where the kernels run."""
    if isinstance(value, Tensor):
        return value.to(DEVICE, copy=True)
    return Fp8Weight(on(value.data), on(value.scale), None if value.input_scale is None else on(value.input_scale))


@contextmanager
def tiled(t: Tile, burst: bool) -> Iterator[None]:
    """Every product with this tile; with `burst` those that can take their weights in one go, which ends at other shapes."""

    def choose(kind: str, n: int, k: int, width: int, block: int) -> Tile:
        return Tile(t.BN, k, stages=1) if kind == "burst" else t if kind == "add" else Tile(t.BN, t.BK)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_ops, "tile", choose)
        if not burst:
            patch.setattr(gpu_ops, "BURST", 0)
        yield


def error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference as a share of the wanted one's: a single wrong token or output of a hundred shows."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    return float((found.cpu().double() - wanted.double()).norm() / wanted.double().norm())


# ---- one product -----------------------------------------------------------------------------------------------------


@few
@given(kinds, odd_tokens, odd_rows, odd_inputs, tiles, st.booleans(), seeds, st.booleans())
def test_products_behind_a_norm(
    kind: str, m: int, n: int, k: int, t: Tile, burst: bool, seed: int, swiglu: bool
) -> None:
    case, ops, name = Case(seed), Ops(DEVICE), "norm_swiglu" if swiglu else "norm_linear"
    x, norm, weight = 3 * case.randn(m, k), case.norm(k), case.weight(kind, n, k)
    stream = on(x)
    with tiled(t, burst):
        found = getattr(ops, name)(stream, on(norm), EPS, ops.pack(on(weight), swiglu))
    assert error(found, getattr(reference, name)(x, norm, EPS, weight)) < NEAR[kind]
    assert torch.equal(stream.cpu(), x)


def test_a_token_of_zeros_stays_zero() -> None:
    """Its largest magnitude gives no scale."""
    case, ops = Case(0), Ops(DEVICE)
    x, weight = torch.zeros(2, 64), case.weight("dynamic", 16, 64)
    x[1] = 1
    found = ops.norm_linear(on(x), torch.ones(64, device=DEVICE), EPS, on(weight)).cpu()
    assert found[0].tolist() == [0] * 16
    assert found[1].isfinite().all()
    residual = torch.zeros(2, 16, device=DEVICE)
    ops.add_linear(residual, on(x.bfloat16()), on(weight))
    ops.flush(residual)
    assert residual[0].tolist() == [0] * 16


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_forwards_too_long_to_be_exact(kind: str) -> None:
    """What is pending is added before the vendor's product reads the stream, and before it adds to it."""
    case, ops, m, k = Case(1), Ops(DEVICE), gpu_ops.TOKENS_EXACT + 1, 64
    stream, y, norm = case.randn(m, k), case.randn(m, k), case.norm(k)
    late, weight, gate_up = case.randn(2, m, k), case.weight(kind, k, k), case.weight(kind, 36, k)
    y = y.to(reference.compute_dtype(weight))
    ours, theirs = on(stream), stream + late.sum(0)
    ops.pending = ours, on(late)
    found = ops.norm_swiglu(ours, on(norm), EPS, ops.pack(on(gate_up), swiglu=True))
    assert error(found, reference.norm_swiglu(theirs, norm, EPS, gate_up)) < NEAR[kind]
    ops.pending = ours, on(late)
    ops.add_linear(ours, on(y), on(weight))
    theirs += late.sum(0)
    reference.add_linear(theirs, y, weight)
    ops.flush(ours)
    assert error(ours, theirs) < NEAR[kind]


# ---- sums that are put off -------------------------------------------------------------------------------------------


@few
@given(
    kinds, odd_tokens, st.sampled_from([48, 64, 112]), st.sampled_from([64, 192]), tiles, st.booleans(), st.booleans(), seeds
)  # fmt: skip
def test_the_stream_through_layers(
    kind: str, m: int, hidden: int, inner: int, t: Tile, burst: bool, announced: bool, seed: int
) -> None:
    """Looked up, read, added to, read by two norms, added to twice: the stream is the same, however its sums are put off.

    announced: each writer is told the norm that comes next, and readies the stream for it.
    """
    case, ops, draw = Case(seed), Ops(DEVICE), torch.Generator().manual_seed(seed)
    norms, head = [case.norm(hidden), case.norm(hidden)], case.weight(kind, 24, hidden)
    there = [on(norm) for norm in norms]
    table = case.randn(11, hidden).to(reference.compute_dtype(head))
    tokens = torch.randint(0, 11, (m,), generator=draw)
    x = table[tokens].float()

    def read(which: int) -> None:
        wanted = reference.norm_linear(x, norms[which], EPS, head)
        assert error(ops.norm_linear(stream, there[which], EPS, on(head)), wanted) < NEAR[kind]

    def add() -> None:
        weight = case.weight(kind, hidden, inner)
        y = case.randn(m, inner).to(reference.compute_dtype(weight))
        ops.add_linear(stream, on(y), on(weight), there[0] if announced else None)
        before = x.clone()
        reference.add_linear(x, y, weight)
        assert error(before, x) > 0.1  # a lost sum would show

    with tiled(t, burst):
        stream = ops.embed(on(tokens), on(table), there[0])
        assert torch.equal(stream.cpu(), x)
        read(0)
        add()
        read(0)
        read(1)
        add()
        add()
        read(1)
        add()
    ops.flush(stream)
    assert error(stream, x) < NEAR[kind]
    ops.flush(stream)
    assert error(stream, x) < NEAR[kind]  # only once


@pytest.mark.parametrize("kind", ["bfloat16", "static"])
def test_a_stream_given_up_leaves_nothing_behind(kind: str) -> None:
    """A forward that ended in the middle, of the same shape: its sums reach no other stream, however that is read."""
    case, m, k = Case(2), 3, 64
    weight, head, norm = case.weight(kind, k, k), case.weight(kind, 16, k), case.norm(k)
    y = case.randn(m, k).bfloat16()

    def abandoned() -> tuple[Ops, Tensor]:
        ops = Ops(DEVICE)
        stream = torch.zeros(m, k, device=DEVICE)
        ops.add_linear(stream, on(100 * y), on(weight))
        assert ops.pending is not None
        return ops, case.randn(m, k)

    with tiled(Tile(16, 32, 2), burst=False):
        ops, x = abandoned()
        found = ops.norm_linear(on(x), on(norm), EPS, on(head))
        assert error(found, reference.norm_linear(x, norm, EPS, head)) < NEAR[kind]
        ops, x = abandoned()
        stream = on(x)
        ops.flush(stream)
        assert torch.equal(stream.cpu(), x)
        ops, x = abandoned()
        stream = on(x)
        ops.add_linear(stream, on(y), on(weight))
        ops.flush(stream)
        reference.add_linear(x, y, weight)
        assert error(stream, x) < NEAR[kind]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_stream_made_ready_is_read_by_no_other(kind: str) -> None:
    """Neither its own next norm's nor another stream's product takes what was readied for a third."""
    case, ops, m, k = Case(4), Ops(DEVICE), 3, 64
    weight, norm, other = case.weight(kind, k, k), case.norm(k), case.norm(k)
    x, y = case.randn(m, k), case.randn(m, k).to(reference.compute_dtype(weight))
    stream, fresh, there = torch.zeros(m, k, device=DEVICE), on(x), on(norm)
    ops.add_linear(stream, on(y), on(weight), there)
    assert (
        error(ops.norm_linear(fresh, there, EPS, on(weight)), reference.norm_linear(x, norm, EPS, weight)) < NEAR[kind]
    )
    wanted = torch.zeros(m, k)
    reference.add_linear(wanted, y, weight)
    ops.add_linear(fresh, on(y), on(weight), there)
    reference.add_linear(x, y, weight)
    found = ops.norm_linear(fresh, on(other), EPS, on(weight))
    assert error(found, reference.norm_linear(x, other, EPS, weight)) < NEAR[kind]


# ---- the checks see faults -------------------------------------------------------------------------------------------


LAYERS: Any = test_the_stream_through_layers


@pytest.mark.parametrize("fault", ["pending", "value", "squares"])
def test_lost_and_spoiled_sums_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: what a product leaves for the next reader of the stream is forgotten, or wrong."""
    add_linear = Ops.add_linear
    waits = fault == "pending"
    case = ("bfloat16", 2, 48, 64, Tile(16, 32, 2), not waits, not waits, 0)

    def faulty(ops: Ops, *arguments: Any) -> None:
        add_linear(ops, *arguments)
        if waits:
            assert ops.pending is not None
            ops.pending = None
        else:
            getattr(ops.ready, fault)[-1] *= 1.5

    LAYERS.hypothesis.inner_test(*case)
    monkeypatch.setattr(Ops, "add_linear", faulty)
    with pytest.raises(AssertionError):
        LAYERS.hypothesis.inner_test(*case)


def test_foreign_sums_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: whoever comes next takes the sums of a stream that was given up."""

    def take(ops: Ops, x: Tensor) -> tuple[Tensor, int]:
        return (x, 0) if ops.pending is None else (ops.pending[1], len(ops.pending[1]))

    monkeypatch.setattr(Ops, "pending_parts", take)
    with pytest.raises(AssertionError):
        test_a_stream_given_up_leaves_nothing_behind("bfloat16")


@pytest.mark.parametrize("kind", KINDS)
def test_unpacked_gates_are_caught(kind: str) -> None:
    """Negative control: gate and up rows in the checkpoint's order."""
    case, ops = Case(3), Ops(DEVICE)
    x, norm, weight = case.randn(2, 64), case.norm(64), case.weight(kind, 32, 64)
    found = ops.norm_swiglu(on(x), on(norm), EPS, on(weight))
    assert error(found, reference.norm_swiglu(x, norm, EPS, weight)) > 0.1
