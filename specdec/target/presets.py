"""Configurations of well-known models in the words of their config.json, to measure their shapes with random weights."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "maverick": {  # the text model of Llama-4-Maverick-17B-128E-Instruct
        "model_type": "llama4_text",
        "vocab_size": 202048,
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 128,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "rope_theta": 500_000.0,
        "rope_scaling": None,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "max_position_embeddings": 1_048_576,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": [200001, 200007, 200008],
    },
}


def read_preset(name: str | None) -> dict[str, Any]:
    """A built-in configuration by name."""
    if name not in PRESETS:
        raise ValueError(
            f"target.preset={name} is unknown; choose one of {', '.join(PRESETS)}, or give target.checkpoint"
        )
    return PRESETS[name]
