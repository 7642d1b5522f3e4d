"""The runtime's operations in plain torch: what every kernel must compute, on any device.

M = B * T tokens, K inputs, N outputs, H query heads, G KV heads, E head size, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.types import ModelInputs

KEY_BLOCK = 1  # slots that a block of the key cache holds: plain rows


def pack(weight: Tensor, swiglu: bool = False) -> Tensor:
    """Weights [N, K] as the products below take them."""
    return weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in f32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
    """RMSNorm, then a product: f32 [M, K] -> f32 [M, N]."""
    return F.linear(rms_norm(x, norm, eps).to(weight.dtype), weight).float()


def norm_swiglu(x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
    """RMSNorm, gate and up products (weight rows [gate; up]), silu(gate) * up: f32 [M, K] -> weight dtype [M, N/2]."""
    gate, up = F.linear(rms_norm(x, norm, eps).to(weight.dtype), weight).float().chunk(2, -1)
    return (F.silu(gate) * up).to(weight.dtype)


def add_linear(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    """residual f32 [M, N] += x [M, K] @ weight.T, in place."""
    residual += F.linear(x, weight).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of pairs (i, i + E/2). x [B, T, heads, E], cos and sin [B, T, E/2]."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def visible(inputs: ModelInputs, slots: int) -> Tensor:
    """Which cache slots each token sees: bool [B, T, S]."""
    batch, tokens = inputs.tokens.shape
    slot = torch.arange(slots, device=inputs.tokens.device)
    prefix = inputs.prefix_lens.view(batch, 1, 1)
    if inputs.paths is None:
        last = inputs.offset + torch.arange(tokens, device=slot.device).view(1, tokens, 1)
        return slot <= prefix + last
    mask = (slot < prefix).repeat(1, tokens, 1)
    behind = torch.where(inputs.paths >= 0, inputs.paths + prefix, slots).long()
    return F.pad(mask, (0, 1)).scatter_(2, behind, True)[..., :slots]


def attention(
    qkv: Tensor, keys: Tensor, values: Tensor, inputs: ModelInputs, cos: Tensor, sin: Tensor, rope: bool
) -> Tensor:
    """Rotary embedding, KV append and attention. qkv f32 [M, (H+2G)*E], cache [B, G, S, E] -> [M, H*E], cache dtype.

    cos, sin f32 [positions, E/2]; the slots are those of `ModelInputs`.
    """
    batch, tokens = inputs.tokens.shape
    _, groups, slots, size = keys.shape
    heads = qkv.shape[1] // size - 2 * groups
    q, k, v = torch.split(qkv.view(batch, tokens, -1, size), [heads, groups, groups], 2)
    if rope:
        angles = cos[inputs.positions.long()], sin[inputs.positions.long()]
        q, k = rotate(q, *angles), rotate(k, *angles)
    here = (inputs.prefix_lens[:, None] + inputs.offset + torch.arange(tokens, device=qkv.device)).long()
    index = here[:, None, :, None].expand(batch, groups, tokens, size)
    keys.scatter_(2, index, k.transpose(1, 2).to(keys.dtype))
    values.scatter_(2, index, v.transpose(1, 2).to(values.dtype))
    mask = visible(inputs, slots)[:, None]
    shape = (batch, groups, heads // groups, slots, size)
    all_keys, all_values = (c.float()[:, :, None].expand(shape).flatten(1, 2) for c in (keys, values))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), all_keys, all_values.nan_to_num(), attn_mask=mask)
    return out.transpose(1, 2).reshape(batch * tokens, heads * size).to(keys.dtype)


class Replay:
    """Runs a stretch of operations on the residual stream in place; backends that can, record it and play it back."""

    def __call__(
        self, key: Hashable, stretch: Callable[[Tensor, ModelInputs], None], x: Tensor, inputs: ModelInputs
    ) -> Tensor:
        """Apply `stretch` to x f32 [M, K] and return the stream."""
        stretch(x, inputs)
        return x
