"""The EAGLE-3 head (2503.01840) for training: plain torch with autograd, and its training-time test.

Shapes: B rows, T positions, H hidden size, F taps, A query heads, G KV heads, R = A / G, E head size, V target vocabulary,
W draft vocabulary, J steps. Step j at position t is what inference does j tokens behind the last true feature: it takes the
embedding of token t + 1 + j and its own output of step j - 1, and predicts token t + 2 + j.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from specdec.kernels.reference import rotate
from specdec.nn import ModelConfig
from specdec.nn.eagle import EagleConfig, default_feature_layers
from specdec.nn.rope import rope_tables
from specdec.train.heads import TrainableHead

__all__ = ["MLP", "Attention", "ChainHead", "Eagle3Head", "Norm", "begin_small", "make_head", "one_layer"]

_SPREAD = 0.02  # of fresh weights


class Norm(nn.Module):
    """RMSNorm in f32, the dtype of the runtime's residual stream."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention over an input of `width`; keys and values of all steps so far are the caller's lists."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.size = config.head_dim
        self.q_proj = nn.Linear(width, config.num_heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, config.num_kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, config.num_kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.size, config.hidden_size, bias=False)

    def forward(self, y: Tensor, cos: Tensor, sin: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """y [B, T, width], cos and sin f32 [1, T, E/2] -> [B, T, H]; appends this step's keys and values [B, T, G, E]."""
        q, k, v = (proj(y).unflatten(-1, (-1, self.size)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        keys.append(rotate(k, cos, sin))
        values.append(v)
        result: Tensor = self.o_proj(chain_attention(rotate(q, cos, sin), keys, values).flatten(2))
        return result


def chain_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Queries [B, T, A, E] over step 0's positions up to their own, and over later steps at their own position alone.

    keys, values: [B, T, G, E] of every step. The later steps add a column each to the T x T scores of step 0.
    """
    if q.device.type == "cuda":
        return _fused_chain_attention(q, keys, values)
    batch, width, _, size = q.shape
    groups = keys[0].shape[2]
    q = q.view(batch, width, groups, -1, size).permute(0, 2, 3, 1, 4) * size**-0.5  # [B, G, R, T, E]
    first_keys, first_values = (x.permute(0, 2, 1, 3)[:, :, None] for x in (keys[0], values[0]))  # [B, G, 1, T, E]
    behind = torch.ones(width, width, dtype=torch.bool, device=q.device).triu(1)
    scores = [(q @ first_keys.transpose(-1, -2)).masked_fill(behind, -torch.inf)]
    own_keys, own_values = ([x.permute(0, 2, 1, 3)[:, :, None] for x in later[1:]] for later in (keys, values))
    scores += [(q * k).sum(-1, keepdim=True) for k in own_keys]
    weights = torch.cat(scores, -1).softmax(-1)
    out = weights[..., :width] @ first_values
    for i, v in enumerate(own_values):
        out = out + weights[..., width + i, None] * v
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, T, A, E]


def _fused_chain_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """The same over all keys at once under a mask: more products, but on a GPU the scores never reach its memory."""
    width, share = q.shape[1], q.shape[2] // keys[0].shape[2]
    own = torch.eye(width, dtype=torch.bool, device=q.device)
    mask = torch.cat([torch.ones_like(own).tril(), *[own] * (len(keys) - 1)], 1)  # [T, J * T]
    k, v = (torch.cat(list(x), 1).transpose(1, 2).repeat_interleave(share, 1).to(q.dtype) for x in (keys, values))
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):  # cuDNN would plan anew for every length
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU feed-forward (2002.05202)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Layer(nn.Module):
    """The head's one decoder layer: attention reads the token and the feature side by side."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        hidden, eps = config.layer.hidden_size, config.layer.rms_norm_eps
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm, self.hidden_norm = Norm(hidden, eps), Norm(hidden, eps)
        self.self_attn = Attention(config.layer, 2 * hidden)
        self.post_attention_layernorm = Norm(hidden, eps)
        self.mlp = MLP(hidden, config.layer.intermediate_size)

    def forward(
        self, e: Tensor, h: Tensor, cos: Tensor, sin: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """Embeddings and features [B, T, H] -> the next feature [B, T, H]."""
        normed = self.hidden_norm(h)
        y = torch.cat([self.input_layernorm(e), normed], -1)
        residual = normed if self.norm_before_residual else h
        x = residual + self.self_attn(y, cos, sin, keys, values).float()
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x)).float()
        return result


class ChainHead(TrainableHead):
    """A head of one layer that goes on from its own outputs."""

    def __init__(self, config: Any, depth: int, taps: Sequence[int | str]) -> None:
        """config: `layer` describes the layer, and `to_dict` is the config.json."""
        super().__init__()
        if depth < 1:
            raise ValueError(
                f"training.head.depth={depth} must be at least 1: a head that predicts nothing learns nothing"
            )
        self.config, self.depth, self.taps = config, depth, taps

    @abstractmethod
    def reduce(self, features: Tensor) -> Tensor:
        """Target features [B, T, F * H] as step 0 takes them: f32 [B, T, H]."""

    @abstractmethod
    def step(
        self, e: Tensor, h: Tensor, cos: Tensor, sin: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Embeddings and features [B, T, H] -> the state of these entries, and what the next step takes for features."""

    def forward(self, tokens: Tensor, features: Tensor, embed: Tensor) -> list[Tensor]:
        """The training-time test (2503.01840, section 3.2; 2408.15766): the states of J steps, f32 [B, T, H].

        A query of step j sees the step-0 keys of positions up to its own and the keys of steps 1 to j of its own chain, which
        stand at t + 1 to t + j: what the cache holds at inference.
        """
        width = tokens.shape[1]
        cos, sin = rope_tables(self.config.layer, width + self.depth, tokens.device)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        h, states = self.reduce(features), []
        for j in range(self.depth):
            following = F.pad(tokens, (0, j + 1))[:, j + 1 :]
            e = F.embedding(following, embed).float()
            g, h = self.step(e, h, cos[None, j : width + j], sin[None, j : width + j], keys, values)
            states.append(g)
        return states

    def settings(self) -> dict[str, Any]:
        described: dict[str, Any] = self.config.to_dict()
        return described


class Eagle3Head(ChainHead):
    """fc over the tapped features, one layer, a norm and a head of W rows."""

    def __init__(self, config: EagleConfig, d2t: Tensor | None, t2d: Tensor | None, depth: int) -> None:
        super().__init__(config, depth, config.feature_layers)
        hidden, eps = config.layer.hidden_size, config.layer.rms_norm_eps
        if config.norm_before_fc:
            self.input_norm = Norm(len(self.taps) * hidden, eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(Norm(hidden, eps) for _ in self.taps)
        self.fc = nn.Linear(len(self.taps) * hidden, hidden, bias=False)
        self.midlayer = Layer(config)
        self.norm = Norm(hidden, eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.set_vocabulary(d2t, t2d)

    def logits(self, depth: int, states: Tensor) -> Tensor:
        result: Tensor = self.lm_head(self.norm(states))
        return result

    def reduce(self, features: Tensor) -> Tensor:
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        if self.config.fc_norm:
            parts = features.chunk(len(self.taps), -1)
            features = torch.cat([norm(x) for norm, x in zip(self.fc_norm, parts, strict=True)], -1)
        reduced: Tensor = self.fc(features.to(self.fc.weight.dtype))
        return reduced.float()

    def step(
        self, e: Tensor, h: Tensor, cos: Tensor, sin: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        g = self.midlayer(e, h, cos, sin, keys, values)
        return g, self.norm(g) if self.config.norm_output else g


def make_head(
    target: Any,
    d2t: Tensor | None,
    t2d: Tensor | None,
    seed: int = 0,
    depth: int = 7,
    taps: Sequence[int] | None = None,
    intermediate_size: int | None = None,
    norm_before_residual: bool = False,
    norm_output: bool = False,
    norm_before_fc: bool = False,
    fc_norm: bool = False,
) -> Eagle3Head:
    """A fresh head for a target, on the CPU in f32. taps None: `default_feature_layers`; intermediate_size None: the target's.

    The layer starts small and random, fc lets the last tap through, lm_head (rows of the draft vocabulary) and norm are the
    target's own: the head begins as an early exit of the target, and only the step to the next token is to be learnt.
    ValueError: a target whose layers are not known, or that lacks a tapped one; both norms before fc.
    """
    layer, sizes = one_layer(target, intermediate_size), target.config
    config = EagleConfig(
        layer=layer,
        draft_vocab_size=sizes.vocab_size if d2t is None else len(d2t),
        feature_layers=default_feature_layers(sizes.num_layers) if taps is None else tuple(taps),
        norm_before_residual=norm_before_residual,
        norm_output=norm_output,
        norm_before_fc=norm_before_fc,
        fc_norm=fc_norm,
    )
    config.check(sizes)
    head = Eagle3Head(config, d2t, t2d, depth)
    begin_small(head, seed)
    with torch.no_grad():
        head.fc.weight[:, -sizes.hidden_size :] += torch.eye(sizes.hidden_size)
        rows = target.lm_head.cpu()
        head.lm_head.weight.copy_(rows if head.ids is None else rows[head.ids])
        head.norm.weight.copy_(target.model.norm.cpu())
    return head


def begin_small(head: nn.Module, seed: int) -> None:
    """Small random matrices; vectors stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=_SPREAD, generator=generator)


def one_layer(target: Any, intermediate_size: int | None) -> ModelConfig:
    """A plain Llama layer as wide as the target's, whatever the target's family does besides. intermediate_size None: its own.

    ValueError: a target whose layers are not known.
    """
    sizes = target.config
    if not isinstance(sizes, ModelConfig):
        raise ValueError(
            f"{type(target).__name__} does not say how its layers are made, as a head's is: use target=llama"
        )
    return ModelConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=intermediate_size or sizes.mlp_size,
        num_layers=1,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        max_positions=sizes.max_positions,
        rms_norm_eps=sizes.rms_norm_eps,
        rope_theta=sizes.rope_theta,
        rope_scaling=sizes.rope_scaling,
    )
