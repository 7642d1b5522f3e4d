"""One decoder layer: five operations, on whatever backend the model was packed for.

M = B * T tokens. The residual stream is f32 [M, hidden]; products take inputs rounded to the weights' dtype and sum in f32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specdec.nn.config import ModelConfig
from specdec.types import ModelInputs


def weight(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter that must be loaded: NaN until then."""
    return nn.Parameter(torch.full(shape, torch.nan, dtype=dtype), requires_grad=False)


class Projection(nn.Module):
    """Holds one weight [N, K] under its checkpoint name."""

    def __init__(self, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight(outputs, inputs, dtype=dtype)


class Norm(nn.Module):
    """Holds one RMSNorm weight [K], f32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = weight(size, dtype=torch.float32)


class Attention(nn.Module):
    """Grouped-query attention. Qwen3 would norm q and k here; Llama 4 would skip RoPE, scale q, and cut the context."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        size, hidden = config.head_dim, config.hidden_size
        self.q_proj = Projection(config.num_heads * size, hidden, dtype)
        self.k_proj = Projection(config.num_kv_heads * size, hidden, dtype)
        self.v_proj = Projection(config.num_kv_heads * size, hidden, dtype)
        self.o_proj = Projection(hidden, config.num_heads * size, dtype)
        self.rope = True


class MLP(nn.Module):
    """SwiGLU feed-forward (2002.05202). Llama 4 puts a mixture of experts in its place in every second layer."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Projection(config.intermediate_size, config.hidden_size, dtype)
        self.up_proj = Projection(config.intermediate_size, config.hidden_size, dtype)
        self.down_proj = Projection(config.hidden_size, config.intermediate_size, dtype)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward around a residual stream."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = Norm(config.hidden_size)
        self.self_attn = Attention(config, dtype)
        self.post_attention_layernorm = Norm(config.hidden_size)
        self.mlp = MLP(config, dtype)

    def pack(self, ops: Any) -> None:
        """Fuse q, k, v and gate, up, hand the weights to the backend's format, and let the originals go."""
        attn, mlp = self.self_attn, self.mlp
        self.ops = ops
        self.norms = self.input_layernorm.weight.data, self.post_attention_layernorm.weight.data
        self.qkv = ops.pack(torch.cat([attn.q_proj.weight.data, attn.k_proj.weight.data, attn.v_proj.weight.data]))
        self.o = ops.pack(attn.o_proj.weight.data)
        self.gate_up = ops.pack(torch.cat([mlp.gate_proj.weight.data, mlp.up_proj.weight.data]), swiglu=True)
        self.down = ops.pack(mlp.down_proj.weight.data)
        self.rope = attn.rope
        del self.self_attn, self.mlp

    def forward(self, x: Tensor, inputs: ModelInputs, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Advance the residual stream x f32 [M, hidden] in place, and write this forward's K/V."""
        ops = self.ops
        qkv = ops.norm_linear(x, self.norms[0], self.eps, self.qkv)
        ops.add_linear(x, ops.attention(qkv, keys, values, inputs, cos, sin, self.rope), self.o)
        ops.add_linear(x, ops.norm_swiglu(x, self.norms[1], self.eps, self.gate_up), self.down)
