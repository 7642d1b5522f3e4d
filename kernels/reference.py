"""The runtime's operations in plain torch: what every kernel must compute, on any device.

M = B * T tokens, K inputs, N outputs, H query heads, G KV heads, E head size, S slots, X experts, I channels of an expert.
Activations between operations are in the compute dtype: that of the weights, bfloat16 where these are FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.types import ModelInputs

KEY_BLOCK = 1  # slots that a block of the key cache holds: plain rows
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_MIN_SCALE = 2.0**-100  # a token of zeros has a scale too
_EXPERT_ELEMENTS = 1 << 24  # of expert weights gathered in one go


@dataclass(slots=True, eq=False)
class Fp8Weight:
    """A weight in FP8: value = data * scale, with a scale a row, so that fused matrices keep each its own."""

    data: Tensor  # e4m3 [..., N, K]
    scale: Tensor  # f32 [..., N]
    input_scale: Tensor | None = None  # f32 []  of the activations it meets; None: every token its own


Weight = Tensor | Fp8Weight
Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class Experts:
    """Weights of a mixture that gives every token one routed expert and the shared one (Llama 4)."""

    router: Tensor  # [X, H]  compute dtype
    gate_up: Weight  # [X, 2I, H]
    down: Weight  # [X, H, I]
    shared_gate_up: Weight  # [2I, H]
    shared_down: Weight  # [H, I]
    forced: Tensor | None = None  # int32 [at least M]: each token's expert, for measurements; None: argmax


@dataclass(frozen=True, slots=True, eq=False)
class AttentionRule:
    """What a family does to q, k and the context of one layer."""

    rope: bool = True
    q_norm: Tensor | None = None  # f32 [E]  RMSNorm of each head before RoPE (Qwen3)
    k_norm: Tensor | None = None
    unit_norm: bool = False  # RMSNorm of q and k without weight, after RoPE and only with it (Llama 4 Scout)
    eps: float = 1e-6  # of these norms
    chunk: int = 0  # position p sees positions from p // chunk * chunk on; 0 = all
    temperature_scale: float = 0.0  # q *= 1 + scale * log(1 + floor((p + 1) / floor))  (2501.19399)
    temperature_floor: int = 8192

    @property
    def plain(self) -> bool:
        """Nothing but RoPE, or not even that."""
        return self.q_norm is None and not self.unit_norm and self.chunk == 0 and self.temperature_scale == 0


def pack(weight: Weight, swiglu: bool = False) -> Weight:
    """Weights [..., N, K] as the products below take them; `swiglu` for the rows [gate; up]."""
    return weight


def pack_heads(weight: Weight, size: int) -> Weight:
    """Weights [heads * size, K] of queries, keys and values as `norm_attention` takes them."""
    return weight


def pack_experts(experts: Experts) -> Experts:
    """A mixture of packed weights as `add_moe` takes it."""
    return experts


def stack(parts: Sequence[Weight]) -> Weight:
    """Weights that share their input, one above the other: [..., N1 + N2 + ..., K]. Static input scales: the largest."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if tensors:
        assert len(tensors) == len(parts), "all in FP8 or none"
        return torch.cat(tensors, -2)
    quantized = [part for part in parts if isinstance(part, Fp8Weight)]
    scales = [part.input_scale for part in quantized if part.input_scale is not None]
    assert len(scales) in (0, len(parts)), "input scales for all parts or for none"
    largest = torch.stack(scales).amax() if scales else None
    return Fp8Weight(torch.cat([p.data for p in quantized], -2), torch.cat([p.scale for p in quantized], -1), largest)


def compute_dtype(weight: Weight) -> torch.dtype:
    """Dtype of the activations around a weight."""
    return weight.dtype if isinstance(weight, Tensor) else torch.bfloat16


