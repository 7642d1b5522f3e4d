"""The draft head of EAGLE-3 (Li et al. 2503.01840): one decoder layer over the target's embeddings and features.

M = B * T entries, H hidden size (the target's), F taps, V and W entries of the target's and the draft vocabulary.
Entry t of a row takes the embedding of token t + 1 and the features of token t, stands at position t, predicts token t + 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels.reference import rms_norm
from specdec.nn.cache import KVCache
from specdec.nn.config import ModelConfig
from specdec.nn.head import HeadConfig, HeadModel, check_layer, describe_layer, read_layer
from specdec.nn.layers import MLP, Linears, Norm
from specdec.types import ModelInputs

ARCHITECTURE = "LlamaForCausalLMEagle3"
SWITCHES = "norm_before_residual", "norm_output", "norm_before_fc", "fc_norm"  # of EagleConfig, as config.json has them


def default_feature_layers(num_layers: int) -> tuple[int, ...]:
    """Layers to tap, low, middle and high (2503.01840, sec. 3.1); of a target with fewer than 8 layers its last three."""
    if num_layers < 8:
        return tuple(range(max(0, num_layers - 3), num_layers))
    return (1, num_layers // 2 - 1, num_layers - 4)


@dataclass(frozen=True, slots=True)
class EagleConfig(HeadConfig):
    """What a head is: its config.json. ValueError: both norms before fc."""

    feature_layers: tuple[int, ...]  # of the target, 0-based, in the order of the features; empty: `for_target` knows
    norm_before_residual: bool = False  # the layer's residual is hidden_norm(h), not h
    norm_output: bool = False  # the next draft step takes norm(g), not g (EAGLE-3.1)
    norm_before_fc: bool = False  # the features of all taps, side by side, meet one RMSNorm before fc (speculators)
    fc_norm: bool = False  # each tap's features meet an RMSNorm of their own before fc (EAGLE-3.1)

    def __post_init__(self) -> None:
        if self.norm_before_fc and self.fc_norm:
            raise ValueError(
                f"norm_before_fc={self.norm_before_fc} and fc_norm={self.fc_norm}: features meet one norm before fc, over all "
                "taps or over each, so switch one of them off"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> EagleConfig:
        """Read a config.json; ValueError names the first thing that no such head has."""
        layer, drafts = read_layer(config, ARCHITECTURE, "EAGLE-3")
        taps = tuple(config.get("feature_layers") or ())
        if any(not isinstance(tap, int) or tap < 0 for tap in taps):
            raise ValueError(f"feature_layers {list(taps)} must name the target's layers, counted from 0")
        return cls(layer, drafts, taps, **{key: bool(config.get(key, False)) for key in SWITCHES})

    def to_dict(self) -> dict[str, Any]:
        """config.json; `from_dict` gives the same back."""
        return {
            "architectures": [ARCHITECTURE],
            **describe_layer(self.layer, self.draft_vocab_size),
            "feature_layers": list(self.feature_layers),
            **{key: getattr(self, key) for key in SWITCHES},
        }

    def for_target(self, target: Any) -> EagleConfig:
        """This head on a target of this config, with the usual layers where it names none; ValueError as in `check`."""
        named = self.feature_layers or default_feature_layers(target.num_layers)
        config = replace(self, feature_layers=named)
        config.check(target)
        return config

    def check(self, target: Any) -> None:
        """ValueError unless the head was made for a target of this config (hidden_size, vocab_size, num_layers)."""
        remedy = "take a head that was trained for this target, or train one (specdec train drafter=eagle3)"
        check_layer(self.layer, target, remedy)
        if max(self.feature_layers) >= target.num_layers:
            raise ValueError(
                f"the head taps layers {list(self.feature_layers)}, this target has 0 to {target.num_layers - 1}: {remedy}"
            )


class _Attention(nn.Module):
    """Attention whose inputs are twice as wide as its output."""

    def __init__(self, config: ModelConfig, linears: Linears) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = linears.rows(config.num_heads * size, 2 * hidden)
        self.k_proj = linears.rows(config.num_kv_heads * size, 2 * hidden)
        self.v_proj = linears.rows(config.num_kv_heads * size, 2 * hidden)
        self.o_proj = linears.columns(hidden, config.num_heads * size)


class _Layer(nn.Module):
    """What checkpoints keep under `midlayer.`."""

    def __init__(self, config: ModelConfig, linears: Linears) -> None:
        super().__init__()
        self.self_attn = _Attention(config, linears)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, linears)
        self.input_layernorm = Norm(config.hidden_size)
        self.hidden_norm = Norm(config.hidden_size)
        self.post_attention_layernorm = Norm(config.hidden_size)


class EagleModel(HeadModel):
    """The head. Load the parameters, which have the checkpoint's names, then `pack` once, then call."""

    attention_norm: Tensor  # [2, H] of embeddings and hidden states, which meet one each
    out_norm: Tensor
    taps_norm: Tensor | None = None  # before fc: [F * H] over all taps, or [F, H] over each

    def __init__(self, config: EagleConfig, dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        hidden, taps, linears = config.layer.hidden_size, len(config.feature_layers), Linears(dtype)
        self.fc = linears.rows(hidden, taps * hidden)
        self.midlayer = _Layer(config.layer, linears)
        self.norm = Norm(hidden)
        self.lm_head = linears.rows(config.draft_vocab_size, hidden)
        if config.norm_before_fc:
            self.input_norm = Norm(taps * hidden)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(Norm(hidden) for _ in range(taps))

    def pack(self, ops: Any, embedding: Tensor) -> None:
        """Give the weights to a backend, and let the originals go. embedding [V, H]: the target's table, shared."""
        layer = self.midlayer
        self.pack_layer(ops, embedding, layer.self_attn, layer.mlp)
        self.attention_norm = torch.stack([layer.input_layernorm.weight.data, layer.hidden_norm.weight.data])
        self.mlp_norm, self.out_norm = layer.post_attention_layernorm.weight.data, self.norm.weight.data
        if self.config.norm_before_fc:
            self.taps_norm = self.input_norm.weight.data
        if self.config.fc_norm:
            self.taps_norm = torch.stack(list(self.fc_norm.parameters())).data
        self.fuser, self.head = ops.pack(self.fc.value()), ops.pack(self.lm_head.value())
        del self.midlayer, self.fc, self.lm_head

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features [M, F * H] as the layer takes them: f32 [M, H]."""
        norm = self.taps_norm
        if norm is not None:
            features = features.float()
            if norm.dim() == 2:
                features = features.view(-1, *norm.shape).transpose(0, 1).contiguous()
        hidden: Tensor = self.ops.norm_linear(features, norm, self.eps, self.fuser)
        return hidden

    def forward(
        self, inputs: ModelInputs, hidden: Tensor, cache: KVCache, logits: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Run entries [B, T] and write their K/V: states f32 [M, H], and if asked for their logits f32 [M, W].

        inputs.tokens: those behind the entries. hidden f32 [M, H]: fused features, or the states of the entries before. The
        next call may overwrite what this one returns.
        """

        streams = [self.embedding[inputs.tokens.flatten()], hidden]
        if self.config.norm_before_residual:
            streams.append(rms_norm(hidden, self.attention_norm[1], self.eps))
        count = len(streams)

        def stretch(x: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor | None]:
            parts = x.view(count, -1, x.shape[1])
            states = parts[-1]
            self.advance(states, parts[:2], inputs, cache)
            return states, self.ops.norm_linear(states, self.out_norm, self.eps, self.head) if logits else None

        key = (logits, cache.keys.data_ptr(), cache.keys.shape, self.cos.shape[0])
        states, scores = self.replay(key, stretch, torch.cat(streams), inputs)  # f32, as the widest of them
        if self.config.norm_output:
            states = rms_norm(states, self.out_norm, self.eps)
        return states, scores

    def logits(self, hidden: Tensor) -> Tensor:
        """Of states that `forward` returned, f32 [M, H] -> f32 [M, W]."""
        norm = None if self.config.norm_output else self.out_norm
        result: Tensor = self.ops.norm_linear(hidden, norm, self.eps, self.head)
        return result
