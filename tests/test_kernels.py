"""The compiled CPU products against the torch reference and f64 on odd shapes, and the bits they promise not to change.

Shapes: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from parity import error, randn
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.cpu import linear as products
from specdec.kernels.cpu import ops, simd, tiles

DTYPES = [torch.float32, torch.bfloat16]
WIDEST = 20
EPS = 1e-5


# ---- products --------------------------------------------------------------------------------------------------------

# Inputs rounded to bf16 may differ by a unit where the norms differ in their last f32 bit; the reference also rounds
# its bf16 results. Products of inputs that are given in bf16 are held to f64.
NEAR = {torch.float32: 5e-6, torch.bfloat16: 8e-3}
EXACT = 5e-6  # one chain of f32 sums over K


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 16), (31, 48), (33, 16), (64, 80), (259, 192), (96, 1040)])
def test_norm_linear(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    weight, norm = randn(outputs, inputs, seed=1, dtype=dtype), 1 + 0.3 * randn(inputs, seed=2)
    packed = ops.pack(weight)
    for tokens in range(1, WIDEST + 1):
        x = 3 * randn(tokens, inputs, seed=tokens)
        result = ops.norm_linear(x, norm, EPS, packed)
        assert result.dtype == torch.float32
        assert error(result, reference.norm_linear(x, norm, EPS, weight)) < NEAR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "inputs"), [(16, 16), (48, 32), (160, 208)])
def test_norm_swiglu(dtype: torch.dtype, inner: int, inputs: int) -> None:
    weight, norm = randn(2 * inner, inputs, seed=1, dtype=dtype), 1 + 0.3 * randn(inputs, seed=2)
    packed = ops.pack(weight, swiglu=True)
    for tokens in range(1, WIDEST + 1):
        x = randn(tokens, inputs, seed=tokens)
        result = ops.norm_swiglu(x, norm, EPS, packed)
        assert result.dtype == dtype
        assert error(result, reference.norm_swiglu(x, norm, EPS, weight)) < 2 * NEAR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 16), (33, 48), (160, 192), (250, 1040)])
def test_add_linear_in_f64(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    weight = randn(outputs, inputs, seed=1, dtype=dtype)
    packed = ops.pack(weight)
    for tokens in range(1, WIDEST + 1):
        x, residual = randn(tokens, inputs, seed=tokens, dtype=dtype), randn(tokens, outputs, seed=50 + tokens)
        wanted = residual.double() + x.double() @ weight.double().T
        near = residual.clone()
        reference.add_linear(near, x, weight)
        ops.add_linear(residual, x, packed)
        assert error(residual, wanted) < EXACT
        assert error(residual, near) < NEAR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_f32_inputs_are_rounded_to_the_weights(dtype: torch.dtype) -> None:
    """Without a norm the product only converts, to nearest, ties to even."""
    weight = randn(40, 32, seed=1, dtype=dtype)
    x = torch.cat([randn(6, 32, seed=2), torch.full((1, 32), 1 + 2**-8), torch.full((1, 32), 1 + 3 * 2**-8)])
    result = products.linear(x, ops.pack(weight), torch.empty(8, 40))
    assert error(result, x.to(dtype).double() @ weight.double().T) < EXACT


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("inputs", [16, 48, 336])
def test_rms_norm(inputs: int, scale: float) -> None:
    """An identity matrix lets the norm through."""
    x, norm = scale * randn(5, inputs, seed=1), 1 + 0.3 * randn(inputs, seed=2)
    wide = x.double()
    wanted = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * norm
    result = ops.norm_linear(x, norm, EPS, ops.pack(torch.eye(inputs)))
    assert ((result - wanted).abs() <= 1e-6 * wanted.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_company(dtype: torch.dtype) -> None:
    """A token alone, in every tile width, and in a product of several tiles."""
    x, norm, residual = randn(WIDEST, 192, seed=1), 1 + 0.3 * randn(192, seed=2), randn(WIDEST, 259, seed=3)
    plain, gated = (
        ops.pack(randn(259, 192, seed=4, dtype=dtype)),
        ops.pack(randn(96, 192, seed=5, dtype=dtype), swiglu=True),
    )

    def run(first: int, last: int) -> list[Tensor]:
        rows, added = x[first:last].contiguous(), residual[first:last].clone()
        ops.add_linear(added, rows.to(dtype), plain)
        return [ops.norm_linear(rows, norm, EPS, plain), ops.norm_swiglu(rows, norm, EPS, gated), added]

    whole = run(0, WIDEST)
    for width in range(1, WIDEST):
        for part, full in zip(run(1, 1 + width), whole, strict=True):
            assert torch.equal(part, full[1 : 1 + width]), width


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [1, 33, 259])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, outputs: int) -> None:
    x, norm, weight = randn(5, 192, seed=1), 1 + 0.3 * randn(192, seed=2), ops.pack(randn(outputs, 192, dtype=dtype))
    two = ops.norm_linear(x, norm, EPS, weight)
    torch.set_num_threads(1)
    assert torch.equal(two, ops.norm_linear(x, norm, EPS, weight))


@pytest.mark.parametrize(
    ("weight", "swiglu", "message"),
    [
        (torch.zeros(32, 16, dtype=torch.float16), False, "bfloat16 or float32, got torch.float16"),
        (torch.zeros(32, 15, dtype=torch.bfloat16), False, "an even number of inputs, got 15"),
        (torch.zeros(40, 16), True, "a multiple of 16, got 20"),
    ],
)
def test_pack_refuses(weight: Tensor, swiglu: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.pack(weight, swiglu=swiglu)


# ---- vectors ---------------------------------------------------------------------------------------------------------


@njit
def exp_all(x, out, vectors):  # type: ignore[no-untyped-def]
    for i in range(vectors):
        simd.store_f32(out + 64 * i, simd.exp(simd.load_f32(x + 64 * i)))


def compiled_exp(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    exp_all(x.data_ptr(), out.data_ptr(), x.numel() // 16)
    return out


def test_exp() -> None:
    """Relative error below 2e-7 over the whole range, and clamped outside of it."""
    x = torch.linspace(-87, 88, 1 << 18)
    wanted = x.double().exp()
    assert float(((compiled_exp(x).double() - wanted) / wanted).abs().max()) < 2e-7
    ends = torch.tensor([0.0, -torch.inf, torch.inf, -200.0, 200.0, -0.0] + [1.0] * 10)
    limits = torch.tensor(
        [1.0, np.exp(-87.0), np.exp(88.0), np.exp(-87.0), np.exp(88.0), 1.0] + [np.e] * 10, dtype=torch.float32
    )
    assert torch.allclose(compiled_exp(ends), limits, rtol=3e-7, atol=0)


def tile_driver(tokens: int, kind: str) -> Any:
    tile = tiles.make_tile(tokens, kind)

    @njit
    def run(panel, x, x_stride, steps, out):  # type: ignore[no-untyped-def]
        tile(panel, x, x_stride, steps, out, 128)

    return run


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_both_bf16_tiles(tokens: int) -> None:
    """Pair products of the processor and plain multiply-adds: each is near f64, so they are near one another."""
    weight, x = randn(32, 400, seed=1, dtype=torch.bfloat16), randn(tokens, 400, seed=2, dtype=torch.bfloat16)
    data = ops.pack(weight).data
    wanted = x.double() @ weight.double().T
    for kind in ["bf16_fma", "bf16_dot"] if simd.has_bf16_dot() else ["bf16_fma"]:
        out = torch.empty(tokens, 32)
        tile_driver(tokens, kind)(data.data_ptr(), x.data_ptr(), 2 * 400, 200, out.data_ptr())
        assert error(out, wanted) < EXACT, kind