def quantize(x: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [..., M, K] -> e4m3 [..., M, K] and its scale f32 [..., M]: input_scale, else absmax / 448 of each token.

    Rounds to nearest even; beyond 448 it saturates.
    """
    x = x.float()
    if input_scale is None:
        scale = (x.abs().amax(-1) / FP8_MAX).clamp(min=_MIN_SCALE)
    else:
        scale = input_scale.expand(x.shape[:-1])
    return (x * (1.0 / scale)[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x @ weight.T: compute dtype [M, K] -> f32 [M, N]. FP8: exact products summed in f32, then both scales."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight).float()
    rows, scale = quantize(x, weight.input_scale)
    return F.linear(rows.float(), weight.data.float()) * scale[:, None] * weight.scale


def rms_norm(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in f32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def normed(x: Tensor, norm: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """What a product behind a norm takes: [M, K] in `dtype`.

    norm f32 [K]: RMSNorm of x f32 [M, K]; None: x as it is. Where P streams meet, x f32 [P, M, K/P] and norm f32 [P, K/P]:
    each normalised by itself, then side by side.
    """
    if norm is None:
        return x.to(dtype)
    if norm.dim() == 1:
        return rms_norm(x, norm, eps).to(dtype)
    return rms_norm(x, norm[:, None], eps).to(dtype).transpose(0, 1).flatten(1)


def norm_linear(x: Tensor, norm: Tensor | None, eps: float, weight: Weight) -> Tensor:
    """RMSNorm, then a product: f32 [M, K] -> f32 [M, N]. x and norm as `normed` takes them; without a norm x may be rounded."""
    return linear(normed(x, norm, eps, compute_dtype(weight)), weight)


def norm_swiglu(x: Tensor, norm: Tensor, eps: float, weight: Weight, into: Weight | None = None) -> Tensor:
    """RMSNorm, gate and up products (weight rows [gate; up]), silu(gate) * up: f32 [M, K] -> [M, N/2] for `into`."""
    dtype = compute_dtype(weight)
    return _swiglu(linear(rms_norm(x, norm, eps).to(dtype), weight)).to(dtype)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def embed(tokens: Tensor, table: Tensor, norm: Tensor) -> Tensor:
    """Rows of the table [V, K] as the stream f32 [M, K]; tokens int64 [M]. norm: what the stream meets first."""
    return table[tokens].float()


def flush(x: Tensor) -> None:
    """Finish sums that a backend has put off; here there are none."""


def add_linear(residual: Tensor, x: Tensor, weight: Weight, norm: Tensor | None = None) -> None:
    """residual f32 [M, N] += x [M, K] @ weight.T, in place."""
    residual += linear(x, weight)


def add_moe(x: Tensor, norm: Tensor, eps: float, experts: Experts) -> None:
    """x f32 [M, H] += the mixture of RMSNorm(x), in place."""
    x += moe(x, norm, eps, experts)


def moe(x: Tensor, norm: Tensor, eps: float, experts: Experts) -> Tensor:
    """RMSNorm, the expert of the largest logit (of equals the first) and the shared one: f32 [M, H] -> f32 [M, H].

    Llama 4 multiplies the expert's input by s = sigmoid(logit); here s multiplies the products, which is the same in
    algebra, and quantisation does not see it.
    """
    dtype = experts.router.dtype
    h = rms_norm(x, norm, eps).to(dtype)
    logits = F.linear(h.float(), experts.router.float())
    chosen = logits.argmax(-1) if experts.forced is None else experts.forced[: x.shape[0]].long()
    score = logits.gather(1, chosen[:, None]).sigmoid()
    out = linear(_swiglu(linear(h, experts.shared_gate_up)).to(dtype), experts.shared_down)
    inner = _swiglu(score * _expert_linear(h, experts.gate_up, chosen)).to(dtype)
    return out + _expert_linear(inner, experts.down, chosen)


def _expert_linear(x: Tensor, weight: Weight, chosen: Tensor) -> Tensor:
    """Each token by its own expert's weight: x [M, K], weight [X, N, K], chosen int64 [M] -> f32 [M, N]."""
    data = weight if isinstance(weight, Tensor) else weight.data
    count = max(1, _EXPERT_ELEMENTS // data[0].numel())
    if isinstance(weight, Tensor):
        rows, scale = x, None
    else:
        rows, row_scale = quantize(x, weight.input_scale)
        scale = row_scale[:, None] * weight.scale[chosen]
    pairs = zip(torch.split(rows, count), torch.split(chosen, count), strict=True)
    out = torch.cat([(data[ids].float() @ part.float()[:, :, None]).squeeze(-1) for part, ids in pairs])
    return out if scale is None else out * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of pairs (i, i + E/2). x [B, T, heads, E], cos and sin [B, T, E/2]."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def visible(inputs: ModelInputs, slots: int, chunk: int = 0) -> Tensor:
    """Which cache slots each token sees: bool [B, T, S]. A chunk counts positions, which a path's slots do not tell."""
    batch, tokens = inputs.tokens.shape
    slot = torch.arange(slots, device=inputs.tokens.device)
    prefix = inputs.prefix_lens.view(batch, 1, 1)
    begin = (inputs.positions - inputs.positions % chunk if chunk else torch.zeros_like(inputs.positions))[..., None]
    if inputs.paths is None:
        last = inputs.offset + torch.arange(tokens, device=slot.device).view(1, tokens, 1)
        return (slot >= begin) & (slot <= prefix + last)
    mask = (slot >= begin) & (slot < prefix)
    depth = torch.arange(inputs.paths.shape[2], device=slot.device)
    behind = torch.where((inputs.paths >= 0) & (prefix + depth >= begin), inputs.paths + prefix, slots).long()
    return F.pad(mask, (0, 1)).scatter_(2, behind, True)[..., :slots]


def attention(
    qkv: Tensor, keys: Tensor, values: Tensor, inputs: ModelInputs, cos: Tensor, sin: Tensor, rule: AttentionRule
) -> Tensor:
    """Rotary embedding, KV append and attention. qkv f32 [M, (H+2G)*E], cache [B, G, S, E] -> [M, H*E], cache dtype.

    cos, sin f32 [positions, E/2]; the slots are those of `ModelInputs`. Keys are kept as they are compared: rotated and normed.
    """
    batch, tokens = inputs.tokens.shape
    _, groups, slots, size = keys.shape
    heads = qkv.shape[1] // size - 2 * groups
    q, k, v = torch.split(qkv.view(batch, tokens, -1, size), [heads, groups, groups], 2)
    if rule.q_norm is not None and rule.k_norm is not None:
        q, k = rms_norm(q, rule.q_norm, rule.eps), rms_norm(k, rule.k_norm, rule.eps)
    if rule.rope:
        angles = cos[inputs.positions.long()], sin[inputs.positions.long()]
        q, k = rotate(q, *angles), rotate(k, *angles)
        if rule.unit_norm:
            q, k = rms_norm(q, 1.0, rule.eps), rms_norm(k, 1.0, rule.eps)
    if rule.temperature_scale:
        steps = torch.floor((inputs.positions + 1) / rule.temperature_floor)
        q = q * (1 + rule.temperature_scale * torch.log1p(steps))[:, :, None, None]
    here = (inputs.prefix_lens[:, None] + inputs.offset + torch.arange(tokens, device=qkv.device)).long()
    index = here[:, None, :, None].expand(batch, groups, tokens, size)
    keys.scatter_(2, index, k.transpose(1, 2).to(keys.dtype))
    values.scatter_(2, index, v.transpose(1, 2).to(values.dtype))
    mask = visible(inputs, slots, rule.chunk)[:, None]
    shape = (batch, groups, heads // groups, slots, size)
    all_keys, all_values = (c.float()[:, :, None].expand(shape).flatten(1, 2) for c in (keys, values))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), all_keys, all_values.nan_to_num(), attn_mask=mask)
    return out.transpose(1, 2).reshape(batch * tokens, heads * size).to(keys.dtype)


def norm_attention(
    x: Tensor, norm: Tensor | None, eps: float, weight: Weight, keys: Tensor, values: Tensor, inputs: ModelInputs,
    cos: Tensor, sin: Tensor, rule: AttentionRule, into: Weight | None = None,
) -> Tensor:  # fmt: skip
    """RMSNorm (as in `norm_linear`), the QKV product and what `attention` does: f32 [M, K] -> compute dtype [M, H*E]."""
    return attention(norm_linear(x, norm, eps, weight), keys, values, inputs, cos, sin, rule)


class Replay:
    """Runs a stretch of operations; backends that can, record it and play it back."""

    def __call__(
        self, key: Hashable, stretch: Callable[[Tensor, ModelInputs], Result], x: Tensor, inputs: ModelInputs
    ) -> Result:
        """What `stretch` makes of x f32 [M, K], mostly in place."""
        return stretch(x, inputs)


class Parallel:
    """The same operations for one rank of several: what products over split inputs give is summed over the ranks."""

    KEY_BLOCK = KEY_BLOCK
    Replay = Replay
    embed, flush = staticmethod(embed), staticmethod(flush)
    pack, pack_heads, pack_experts = staticmethod(pack), staticmethod(pack_heads), staticmethod(pack_experts)
    norm_linear, norm_swiglu = staticmethod(norm_linear), staticmethod(norm_swiglu)
    norm_attention = staticmethod(norm_attention)

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """reduce: a partial sum f32 [M, N] -> the sum over all ranks, with the same bits on each."""
        self.reduce = reduce

    def add_linear(self, residual: Tensor, x: Tensor, weight: Weight, norm: Tensor | None = None) -> None:
        """residual f32 [M, N] += the sum of x [M, K] @ weight.T, in place."""
        residual += self.reduce(linear(x, weight))

    def add_moe(self, x: Tensor, norm: Tensor, eps: float, experts: Experts) -> None:
        """x f32 [M, H] += the sum of the ranks' mixtures, in place."""
        x += self.reduce(moe(x, norm, eps, experts))
