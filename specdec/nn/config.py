"""What a Llama-family model is, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of a decoder. Llama 4 and Qwen3 differ from Llama where `nn.layers` says so, and here."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 8192
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json; ValueError names the first thing this runtime does not compute."""
        kind = config.get("model_type")
        if kind != "llama":
            raise ValueError(
                f"model_type {kind!r} is not one this runtime computes (llama): use target=huggingface for it"
            )
        for key, wanted in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
            if config.get(key, wanted) != wanted:
                raise ValueError(
                    f"{key} = {config[key]!r} is not computed here (only {wanted!r}): use target=huggingface"
                )
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or rope
        heads = config["num_attention_heads"]
        eos = config.get("eos_token_id")
        built = cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_positions=config.get("max_position_embeddings", 8192),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
            rope_scaling=None if scaling.get("rope_type", scaling.get("type", "default")) == "default" else scaling,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )
        built.check()
        return built

    def check(self) -> None:
        """ValueError for sizes that no kernel computes."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads do not share {self.num_kv_heads} KV heads evenly")
        if (
            self.rope_scaling is not None
            and self.rope_scaling.get("rope_type", self.rope_scaling.get("type")) != "llama3"
        ):
            raise ValueError(f"rope scaling {dict(self.rope_scaling)} is not computed here (none or llama3)")
