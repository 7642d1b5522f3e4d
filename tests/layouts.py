"""Small checkpoints in the layouts that FP8 tools write, made by hand from one set of weights under this runtime's names.

E experts, H hidden, I channels of an expert, N rows, K columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.kernels.reference import FP8
from specdec.nn import DecoderModel, ModelConfig

Tensors = dict[str, Tensor]

LLAMA4: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 32,
    "intermediate_size_mlp": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 3,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 512,
}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
MODELOPT = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "*router*"]}


def weights(seed: int = 0) -> Tensors:
    """Unquantised bf16 weights (norms f32) for LLAMA4, by parameter name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = DecoderModel(ModelConfig.from_huggingface(LLAMA4), torch.bfloat16)
    made = {}
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        value = 1 + 0.2 * value if parameter.dim() == 1 else value * parameter.shape[-1] ** -0.5
        made[name] = value.to(parameter.dtype)
    return made


def is_linear(name: str) -> bool:
    """What is FP8 in a quantised model."""
    return bool(re.search(r"layers.*_proj\.weight$", name))


def quantized(tensors: Tensors, per_tensor: bool = False, skip: str = "$^") -> Tensors:
    """Linears as e4m3 and scales [..., N]; with one scale a matrix there is an input scale as well."""
    made: Tensors = {}
    for name, value in tensors.items():
        if not is_linear(name) or re.search(skip, name):
            made[name] = value
            continue
        dims = (-2, -1) if per_tensor else (-1,)
        scale = value.float().abs().amax(dims, keepdim=True) / 448
        made[name] = (value.float() * (1.0 / scale)).clamp(-448, 448).to(FP8)
        made[f"{name}_scale"] = scale.expand(*value.shape[:-1], 1).squeeze(-1).contiguous()
        if per_tensor:
            made[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.01 + len(made) / 1000)
    return made


def fused(tensors: Tensors) -> Tensors:
    """Hugging Face's experts: gate_up_proj [E, H, 2I], down_proj [E, I, H]; scales [E, 1, 2I] and [E, H, 1]."""
    made = {}
    for name, value in tensors.items():
        stem = name.split(".experts.")[0] + ".experts."
        if ".experts." not in name:
            made[name] = value[:, None] if name.endswith("weight_scale") else value
        elif name.endswith("gate_proj.weight"):
            both = torch.cat([value.float(), tensors[name.replace("gate", "up")].float()], 1).to(value.dtype)
            made[f"{stem}gate_up_proj"] = both.transpose(1, 2).contiguous()
        elif name.endswith("gate_proj.weight_scale"):
            made[f"{stem}gate_up_proj_scale"] = torch.cat([value, tensors[name.replace("gate", "up")]], 1)[:, None]
        elif name.endswith("down_proj.weight"):
            made[f"{stem}down_proj"] = value.transpose(1, 2).contiguous()
        elif name.endswith("down_proj.weight_scale"):
            made[f"{stem}down_proj_scale"] = value[:, :, None]
    return made


def one_by_one(tensors: Tensors, per_tensor: bool) -> Tensors:
    """Every expert's linears by themselves; scales [N, 1], or [] with one scale a matrix."""
    made = {}
    for name, value in tensors.items():
        experts = [(name, value)]
        if ".experts." in name:
            count = LLAMA4["num_local_experts"]
            rows = [value] * count if value.dim() == 0 else list(value)
            experts = [(name.replace(".experts.", f".experts.{i}."), rows[i]) for i in range(count)]
        for full, part in experts:
            if full.endswith("weight_scale"):
                part = part[0] if per_tensor else part[:, None]
            made[full] = part.clone()
    return made


def write(folder: Path, tensors: Tensors, config: dict[str, Any], files: int = 1) -> Path:
    """A checkpoint folder of one file or of several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if files == 1:
        save_file({name: tensors[name].contiguous() for name in names}, folder / "model.safetensors")
        return folder
    where = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file({name: tensors[name].contiguous() for name in names[i::files]}, folder / file)
        where |= dict.fromkeys(names[i::files], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def write_fbgemm(folder: Path) -> Tensors:
    """Returns what the parameters must become."""
    wanted = quantized(weights())
    write(folder, fused(wanted), LLAMA4 | {"quantization_config": FBGEMM})
    return wanted


def write_compressed(folder: Path) -> Tensors:
    """Within a multimodal wrapper, over three files."""
    wanted = quantized(weights())
    tensors = {f"language_model.{name}": value for name, value in one_by_one(wanted, False).items()}
    tensors |= {"vision_model.layernorm.weight": torch.ones(3), "multi_modal_projector.linear_1.weight": torch.ones(2)}
    write(folder, tensors, {"model_type": "llama4", "text_config": LLAMA4, "quantization_config": COMPRESSED}, files=3)
    return wanted


def write_modelopt(folder: Path) -> Tensors:
    """Static scales, one a matrix; each expert its own."""
    wanted = quantized(weights(), per_tensor=True)
    write(folder, one_by_one(wanted, True) | {"model.layers.0.self_attn.k_proj.k_scale": torch.ones(())}, LLAMA4)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": MODELOPT}))
    return wanted


def write_modelopt_fused(folder: Path) -> Tensors:
    """The experts of a layer in one tensor, with one scale for all of gate and up and one for all of down."""
    wanted = quantized(weights(), per_tensor=True)
    tensors = fused({name: value for name, value in wanted.items() if value.dim()})
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[name] = tensors[name].flatten()[0]
    tensors |= {name: value for name, value in wanted.items() if value.dim() == 0 and ".experts." not in name}
    for which, linears in (("gate_up", ("gate", "up")), ("down", ("down",))):
        stem = "model.layers.1.feed_forward.experts."
        del tensors[f"{stem}{which}_proj_scale"]
        tensors[f"{stem}{which}_proj_weight_scale"] = torch.tensor(0.003)
        tensors[f"{stem}{which}_proj_input_scale"] = torch.tensor([0.25])
        for linear in linears:
            wanted[f"{stem}{linear}_proj.weight_scale"].fill_(0.003)
            wanted[f"{stem}{linear}_proj.input_scale"].fill_(0.25)
    write(folder, tensors, LLAMA4 | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}})
    return wanted


LAYOUTS: dict[str, Callable[[Path], Tensors]] = {
    "fbgemm": write_fbgemm,
    "compressed": write_compressed,
    "modelopt": write_modelopt,
    "modelopt-fused": write_modelopt_fused,
}


def same(value: Tensor, wanted: Tensor) -> bool:
    """Bits and dtype."""
    if value.dtype != wanted.dtype or value.shape != wanted.shape:
        return False
    if value.dtype == FP8:
        value, wanted = value.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)
    return torch.equal(value, wanted)


def last_logits(target: Any, text: list[int]) -> Tensor:
    """What a target says after a text, [V]."""
    target.allocate(1, len(text) + 8, 1)
    logits: Tensor = target.prefill(torch.tensor([text]), torch.tensor([len(text)])).logits[0, 0]
    return logits
