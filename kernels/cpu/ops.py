"""The runtime's operations on the CPU: same names and meaning as `kernels/reference.py`, compiled, with packed weights."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.cpu import linear as products
from specdec.kernels.cpu.attention import attention as _attention
from specdec.kernels.cpu.linear import PackedLinear, linear
from specdec.types import ModelInputs


def pack(weight: Tensor, swiglu: bool = False) -> PackedLinear:
    """Weights [N, K] as the products below take them; `swiglu` for the rows [gate; up]."""
    return products.pack(weight, swiglu)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: PackedLinear) -> Tensor:
    """RMSNorm, then a product: f32 [M, K] -> f32 [M, N]."""
    return linear(x, weight, torch.empty(x.shape[0], weight.outputs), products.STORE, norm, eps)


def norm_swiglu(x: Tensor, norm: Tensor, eps: float, weight: PackedLinear) -> Tensor:
    """RMSNorm, gate and up products, silu(gate) * up: f32 [M, K] -> weight dtype [M, N/2]."""
    return linear(x, weight, torch.empty(x.shape[0], weight.outputs // 2, dtype=weight.dtype), products.SWIGLU, norm, eps)


def add_linear(residual: Tensor, x: Tensor, weight: PackedLinear) -> None:
    """residual f32 [M, N] += x [M, K] @ weight.T, in place."""
    linear(x, weight, residual, products.ADD)


def attention(
    qkv: Tensor, keys: Tensor, values: Tensor, inputs: ModelInputs, cos: Tensor, sin: Tensor, rope: bool
) -> Tensor:
    """Rotary embedding, KV append and attention. qkv f32 [M, (H+2G)*E], cache [B, G, S, E] -> [M, H*E], cache dtype."""
    _, groups, _, size = keys.shape
    out = torch.empty(qkv.shape[0], qkv.shape[1] - 2 * groups * size, dtype=keys.dtype)
    return _attention(qkv, keys, values, inputs, cos, sin, rope, out)
