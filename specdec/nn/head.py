"""What the draft heads of all EAGLEs share: one decoder layer with a cache of its own, and a draft vocabulary.

M = B * T entries, H hidden size (the target's), V and W entries of the target's and the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels.reference import AttentionRule, stack
from specdec.nn.cache import KVCache
from specdec.nn.config import ModelConfig
from specdec.nn.layers import MLP
from specdec.nn.rope import rope_tables
from specdec.types import ModelInputs

__all__ = ["HeadConfig", "HeadModel", "check_layer", "describe_layer", "draft_ids", "read_layer"]

_NEEDED = "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "num_hidden_layers"


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """What the heads of all EAGLEs have."""

    layer: ModelConfig  # the one layer: Llama's sizes, norms and RoPE; hidden_size and vocab_size are the target's
    draft_vocab_size: int

    @property
    def is_reduced(self) -> bool:
        """Whether the draft vocabulary is a part of the target's, which d2t and t2d then describe."""
        return self.draft_vocab_size != self.layer.vocab_size


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
    layer = replace(layer, max_positions=_positions(config, layer.max_positions))
    drafts = config.get("draft_vocab_size") or layer.vocab_size
    if not 0 < drafts <= layer.vocab_size:
        raise ValueError(f"draft_vocab_size {drafts} must be 1 to vocab_size, {layer.vocab_size}")
    return layer, drafts


def _positions(config: Mapping[str, Any], positions: int) -> int:
    """Positions that attention over all of them is right for: those of its window, where a head has one.

    layer_types says whether, as the speculators package writes it by default; without it Qwen's use_sliding_window. A
    sliding_window that neither of them switches on means nothing.
    """
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    qwen = config.get("use_sliding_window") and config.get("max_window_layers") == 0  # layers before that one are full
    slides = kinds[0] == "sliding_attention" if kinds else qwen
    return min(positions, window) if slides and window is not None else positions


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


class HeadModel(nn.Module):
    """What the heads of all EAGLEs share: one decoder layer over a cache of its own, before and after packing."""

    d2t: Tensor
    t2d: Tensor
    attention_norm: Tensor | None = None  # before attention, if any; `pack` sets these three
    mlp_norm: Tensor
    out_norm: Tensor | None = None  # before the head, if any

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        if config.is_reduced:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.zeros(config.layer.vocab_size, dtype=torch.bool))
        self.cos = self.sin = torch.empty(0)

    def pack_layer(self, ops: Any, embedding: Tensor, attn: Any, mlp: MLP) -> None:
        """Give the layer's weights to a backend. embedding [V, H]: the target's table, shared."""
        self.ops, self.replay, self.embedding = ops, ops.Replay(), embedding
        self.eps, self.rule = self.config.layer.rms_norm_eps, AttentionRule()
        self.token_ids = draft_ids(self.d2t, self.t2d) if self.config.is_reduced else None
        qkv = stack([attn.q_proj.value(), attn.k_proj.value(), attn.v_proj.value()])
        self.qkv, self.o = ops.pack_heads(qkv, self.config.layer.head_dim), ops.pack(attn.o_proj.value())
        self.gate_up, self.down = mlp.values(ops)
        self.set_positions(256)

    def set_positions(self, positions: int) -> None:
        """Make the rotary tables cover that many positions."""
        if self.cos.shape[0] < positions:
            self.cos, self.sin = rope_tables(self.config.layer, positions, self.embedding.device)

    def advance(self, x: Tensor, y: Tensor, inputs: ModelInputs, cache: KVCache) -> None:
        """The layer on the residual stream x f32 [M, H], in place; its attention reads y, as `norm_attention` takes it."""
        ops, eps = self.ops, self.eps
        where = cache.keys[0], cache.values[0], inputs, self.cos, self.sin, self.rule
        ops.add_linear(x, ops.norm_attention(y, self.attention_norm, eps, self.qkv, *where), self.o, self.mlp_norm)
        ops.add_linear(x, ops.norm_swiglu(x, self.mlp_norm, eps, self.gate_up), self.down, self.out_norm)
        ops.flush(x)


def draft_ids(d2t: Tensor, t2d: Tensor) -> Tensor:
    """The target's id of every draft id, int64 [W], from the two tables of a checkpoint, which must agree."""
    ids = torch.arange(len(d2t), device=d2t.device) + d2t
    if not torch.equal(ids.sort().values, t2d.nonzero().flatten()):
        raise ValueError(
            f"d2t and t2d disagree: {len(ids)} draft ids do not map onto the {int(t2d.sum())} marked of {len(t2d)} target "
            "ids, one to one; export the head again"
        )
    return ids
