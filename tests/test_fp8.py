"""FP8 weights and experts in the torch reference.

Shapes: M tokens, K inputs, N outputs, X experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import TOLERANCE, error
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.reference import FP8, Experts, Fp8Weight
from specdec.nn.layers import pair_halves

small = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(small, min_size=4, max_size=4), min_size=1, max_size=3), st.none() | st.floats(0.01, 10))
def test_quantize(rows: list[list[float]], static: float | None) -> None:
    """Within half a step of e4m3 (2^-4 of the value, 2^-10 below its smallest normal), and saturated."""
    x = torch.tensor(rows)
    data, scale = reference.quantize(x, None if static is None else torch.tensor(static))
    assert (data.dtype, data.shape, scale.dtype, scale.shape) == (FP8, x.shape, torch.float32, x.shape[:1])
    assert data.float().isfinite().all()
    scaled = x / scale[:, None]
    wanted = scaled.clamp(-448, 448)
    assert ((data.float() - wanted).abs() <= torch.maximum(wanted.abs() * 2**-4, torch.tensor(2.0**-10))).all()
    if static is None and x.abs().amax() > 1e-20:
        assert data.float().abs().amax() == 448


def test_quantize_rounds_to_even_and_saturates() -> None:
    x = torch.tensor([[1.0625, 1.1875, 500.0, -1e30, 0.0]])
    assert reference.quantize(x, torch.tensor(1.0))[0].float().tolist() == [[1.0, 1.25, 448.0, -448.0, 0.0]]


def fp8(*shape: int, seed: int, input_scale: float | None = None) -> Fp8Weight:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return Fp8Weight(*reference.quantize(value), None if input_scale is None else torch.tensor(input_scale))


def dense(weight: Fp8Weight) -> Tensor:
    return weight.data.float() * weight.scale[..., None]


@pytest.mark.parametrize("static", [None, 0.02])
def test_fp8_linear(static: float | None) -> None:
    weight, x = fp8(24, 40, seed=0, input_scale=static), torch.randn(7, 40).bfloat16()
    data, scale = reference.quantize(x, weight.input_scale)
    wanted = (data.double() * scale.double()[:, None]) @ dense(weight).double().T
    assert error(reference.linear(x, weight), wanted) < 1e-6
    assert error(reference.linear(x, weight), x.float() @ dense(weight).T) < 0.1


def test_stacked_weights_keep_their_scales() -> None:
    first, second = fp8(6, 8, seed=0, input_scale=0.5), fp8(4, 8, seed=1, input_scale=2.0)
    both = reference.stack([first, second])
    assert isinstance(both, Fp8Weight)
    assert both.input_scale == 2.0
    assert torch.equal(dense(both), torch.cat([dense(first), dense(second)]))


def test_pairs_move_with_their_scales() -> None:
    weight = fp8(16, 4, seed=3)
    moved = pair_halves(weight, 8)
    assert isinstance(moved, Fp8Weight)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(dense(moved), dense(weight)[[*order, *(8 + i for i in order)]])


# ---- experts ---------------------------------------------------------------------------------------------------------


def experts(quantized: bool, **changes: Any) -> Experts:
    shapes = [(3, 20, 16), (3, 16, 10), (20, 16), (16, 10)]
    weights = [fp8(*shape, seed=i) for i, shape in enumerate(shapes)]
    router = torch.randn(3, 16, generator=torch.Generator().manual_seed(9))
    return replace(Experts(router, *(weights if quantized else map(dense, weights))), **changes)


@pytest.mark.parametrize("quantized", [False, True])
def test_moe(quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token at a time by the formula of Llama 4, where the score scales the expert's input."""
    mixture, x, norm = experts(quantized), torch.randn(9, 16), torch.rand(16)
    whole = x.clone()
    reference.add_moe(whole, norm, 1e-5, mixture)
    monkeypatch.setattr(reference, "_EXPERT_ELEMENTS", 1)
    pieces = x.clone()
    reference.add_moe(pieces, norm, 1e-5, mixture)
    assert error(pieces, whole) < 1e-6
    plain = experts(False)
    used = set()
    for row, result in zip(x, whole, strict=True):
        h = reference.rms_norm(row, norm, 1e-5)
        logits = plain.router @ h
        best = int(logits.argmax())
        used.add(best)
        gate, up = (plain.gate_up[best] @ (logits[best].sigmoid() * h)).chunk(2)  # type: ignore[index]
        routed = plain.down[best] @ (torch.nn.functional.silu(gate) * up)  # type: ignore[index]
        gate, up = (plain.shared_gate_up @ h).chunk(2)  # type: ignore[operator]
        wanted = routed + plain.shared_down @ (torch.nn.functional.silu(gate) * up)  # type: ignore[operator]
        assert error(result - row, wanted) < (0.2 if quantized else TOLERANCE)
    assert len(used) > 1


def test_router_ties_and_forced_experts() -> None:
    """Of equal logits the first expert wins; a forced expert is used with the score of its own logit."""
    x, norm = torch.randn(4, 16), torch.ones(16)
    tied = experts(False, router=torch.ones(3, 16))
    first = reference.moe(x, norm, 1e-5, tied)
    forced = [
        reference.moe(x, norm, 1e-5, replace(tied, forced=torch.full((8,), i, dtype=torch.int32))) for i in (0, 2)
    ]
    assert torch.equal(first, forced[0])
    assert error(forced[1], first) > 0.01
