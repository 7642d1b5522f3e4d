"""The runtime's operations on the CPU: same names and meaning as `kernels/reference.py`, compiled, with packed weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.cpu import linear as products
from specdec.kernels.cpu.append import KEY_BLOCK
from specdec.kernels.cpu.attention import attention as _attention
from specdec.kernels.cpu.linear import PackedLinear, linear
from specdec.kernels.cpu.parallel import Program, record
from specdec.kernels.reference import AttentionRule, Result, embed, flush
from specdec.types import ModelInputs

__all__ = ["KEY_BLOCK", "Replay", "add_linear", "attention", "embed", "flush", "norm_linear", "norm_swiglu", "pack"]

REPLAYED = 64  # tokens; above, launching costs nothing beside the work


def pack(weight: Tensor, swiglu: bool = False) -> PackedLinear:
    """Weights [N, K] as the products below take them; `swiglu` for the rows [gate; up]."""
    return products.pack(weight, swiglu)


def pack_heads(weight: Tensor, size: int) -> PackedLinear:
    """Weights [heads * size, K] of queries, keys and values."""
    return products.pack(weight, False)


def norm_linear(x: Tensor, norm: Tensor | None, eps: float, weight: PackedLinear) -> Tensor:
    """RMSNorm, then a product: f32 [M, K] -> f32 [M, N]. x and norm as the reference's `normed` takes them."""
    return linear(x, weight, torch.empty(x.shape[-2], weight.outputs), products.STORE, norm, eps)


def norm_swiglu(x: Tensor, norm: Tensor, eps: float, weight: PackedLinear, into: PackedLinear | None = None) -> Tensor:
    """RMSNorm, gate and up products, silu(gate) * up: f32 [M, K] -> weight dtype [M, N/2]."""
    out = torch.empty(x.shape[0], weight.outputs // 2, dtype=weight.dtype)
    return linear(x, weight, out, products.SWIGLU, norm, eps)


def add_linear(residual: Tensor, x: Tensor, weight: PackedLinear, norm: Tensor | None = None) -> None:
    """residual f32 [M, N] += x [M, K] @ weight.T, in place."""
    linear(x, weight, residual, products.ADD)


def attention(
    qkv: Tensor, keys: Tensor, values: Tensor, inputs: ModelInputs, cos: Tensor, sin: Tensor, rule: AttentionRule
) -> Tensor:
    """Rotary embedding, KV append and attention. qkv f32 [M, (H+2G)*E] -> [M, H*E] in the cache's dtype.

    keys [B, G, S/16, E, 16], values [B, G, S, E].
    """
    assert rule.plain, "the compiled attention knows no norm, chunk or temperature"
    _, groups, _, size = values.shape
    out = torch.empty(qkv.shape[0], qkv.shape[1] - 2 * groups * size, dtype=keys.dtype)
    return _attention(qkv, keys, values, inputs, cos, sin, rule.rope, out)


def norm_attention(
    x: Tensor, norm: Tensor | None, eps: float, weight: PackedLinear, keys: Tensor, values: Tensor, inputs: ModelInputs,
    cos: Tensor, sin: Tensor, rule: AttentionRule, into: PackedLinear | None = None,
) -> Tensor:  # fmt: skip
    """RMSNorm (as in `norm_linear`), the QKV product and what `attention` does: f32 [M, K] -> compute dtype [M, H*E].

    into: as in `norm_swiglu`.
    """
    return attention(norm_linear(x, norm, eps, weight), keys, values, inputs, cos, sin, rule)


class Replay:
    """Runs a stretch of launches; from the second time on as one program, the CPU's likeness of a CUDA graph.

    The stretch may do nothing but the operations above, and may depend on its inputs' shapes only.
    """

    def __init__(self, capacity: int = 64) -> None:
        self._programs: OrderedDict[Hashable, tuple[Program, Tensor, ModelInputs, Any]] = OrderedDict()
        self._capacity = capacity

    def __call__(
        self, key: Hashable, stretch: Callable[[Tensor, ModelInputs], Result], x: Tensor, inputs: ModelInputs
    ) -> Result:
        """What `stretch` makes of x f32 [M, K], mostly in place; the next call may overwrite it.

        key: everything the launches depend on besides the shapes of x and inputs.
        """
        if x.shape[0] > REPLAYED:
            return stretch(x, inputs)
        paths = None if inputs.paths is None else inputs.paths.shape
        full = (key, inputs.tokens.shape, paths, inputs.offset, torch.get_num_threads())
        found: tuple[Program, Tensor, ModelInputs, Result] | None = self._programs.get(full)
        if found is None:
            found = self._record(stretch, x, inputs)
            self._programs[full] = found
            if len(self._programs) > self._capacity:
                self._programs.popitem(last=False)
        program, stream, static, result = found
        stream.copy_(x)
        static.positions.copy_(inputs.positions)
        static.prefix_lens.copy_(inputs.prefix_lens)
        if static.paths is not None and inputs.paths is not None:
            static.paths.copy_(inputs.paths)
        program.run()
        return result

    @torch.inference_mode(False)  # plain buffers, which calls inside and outside that mode may fill
    def _record(
        self, stretch: Callable[[Tensor, ModelInputs], Result], x: Tensor, inputs: ModelInputs
    ) -> tuple[Program, Tensor, ModelInputs, Result]:
        stream = torch.empty(x.shape)
        shape = inputs.tokens.shape
        paths = None if inputs.paths is None else torch.empty(inputs.paths.shape, dtype=torch.int32)
        static = ModelInputs(
            inputs.tokens,
            torch.empty(shape, dtype=torch.int32),
            torch.empty(shape[0], dtype=torch.int32),
            paths,
            inputs.offset,
        )
        with record() as program:
            result = stretch(stream, static)
        return program, stream, static, result
