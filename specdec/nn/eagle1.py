"""The draft head of EAGLE (Li et al. 2401.15077): one decoder layer that continues the target's last hidden states.

M = B * T entries, H hidden size (the target's), V and W entries of the target's and the draft vocabulary.
Entry t of a row stands at position t: y = fc [e(token t + 1); f_t], f_t being what the target's final norm gives at token t.
The layer, without a norm before its attention, makes f_{t+1} of y, and the target's own lm_head the law of token t + 2 of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specdec.nn.cache import KVCache
from specdec.nn.config import ModelConfig
from specdec.nn.head import HeadConfig, HeadModel, check_layer, describe_layer, read_layer
from specdec.nn.layers import MLP, Attention, Linears, Norm, Projection, weight
from specdec.types import ModelInputs

ARCHITECTURE = "LlamaForCausalLM"  # in SafeAILab's config.json, which is the target's but for the number of layers


@dataclass(frozen=True, slots=True)
class Eagle1Config(HeadConfig):
    """What a head is: its config.json."""

    feature_layers: ClassVar[tuple[str, ...]] = ("hidden",)  # of every such head
    bias: bool = True  # of fc; SafeAILab's code takes a config.json without it for one that has it

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Eagle1Config:
        """Read a config.json, ours or SafeAILab's; ValueError names the first thing that no such head has."""
        layer, drafts = read_layer(config, ARCHITECTURE, "EAGLE-1")
        if config.get("qkv_bias"):
            raise ValueError("qkv_bias is on (Qwen2's attention), which is not computed here: take a head without it")
        return cls(layer, drafts, bool(config.get("bias", True)))

    def to_dict(self) -> dict[str, Any]:
        """config.json; `from_dict` gives the same back."""
        shared = describe_layer(self.layer, self.draft_vocab_size)
        return {"architectures": [ARCHITECTURE], **shared, "bias": self.bias}

    def check(self, target: Any) -> None:
        """ValueError unless the head was made for a target of this config (hidden_size, vocab_size)."""
        remedy = "take a head that was trained for this target, or train one (specdec train drafter=eagle)"
        check_layer(self.layer, target, remedy)


class _Fuse(Projection):
    """A linear layer from an embedding and a feature to a feature, with a bias where the head has one."""

    def __init__(self, config: Eagle1Config, dtype: torch.dtype) -> None:
        hidden = config.layer.hidden_size
        super().__init__((hidden, 2 * hidden), dtype)
        self.bias = weight(hidden, dtype=torch.float32) if config.bias else None


class _Layer(nn.Module):
    """What checkpoints keep under `layers.0.`."""

    def __init__(self, config: ModelConfig, linears: Linears) -> None:
        super().__init__()
        self.self_attn = Attention(config, linears)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, linears)
        self.post_attention_layernorm = Norm(config.hidden_size)


class Eagle1Model(HeadModel):
    """The head. Load the parameters, which have the checkpoint's names, then `pack` once, then call."""

    def __init__(self, config: Eagle1Config, dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        self.fc = _Fuse(config, dtype)
        self.layers = nn.ModuleList([_Layer(config.layer, Linears(dtype))])

    def pack(self, ops: Any, embedding: Tensor, lm_head: Tensor) -> None:
        """Give the weights to a backend, and let the originals go. embedding, lm_head [V, H]: the target's."""
        layer: _Layer = self.layers[0]  # type: ignore[assignment]
        self.pack_layer(ops, embedding, layer.self_attn, layer.mlp)
        self.bias = None if self.fc.bias is None else self.fc.bias.data
        self.fuser, self.mlp_norm = ops.pack(self.fc.value()), layer.post_attention_layernorm.weight.data
        self.head = ops.pack(lm_head if self.token_ids is None else lm_head[self.token_ids])
        del self.layers, self.fc

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features [M, H] as `forward` takes them, f32: they are what the head predicts itself."""
        return features.float()

    def forward(
        self, inputs: ModelInputs, hidden: Tensor, cache: KVCache, logits: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Run entries [B, T] and write their K/V: features f32 [M, H], and if asked for their logits f32 [M, W].

        inputs.tokens: those behind the entries. hidden f32 [M, H]: the target's features, or the head's of the entries before.
        The next call may overwrite what this one returns.
        """

        def stretch(x: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor | None]:
            self.advance(x, x, inputs, cache)
            return x, self.logits(x) if logits else None

        pair = torch.cat([self.embedding[inputs.tokens.flatten()].float(), hidden], -1)
        y = self.ops.norm_linear(pair, None, self.eps, self.fuser)
        if self.bias is not None:
            y = y + self.bias
        key = (logits, cache.keys.data_ptr(), cache.keys.shape, self.cos.shape[0])
        result: tuple[Tensor, Tensor | None] = self.replay(key, stretch, y, inputs)
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """Of features that `forward` returned, f32 [M, H] -> f32 [M, W]."""
        result: Tensor = self.ops.norm_linear(hidden, None, self.eps, self.head)
        return result
