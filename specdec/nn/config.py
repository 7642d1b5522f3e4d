"""What a decoder of the Llama, Qwen3 or Llama 4 family is, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from specdec.kernels.reference import AttentionRule

_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "num_experts_per_tok": 1}
_DEFAULTS: dict[str, dict[str, Any]] = {  # what a config.json means where it says nothing
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
    "qwen3": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "head_dim": 128},
    "llama4_text": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "head_dim": 128,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of a decoder; by default those of Llama. Layers are counted from 0."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the MLP; where there are experts, of each of them and of the shared one
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
    model_type: str = "llama"
    qk_norm: Literal["none", "weighted", "unit"] = "none"  # Qwen3: before RoPE; Llama 4 Scout: after it, no weight
    interleaved_rope: bool = False  # the checkpoint pairs channels (2i, 2i + 1); packing reorders q and k
    nope_layers: tuple[int, ...] = ()  # without rotary embedding, chunk and unit norm; with temperature
    attention_chunk: int = 0  # positions a RoPE layer sees at most; 0 = all
    temperature_scale: float = 0.0
    temperature_floor: int = 8192
    num_experts: int = 0
    moe_layers: tuple[int, ...] = ()
    dense_intermediate_size: int = 0  # of the MLP beside experts; 0 = intermediate_size

    @property
    def mlp_size(self) -> int:
        """Channels of a dense feed-forward layer."""
        return self.dense_intermediate_size or self.intermediate_size

    @property
    def plain(self) -> bool:
        """Llama's layers throughout: no experts, and of the attention rules at most the one about RoPE."""
        rules = (self.attention_rule(i) for i in range(self.num_layers))
        return not self.moe_layers and self.qk_norm == "none" and all(rule.plain for rule in rules)

    def is_moe(self, layer: int) -> bool:
        """Whether the layer's feed-forward is a mixture of experts."""
        return layer in self.moe_layers

    def attention_rule(self, layer: int) -> AttentionRule:
        """How the layer attends; the weights of a weighted q and k norm are for the layer to add."""
        if layer in self.nope_layers:
            return AttentionRule(
                rope=False,
                eps=self.rms_norm_eps,
                temperature_scale=self.temperature_scale,
                temperature_floor=self.temperature_floor,
            )
        return AttentionRule(unit_norm=self.qk_norm == "unit", eps=self.rms_norm_eps, chunk=self.attention_chunk)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json; ValueError names the first thing this runtime does not compute."""
        kind = config.get("model_type")
        if kind == "llama4":  # images and text; the text model lies inside
            outer = {key: config[key] for key in ("eos_token_id", "tie_word_embeddings") if key in config}
            return cls.from_huggingface({"model_type": "llama4_text", **outer, **config["text_config"]})
        if kind not in _DEFAULTS:
            raise ValueError(
                f"model_type {kind!r} is not one this runtime computes (llama, qwen3, llama4, llama4_text): "
                "use target=huggingface for it"
            )
        config = {**_DEFAULTS[kind], **config}
        for key, wanted in _FIXED.items():
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
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta", config["rope_theta"])),
            rope_scaling=None if scaling.get("rope_type", scaling.get("type", "default")) == "default" else scaling,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            model_type=kind,
            **_FAMILY[kind](config),
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


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    slides = config.get("use_sliding_window", False) and config.get("max_window_layers", layers) < layers
    if "sliding_attention" in (config.get("layer_types") or ()) or slides:
        raise ValueError(
            f"sliding_window = {config.get('sliding_window')} is in use, and is not computed here: use target=huggingface"
        )
    return {"qk_norm": "weighted"}


def _llama4(config: Mapping[str, Any]) -> dict[str, Any]:
    layers = range(config["num_hidden_layers"])
    interval, step = config["no_rope_layer_interval"], config["interleave_moe_layer_step"]
    rope = config.get("no_rope_layers") or [(i + 1) % interval != 0 for i in layers]  # 1 = has RoPE, name or no
    moe = config.get("moe_layers")
    chunk = config["attention_chunk_size"] or 0
    kinds = config.get("layer_types")
    usual = ["chunked_attention" if rope[i] else "full_attention" for i in layers]
    if chunk and kinds and list(kinds) != usual:
        raise ValueError(
            f"layer_types {kinds} is not computed here (only chunked attention with RoPE, full without): "
            "use target=huggingface"
        )
    return {
        "qk_norm": "unit" if config["use_qk_norm"] else "none",
        "interleaved_rope": True,
        "nope_layers": tuple(i for i in layers if not rope[i]),
        "attention_chunk": chunk,
        "temperature_scale": float(config["attn_scale"]) if config["attn_temperature_tuning"] else 0.0,
        "temperature_floor": int(config["floor_scale"]),
        "num_experts": config["num_local_experts"],
        "moe_layers": tuple(range(step - 1, len(layers), step) if moe is None else sorted(moe)),
        "dense_intermediate_size": config["intermediate_size_mlp"],
    }


_FAMILY = {"llama": lambda config: {}, "qwen3": _qwen3, "llama4_text": _llama4}
