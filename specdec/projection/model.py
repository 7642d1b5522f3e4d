"""What a decode forward reads from memory, from a model's shape alone.

Shapes: H hidden, I intermediate, V vocabulary, E experts, D distinct experts a MoE layer reads, n GPUs (tensor parallel).
All sizes are bytes that one of n ranks reads in one forward; norms, biases and activations are left out (below 0.1%).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def expected_experts(tokens: int, experts: int, top_k: int = 1, zipf: float = 0.0) -> float:
    """E[D] = sum_e 1 - (1 - k p_e)^tokens for independent tokens; p uniform (zipf 0) or p_e ~ 1 / rank^zipf.

    Exact for uniform routing and for k = 1; neighbouring tokens that route alike read fewer.
    """
    weights = [math.pow(rank, -zipf) for rank in range(1, experts + 1)]
    total = sum(weights)
    return sum(1 - (1 - min(1.0, top_k * weight / total)) ** tokens for weight in weights)


def _share(count: int, gpus: int, what: str) -> int:
    if count % gpus:
        raise ValueError(f"{count} {what} do not split over {gpus} GPUs: choose a number of GPUs that divides them")
    return count // gpus


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a Llama-family decoder, dense or with a routed and a shared expert in some layers."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    intermediate: int  # of the dense layers
    moe_layers: int = 0
    experts: int = 0
    top_k: int = 1
    expert_intermediate: int = 0  # of a routed expert
    shared_intermediate: int = 0  # of the shared expert
    chunk: int = 0  # positions a chunked-attention layer sees at most
    chunked_layers: int = 0
    weight_bytes: float = 1.0  # per weight of the linears
    head_bytes: float = 2.0  # per weight of the output head and the router
    kv_bytes: float = 1.0

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], weight_bytes: float = 2.0, kv_bytes: float = 2.0) -> Model:
        """A dense Llama-family config.json (llama, mistral, qwen2, qwen3, ...); ValueError for experts or a key missing."""
        routed = sorted(key for key in config if key in ("num_local_experts", "num_experts", "n_routed_experts"))
        if routed:
            raise ValueError(
                f"config has {routed[0]} = {config[routed[0]]}, not a dense model: build Model(...) by hand"
            )
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
        if missing := [name for name in names if name not in config]:
            raise ValueError(f"config lacks {', '.join(missing)}: give the config.json of a dense Llama-family model")
        hidden, layers, heads, vocab, intermediate = (int(config[name]) for name in names)
        return cls(
            name=str(config.get("_name_or_path") or config.get("model_type", "model")),
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab=vocab,
            intermediate=intermediate,
            weight_bytes=weight_bytes,
            kv_bytes=kv_bytes,
        )

    def rank_bytes(
        self, tokens: int, context: int, gpus: int, batch: int = 1, experts: float | None = None, zipf: float = 0.0
    ) -> dict[str, float]:
        """Bytes by part that a rank reads for `batch` rows of `tokens` tokens; `experts` is D, E[D] when left out.

        A rank holds at least one KV head; the router is replicated; a chunked layer is charged its full chunk.
        """
        heads, kv = _share(self.heads, gpus, "heads"), max(1, self.kv_heads // gpus)
        distinct = expected_experts(batch * tokens, self.experts, self.top_k, zipf) if experts is None else experts
        mlp = 3 * self.hidden * self.weight_bytes / gpus
        full = self.layers - self.chunked_layers
        positions = full * context + self.chunked_layers * min(context, self.chunk)
        return {
            "attention": self.layers * self.hidden * (2 * heads + 2 * kv) * self.head_dim * self.weight_bytes,
            "dense": (self.layers - self.moe_layers) * mlp * self.intermediate,
            "shared": self.moe_layers * mlp * self.shared_intermediate,
            "experts": self.moe_layers * mlp * self.expert_intermediate * distinct if self.moe_layers else 0.0,
            "router": self.moe_layers * self.experts * self.hidden * self.head_bytes,
            "head": self.vocab * self.hidden * self.head_bytes / gpus,
            "kv": batch * positions * 2 * kv * self.head_dim * self.kv_bytes,
        }

    @property
    def all_reduces(self) -> int:
        """Of [tokens, H] in one forward: after attention and after the feed-forward of every layer."""
        return 2 * self.layers


@dataclass(frozen=True, slots=True)
class DraftHead:
    """An EAGLE-3 head: fc 3H -> H, one layer whose attention reads 2H, an output head (arXiv 2503.01840, section 3)."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    weight_bytes: float = 2.0
    fc_sharded: bool = True  # False: every rank reads the whole fc, as TensorRT-LLM does
    kernels: int = 8  # launches of one step; fc is one more
    all_reduces: int = 2  # of [batch, H] in one step, besides the gather of the best token

    def step_bytes(self, gpus: int) -> float:
        """Bytes a rank reads for one drafted token, its short KV cache left out."""
        attention = (2 * (self.heads + 2 * self.kv_heads) + self.heads) * self.head_dim
        return self.hidden * (attention + 3 * self.intermediate + self.vocab) * self.weight_bytes / gpus

    def fc_bytes(self, gpus: int) -> float:
        return 3 * self.hidden**2 * self.weight_bytes / (gpus if self.fc_sharded else 1)

    def rank_bytes(self, drafts: int, gpus: int) -> float:
        """Of one proposal: fc once, then `drafts` steps."""
        return self.fc_bytes(gpus) + drafts * self.step_bytes(gpus)


# Llama 4 Maverick, text: config.json of the release; FP8 linears and KV cache, bf16 router and output head
MAVERICK = Model(
    name="Llama-4-Maverick-17B-128E",
    hidden=5120,
    layers=48,
    heads=40,
    kv_heads=8,
    head_dim=128,
    vocab=202048,
    intermediate=16384,
    moe_layers=24,
    experts=128,
    expert_intermediate=8192,
    shared_intermediate=8192,
    chunk=8192,
    chunked_layers=36,
)


def _eagle3(name: str, vocab: int, weight_bytes: float) -> DraftHead:
    return DraftHead(name, 5120, 40, 8, 128, 32768, vocab, weight_bytes)


# NVIDIA's head for Maverick is the first; the others are what fewer bits or words would read
EAGLE3_HEADS = {
    head.name: head
    for head in (
        _eagle3("bf16-full", 202048, 2),
        _eagle3("bf16-32k", 32000, 2),
        _eagle3("fp8-full", 202048, 1),
        _eagle3("fp8-32k", 32000, 1),
    )
}
