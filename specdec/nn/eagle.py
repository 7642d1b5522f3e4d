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

from specdec.kernels.reference import AttentionRule, rms_norm, stack
from specdec.nn.cache import KVCache
from specdec.nn.config import ModelConfig
from specdec.nn.layers import MLP, Linears, Norm
from specdec.nn.rope import rope_tables
from specdec.types import ModelInputs

ARCHITECTURE = "LlamaForCausalLMEagle3"
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "num_hidden_layers",
)
_SWITCHES = ("norm_before_residual", "norm_output", "fc_norm")


def default_feature_layers(num_layers: int) -> tuple[int, ...]:
    """Layers to tap, low, middle and high (2503.01840, sec. 3.1); of a target with fewer than 8 layers its last three."""
    if num_layers < 8:
        return tuple(range(max(0, num_layers - 3), num_layers))
    return (1, num_layers // 2 - 1, num_layers - 4)


def read_layer(config: Mapping[str, Any], architecture: str, kind: str) -> tuple[ModelConfig, int]:
    """The one layer that a head's config.json describes, and the size of its draft vocabulary.

    ValueError names the first thing that no head of this kind ("EAGLE-3") has.
    """
    if architecture not in (config.get("architectures") or ()):
        raise ValueError(f"architectures is {config.get('architectures')}, an {kind} head's is ['{architecture}']")
    missing = [key for key in _NEEDED if config.get(key) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}: add what the head was trained with")
    if config["num_hidden_layers"] != 1:
        raise ValueError(f"num_hidden_layers is {config['num_hidden_layers']}, an {kind} head has 1")
    layer = ModelConfig.from_huggingface({**config, "tie_word_embeddings": False})
    theirs = config.get("target_hidden_size", layer.hidden_size)
    if theirs != layer.hidden_size:
        raise ValueError(
            f"hidden_size is {layer.hidden_size}, target_hidden_size {theirs}: only heads as wide as their target work here"
        )
    if not layer.plain:
        raise ValueError(
            f"model_type {layer.model_type!r} has layers that are not computed in a head: only Llama's are"
        )
    drafts = config.get("draft_vocab_size") or layer.vocab_size
    if not 0 < drafts <= layer.vocab_size:
        raise ValueError(f"draft_vocab_size {drafts} must be 1 to vocab_size, {layer.vocab_size}")
    return layer, drafts


def describe_layer(layer: ModelConfig, draft_vocab_size: int) -> dict[str, Any]:
    """The keys of config.json that `read_layer` reads."""
    scaling = {} if layer.rope_scaling is None else {"rope_scaling": dict(layer.rope_scaling)}
    return {
        "model_type": "llama",
        "hidden_size": layer.hidden_size,
        "target_hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": layer.rms_norm_eps,
        "rope_theta": layer.rope_theta,
        **scaling,
        "max_position_embeddings": layer.max_positions,
        "vocab_size": layer.vocab_size,
        "draft_vocab_size": draft_vocab_size,
    }


def check_layer(layer: ModelConfig, target: Any, remedy: str) -> None:
    """ValueError, with the remedy, unless the head was made for a target of this width and vocabulary."""
    for name in ("hidden_size", "vocab_size"):
        mine, theirs = getattr(layer, name), getattr(target, name)
        if mine != theirs:
            raise ValueError(f"the head is for a target of {name} {mine}, this target's is {theirs}: {remedy}")


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """What a head is: its config.json."""

    layer: ModelConfig  # the one layer: Llama's sizes, norms and RoPE; hidden_size and vocab_size are the target's
    draft_vocab_size: int
    feature_layers: tuple[int, ...]  # of the target, 0-based, in the order of the features; empty: `for_target` knows
    norm_before_residual: bool = False  # the layer's residual is hidden_norm(h), not h
    norm_output: bool = False  # the next draft step takes norm(g), not g (EAGLE-3.1)
    fc_norm: bool = False  # each tap's features meet an RMSNorm before fc (EAGLE-3.1)

    @property
    def is_reduced(self) -> bool:
        """Whether the draft vocabulary is a part of the target's, which d2t and t2d then describe."""
        return self.draft_vocab_size != self.layer.vocab_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> EagleConfig:
        """Read a config.json; ValueError names the first thing that no such head has."""
        layer, drafts = read_layer(config, ARCHITECTURE, "EAGLE-3")
        taps = tuple(config.get("feature_layers") or ())
        if any(not isinstance(tap, int) or tap < 0 for tap in taps):
            raise ValueError(f"feature_layers {list(taps)} must name the target's layers, counted from 0")
        return cls(layer, drafts, taps, **{key: bool(config.get(key, False)) for key in _SWITCHES})

    def to_dict(self) -> dict[str, Any]:
        """config.json; `from_dict` gives the same back."""
        return {
            "architectures": [ARCHITECTURE],
            **describe_layer(self.layer, self.draft_vocab_size),
            "feature_layers": list(self.feature_layers),
            **{key: getattr(self, key) for key in _SWITCHES},
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


class EagleModel(nn.Module):
    """The head over a cache of its own. Load the parameters, which have the checkpoint's names, then `pack` once, then call."""

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: EagleConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        hidden, taps, linears = config.layer.hidden_size, len(config.feature_layers), Linears(dtype)
        self.fc = linears.rows(hidden, taps * hidden)
        self.midlayer = _Layer(config.layer, linears)
        self.norm = Norm(hidden)
        self.lm_head = linears.rows(config.draft_vocab_size, hidden)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(Norm(hidden) for _ in range(taps))
        if config.is_reduced:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.zeros(config.layer.vocab_size, dtype=torch.bool))
        self.cos = self.sin = torch.empty(0)

    def pack(self, ops: Any, embedding: Tensor) -> None:
        """Give the weights to a backend, and let the originals go. embedding [V, H]: the target's table, shared."""
        self.ops, self.replay, self.embedding = ops, ops.Replay(), embedding
        self.eps, self.rule = self.config.layer.rms_norm_eps, AttentionRule()
        self.token_ids = draft_ids(self.d2t, self.t2d) if self.config.is_reduced else None
        layer, attn = self.midlayer, self.midlayer.self_attn
        self.pair_norm = torch.stack([layer.input_layernorm.weight.data, layer.hidden_norm.weight.data])
        self.mlp_norm, self.out_norm = layer.post_attention_layernorm.weight.data, self.norm.weight.data
        self.taps_norm = torch.stack(list(self.fc_norm.parameters())).data if self.config.fc_norm else None
        qkv = stack([attn.q_proj.value(), attn.k_proj.value(), attn.v_proj.value()])
        self.qkv, self.o = ops.pack_heads(qkv, self.config.layer.head_dim), ops.pack(attn.o_proj.value())
        self.gate_up, self.down = layer.mlp.values(ops)
        self.fuser, self.head = ops.pack(self.fc.value()), ops.pack(self.lm_head.value())
        del self.midlayer, self.fc, self.lm_head
        self.set_positions(256)

    def set_positions(self, positions: int) -> None:
        """Make the rotary tables cover that many positions."""
        if self.cos.shape[0] < positions:
            self.cos, self.sin = rope_tables(self.config.layer, positions, self.embedding.device)

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features [M, F * H] as the layer takes them: f32 [M, H]."""
        if self.taps_norm is not None:
            features = features.float().view(-1, *self.taps_norm.shape).transpose(0, 1).contiguous()
        hidden: Tensor = self.ops.norm_linear(features, self.taps_norm, self.eps, self.fuser)
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
            streams.append(rms_norm(hidden, self.pair_norm[1], self.eps))
        count = len(streams)

        def stretch(x: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor | None]:
            parts = x.view(count, -1, x.shape[1])
            states = parts[-1]
            self._layer(states, parts[:2], inputs, cache)
            return states, self.ops.norm_linear(states, self.out_norm, self.eps, self.head) if logits else None

        key = (logits, cache.keys.data_ptr(), cache.keys.shape, self.cos.shape[0])
        states, scores = self.replay(key, stretch, torch.cat(streams), inputs)  # f32, as the widest of them
        if self.config.norm_output:
            states = rms_norm(states, self.out_norm, self.eps)
        return states, scores

    def _layer(self, x: Tensor, pair: Tensor, inputs: ModelInputs, cache: KVCache) -> None:
        """Advance the residual stream x f32 [M, H] in place. pair f32 [2, M, H]: embeddings and hidden states."""
        ops, eps = self.ops, self.eps
        where = cache.keys[0], cache.values[0], inputs, self.cos, self.sin, self.rule
        ops.add_linear(x, ops.norm_attention(pair, self.pair_norm, eps, self.qkv, *where), self.o, self.mlp_norm)
        ops.add_linear(x, ops.norm_swiglu(x, self.mlp_norm, eps, self.gate_up), self.down, self.out_norm)
        ops.flush(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of states that `forward` returned, f32 [M, H] -> f32 [M, W]."""
        norm = None if self.config.norm_output else self.out_norm
        result: Tensor = self.ops.norm_linear(hidden, norm, self.eps, self.head)
        return result


def draft_ids(d2t: Tensor, t2d: Tensor) -> Tensor:
    """The target's id of every draft id, int64 [W], from the two tables of a checkpoint, which must agree."""
    ids = torch.arange(len(d2t), device=d2t.device) + d2t
    if not torch.equal(ids.sort().values, t2d.nonzero().flatten()):
        raise ValueError(
            f"d2t and t2d disagree: {len(ids)} draft ids do not map onto the {int(t2d.sum())} marked of {len(t2d)} target "
            "ids, one to one; export the head again"
        )
    return ids
