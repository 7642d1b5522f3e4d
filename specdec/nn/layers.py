"""One decoder layer: a few operations, on whatever backend the model was packed for.

M = B * T tokens. The residual stream is f32 [M, hidden]; products take inputs rounded to the compute dtype (and on to FP8 where
the weights are) and sum in f32. Under tensor parallelism the stream is whole on every rank, the weights are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels.reference import Experts, Fp8Weight, Weight, stack
from specdec.nn.config import ModelConfig
from specdec.nn.parallel import Shard
from specdec.types import ModelInputs


def weight(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter that must be loaded: NaN until then."""
    return nn.Parameter(torch.full(shape, torch.nan, dtype=dtype), requires_grad=False)


class Linears:
    """Makes the linear layers of one model: their dtype, whether they are in FP8, and which part of each is this rank's."""

    def __init__(self, dtype: torch.dtype, quantized: bool = False, shard: Shard | None = None) -> None:
        self.dtype, self.quantized, self.shard = dtype, quantized, shard or Shard()

    def rows(self, *shape: int) -> Projection:
        """Weight [..., N, K] whose outputs are split over the ranks."""
        return self._make(shape, len(shape) - 2)

    def columns(self, *shape: int) -> Projection:
        """Weight [..., N, K] whose inputs are split over the ranks, so that their results must be summed."""
        return self._make(shape, len(shape) - 1)

    def _make(self, shape: Sequence[int], split: int) -> Projection:
        mine = [size // self.shard.world if dim == split else size for dim, size in enumerate(shape)]
        return Projection(mine, self.dtype, self.quantized, split)


class Projection(nn.Module):
    """Holds one weight [..., N, K] under its checkpoint name, in FP8 with a scale a row and one for the inputs.

    `shard_dim` on a parameter is the dimension split over ranks; without it the parameter is whole on each.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, quantized: bool = False, shard_dim: int | None = None
    ) -> None:
        super().__init__()
        self.weight = weight(*shape, dtype=torch.float8_e4m3fn if quantized else dtype)
        split = [self.weight]
        if quantized:
            self.weight_scale = weight(*shape[:-1], dtype=torch.float32)
            self.input_scale = nn.Parameter(torch.zeros(()), requires_grad=False)  # 0 = a scale for every token
            if shard_dim != len(shape) - 1:
                split.append(self.weight_scale)
        if shard_dim is not None:
            for parameter in split:
                parameter.shard_dim = shard_dim  # type: ignore[attr-defined]

    def value(self) -> Weight:
        """The weight as the operations take it."""
        if self.weight.dtype != torch.float8_e4m3fn:
            return self.weight.data
        dynamic = float(self.input_scale) == 0
        return Fp8Weight(self.weight.data, self.weight_scale.data, None if dynamic else self.input_scale.data)


class Norm(nn.Module):
    """Holds one RMSNorm weight [K], f32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = weight(size, dtype=torch.float32)


class Attention(nn.Module):
    """Grouped-query attention (2305.13245); in Qwen3 with a norm over each head of q and k."""

    def __init__(self, config: ModelConfig, linears: Linears) -> None:
        super().__init__()
        size, hidden = config.head_dim, config.hidden_size
        self.q_proj = linears.rows(config.num_heads * size, hidden)
        self.k_proj = linears.rows(config.num_kv_heads * size, hidden)
        self.v_proj = linears.rows(config.num_kv_heads * size, hidden)
        self.o_proj = linears.columns(hidden, config.num_heads * size)
        if config.qk_norm == "weighted":
            self.q_norm, self.k_norm = Norm(size), Norm(size)


class MLP(nn.Module):
    """SwiGLU feed-forward (2002.05202); with leading sizes, one for each expert."""

    def __init__(self, hidden: int, inner: int, linears: Linears, *outer: int) -> None:
        super().__init__()
        self.gate_proj = linears.rows(*outer, inner, hidden)
        self.up_proj = linears.rows(*outer, inner, hidden)
        self.down_proj = linears.columns(*outer, hidden, inner)

    def values(self, ops: Any) -> tuple[Any, Any]:
        """Packed [gate; up] and down."""
        gate_up = stack([self.gate_proj.value(), self.up_proj.value()])
        return ops.pack(gate_up, swiglu=True), ops.pack(self.down_proj.value())


class MoE(nn.Module):
    """Llama 4's mixture: one routed expert a token beside one that all share. The router stays in the compute dtype."""

    def __init__(self, config: ModelConfig, linears: Linears) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.router = Projection((config.num_experts, hidden), linears.dtype)
        self.shared_expert = MLP(hidden, inner, linears)
        self.experts = MLP(hidden, inner, linears, config.num_experts)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward around a residual stream."""

    def __init__(self, config: ModelConfig, index: int, linears: Linears) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.rule = config.attention_rule(index)
        self.head_dim = config.head_dim
        self.pair_size = config.head_dim if config.interleaved_rope and self.rule.rope else 0
        self.input_layernorm = Norm(config.hidden_size)
        self.self_attn = Attention(config, linears)
        self.post_attention_layernorm = Norm(config.hidden_size)
        dense = None if config.is_moe(index) else MLP(config.hidden_size, config.mlp_size, linears)
        if config.model_type == "llama4_text":
            self.feed_forward: MLP | MoE = dense or MoE(config, linears)
        else:
            assert dense is not None, "only Llama 4 has experts"
            self.mlp = dense

    def pack(self, ops: Any) -> None:
        """Fuse q, k, v and gate, up, hand the weights to the backend's format, and let the originals go."""
        self.ops = ops
        self.norms = self.input_layernorm.weight.data, self.post_attention_layernorm.weight.data
        self.next_norm: Tensor | None = None  # of the layer behind, if there is one
        attn = self.self_attn
        q, k = (pair_halves(projection.value(), self.pair_size) for projection in (attn.q_proj, attn.k_proj))
        self.qkv = ops.pack_heads(stack([q, k, attn.v_proj.value()]), self.head_dim)
        self.o = ops.pack(attn.o_proj.value())
        if hasattr(attn, "q_norm"):
            self.rule = replace(self.rule, q_norm=attn.q_norm.weight.data, k_norm=attn.k_norm.weight.data)
        del self.self_attn
        name = "mlp" if hasattr(self, "mlp") else "feed_forward"
        block = getattr(self, name)
        self.experts: Experts | None = None
        if isinstance(block, MoE):
            routed, shared = block.experts.values(ops), block.shared_expert.values(ops)
            self.experts = ops.pack_experts(Experts(block.router.weight.data, *routed, *shared))
        else:
            self.gate_up, self.down = block.values(ops)
        delattr(self, name)

    def forward(self, x: Tensor, inputs: ModelInputs, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Advance the residual stream x f32 [M, hidden] in place, and write this forward's K/V."""
        ops = self.ops
        cache = keys, values, inputs, cos, sin, self.rule
        heads = ops.norm_attention(x, self.norms[0], self.eps, self.qkv, *cache, into=self.o)
        ops.add_linear(x, heads, self.o, self.norms[1])
        if self.experts is None:
            inner = ops.norm_swiglu(x, self.norms[1], self.eps, self.gate_up, into=self.down)
            ops.add_linear(x, inner, self.down, self.next_norm)
        else:
            ops.add_moe(x, self.norms[1], self.eps, self.experts)


def pair_halves(weight: Weight, size: int) -> Weight:
    """Rows of heads of `size` channels, from rotary pairs (2i, 2i + 1) to pairs (i, i + size / 2). 0 = as they are.

    Scores are sums over channels of q and k, so reordering both changes none.
    """
    if size == 0:
        return weight
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(_halve(weight.data, size), _halve(weight.scale, size), weight.input_scale)
    return _halve(weight, size)


def _halve(rows: Tensor, size: int) -> Tensor:
    return rows.view(-1, size // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
