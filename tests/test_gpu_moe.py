"""The mixture's kernels equal `reference.moe`: on the CPU through Triton's interpreter, on a GPU as compiled.

M tokens, H hidden size, X experts, I channels of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.gpu import moe as gpu_moe
from specdec.kernels.gpu.ops import Ops
from specdec.kernels.gpu.table import Tile
from specdec.kernels.gpu.weights import interleave
from specdec.kernels.reference import Experts, Fp8Weight, Weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
KINDS = {"f32": 1e-5, "bf16": 1e-2, "dynamic": 2e-2, "static": 2e-2}  # error allowed, as a share of the largest value
SIZES = (39, 5, 17)  # H, X, I

if DEVICE.type == "cpu":
    interpreter.install()


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """One tile for most products, because the interpreter is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ops, "tile", lambda *_: Tile(64, 64))
        yield


def experts_of(kind: str, sizes: tuple[int, int, int] = SIZES, seed: int = 0) -> Experts:
    """Random experts, rows [gate; up]. Static input scales differ from weight to weight."""
    hidden, num, inner = sizes
    draw = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if kind == "f32" else torch.bfloat16

    def make(index: int, *shape: int) -> Weight:
        value = torch.randn(shape, generator=draw) * shape[-1] ** -0.5
        if kind in ("f32", "bf16"):
            return value.to(DEVICE, dtype)
        scale = torch.tensor(0.004 + 0.002 * index, device=DEVICE) if kind == "static" else None
        return Fp8Weight(*reference.quantize(value.to(DEVICE)), scale)

    return Experts(
        torch.randn(num, hidden, generator=draw).to(DEVICE, dtype),
        make(0, num, 2 * inner, hidden), make(1, num, hidden, inner),
        make(2, 2 * inner, hidden), make(3, hidden, inner),
    )  # fmt: skip


def stream(tokens: int, hidden: int = SIZES[0], seed: int = 1) -> tuple[Tensor, Tensor]:
    """x f32 [M, H] and a norm's weight."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, hidden, generator=draw).to(DEVICE), 1 + 0.1 * torch.randn(hidden, generator=draw).to(
        DEVICE
    )


def packed(experts: Experts) -> Experts:
    """As the kernels take them."""
    gate_up, shared = (interleave(weight) for weight in (experts.gate_up, experts.shared_gate_up))
    return gpu_moe.pack_experts(replace(experts, gate_up=gate_up, shared_gate_up=shared))


def run(x: Tensor, norm: Tensor, experts: Experts) -> Tensor:
    """What the kernels make of the stream."""
    ops, out = Ops(DEVICE), x.clone()
    gpu_moe.moe(ops, out, norm, EPS, packed(experts))
    ops.flush(out)
    return out


def check(x: Tensor, norm: Tensor, experts: Experts, kind: str) -> None:
    wanted = reference.moe(x, norm, EPS, experts)
    assert ((run(x, norm, experts) - x - wanted).abs().amax() / wanted.abs().amax()).item() < KINDS[kind]


def forced(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_reference(kind: str) -> None:
    x, norm = stream(18)
    check(x, norm, experts_of(kind), kind)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 6), st.tuples(st.integers(9, 90), st.integers(1, 9), st.integers(1, 40)), st.integers(0, 10**6))
def test_equals_reference_at_any_size(tokens: int, sizes: tuple[int, int, int], seed: int) -> None:
    x, norm = stream(tokens, sizes[0], seed)
    check(x, norm, experts_of("f32", sizes, seed), "f32")


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        ("dynamic", (3, 3, 3)),
        ("f32", (4, 3, 2, 1, 0)),
        ("static", (1, 2, 1, 2)),
        ("f32", (0,) * 16 + (1, 0, 1)),
    ],
    ids=["one", "distinct", "alternating", "in the second tile"],
)
def test_forced_experts(kind: str, ids: tuple[int, ...]) -> None:
    """More entries than tokens are allowed; the score is still that of the forced expert's logit."""
    x, norm = stream(len(ids))
    check(x, norm, replace(experts_of(kind), forced=forced(*ids, 0, 0)), kind)


def test_of_equal_logits_the_first_wins() -> None:
    experts, (x, norm) = experts_of("f32"), stream(6)
    experts.router[2:] = experts.router[1]
    logits = reference.rms_norm(x, norm, EPS) @ experts.router.T
    first = (logits[:, 1] > logits[:, 0]).int()
    assert 0 < first.sum() < 6, "both must occur"
    assert torch.equal(run(x, norm, experts), run(x, norm, replace(experts, forced=first)))


def test_pending_parts_are_added_first() -> None:
    """Of the stream before the mixture; its own stay pending."""
    ops, experts, (x, norm) = Ops(DEVICE), experts_of("f32", (39, 5, 24)), stream(5)
    parts = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    whole = x + parts.sum(0)
    ops.pending = (x, parts)
    gpu_moe.moe(ops, x, norm, EPS, packed(experts))
    assert ops.pending is not None
    assert ops.pending[1].shape == (2, *x.shape)
    ops.flush(x)
    torch.testing.assert_close(x, whole + reference.moe(whole, norm, EPS, experts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["f32", "dynamic"])
def test_a_token_does_not_see_the_others(kind: str) -> None:
    """Alone, among others and in another place: the same bits."""
    experts = experts_of(kind)
    x, norm = stream(17)
    together = run(x, norm, experts)
    for m in (0, 16):
        assert torch.equal(run(x[m : m + 1], norm, experts)[0], together[m])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    assert torch.equal(run(x[order], norm, experts), together[order])


def test_interleave() -> None:
    rows = torch.arange(6.0).view(1, 6, 1).expand(2, 6, 3)
    weight = Fp8Weight(rows.to(torch.float8_e4m3fn), rows[..., 0].clone())
    packed = interleave(weight)
    assert isinstance(packed, Fp8Weight)
    assert packed.scale.tolist() == [[0, 3, 1, 4, 2, 5]] * 2
    assert packed.data.float().is_contiguous()
    assert torch.equal(packed.data.float(), packed.scale[..., None].expand(2, 6, 3))


def test_mixed_experts_are_refused() -> None:
    experts, x = experts_of("dynamic"), stream(1)
    with pytest.raises(ValueError, match="dynamic and plain"):
        run(*x, replace(experts, shared_down=experts_of("bf16").shared_down))
