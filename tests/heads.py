"""Small random EAGLE-3 checkpoints for a given target, as `specdec train` exports them.

Shapes: H hidden size, F taps, V and W entries of the target's and the draft vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.kernels.reference import quantize
from specdec.nn.eagle import default_feature_layers

Tensors = dict[str, Tensor]


def head_config(target: Any, draft_vocab_size: int | None = None, **changes: Any) -> dict[str, Any]:
    """config.json of a head for a target of this config (`Toy().config`); `changes` are its keys."""
    heads = 4
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": target.hidden_size,
        "target_hidden_size": target.hidden_size,
        "intermediate_size": 2 * target.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": draft_vocab_size or target.vocab_size,
        "feature_layers": list(default_feature_layers(target.num_layers)),
    }
    return config | changes


def head_tensors(config: Mapping[str, Any], seed: int = 0, sharpness: float = 3.0) -> Tensors:
    """Seeded f32 weights by checkpoint name; draft ids are a random part of the vocabulary. `sharpness`: of the logits."""
    draw = torch.Generator().manual_seed(seed)
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    vocab, drafts, taps = config["vocab_size"], config["draft_vocab_size"], len(config["feature_layers"])
    shapes = {
        "fc": (hidden, taps * hidden),
        "midlayer.self_attn.q_proj": (queries, 2 * hidden),
        "midlayer.self_attn.k_proj": (keys, 2 * hidden),
        "midlayer.self_attn.v_proj": (keys, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, queries),
        "midlayer.mlp.gate_proj": (inner, hidden),
        "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
        "lm_head": (drafts, hidden),
    }
    norms = ["norm", *(f"midlayer.{name}" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"))]
    norms += [f"fc_norm.{i}" for i in range(taps)] if config.get("fc_norm") else []
    tensors = {f"{name}.weight": torch.randn(n, k, generator=draw) * k**-0.5 for name, (n, k) in shapes.items()}
    tensors["lm_head.weight"] *= sharpness
    tensors |= {f"{name}.weight": 1 + 0.2 * torch.randn(hidden, generator=draw) for name in norms}
    if config.get("norm_before_fc"):
        tensors["input_norm.weight"] = 1 + 0.2 * torch.randn(taps * hidden, generator=draw)
    if drafts != vocab:
        ids = torch.randperm(vocab, generator=draw)[:drafts].sort().values
        marked = torch.zeros(vocab, dtype=torch.bool)
        marked[ids] = True
        tensors |= {"d2t": ids - torch.arange(drafts), "t2d": marked}
    return tensors


def in_fp8(tensors: Tensors, names: Sequence[str] = ("lm_head.weight", "midlayer.mlp.down_proj.weight")) -> Tensors:
    """The same with some linears as e4m3 with a scale a row."""
    found = dict(tensors)
    for name in names:
        found[name], found[f"{name}_scale"] = quantize(tensors[name])
    return found


def write_head(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Path:
    """config.json and model.safetensors in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def random_head(folder: Path, target: Any, draft_vocab_size: int | None = None, seed: int = 0, **changes: Any) -> Path:
    """A whole random checkpoint for a target (`Toy()`), in one call."""
    config = head_config(target.config, draft_vocab_size, **changes)
    return write_head(folder, config, head_tensors(config, seed))
