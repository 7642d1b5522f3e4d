"""How checkpoints name and lay out their weights, turned into the parameters of `specdec.nn`.

E experts, H hidden, I channels of an expert, N rows, K columns. Hugging Face keeps Llama 4's experts as gate_up_proj [E, H, 2I]
and down_proj [E, I, H] (transformers, modeling_llama4); here every weight is [..., N, K]. An FP8 weight is e4m3 `.weight`, f32
`.weight_scale` [..., N] (value = data * scale) and, where activations have a static scale, f32 `.input_scale` [].

Read are transformers' fbgemm_fp8, whose activation_scale_ub is not applied (it only clips outliers of the activations),
compressed-tensors with a scale a row or a tensor, and NVIDIA ModelOpt's FP8. Ours, fp8_storage, holds every matrix and the
embedding in FP8 for the sake of the file's size alone: it computes as it was trained, multiplied out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.reference import FP8
from specdec.weights.checkpoint import read_json
from specdec.weights.lazy import LazyTensor, stack

__all__ = ["FP8_STORAGE", "is_quantized", "parameters", "quantization"]

FP8_STORAGE = "fp8_storage"  # quant_method of what `specdec train storage=fp8` writes

Tensors = dict[str, LazyTensor]

_READ = "read are bf16, f16 and f32, and FP8 as specdec, fbgemm_fp8, compressed-tensors float-quantized or ModelOpt FP8 do it"
_OTHER_MODALITIES = ("vision_model.", "multi_modal_projector.")
_CACHE_SCALE = re.compile(r"\.(k|v|kv)_scale$")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.((?:gate|up|down)_proj\.(?:weight|weight_scale|input_scale))")
_FUSED = re.compile(r"(.*\.experts)\.(gate_up|down)_proj(?:_(scale|weight_scale|input_scale))?")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantization(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Name of the method a checkpoint was quantised with, None = not at all; ValueError for one that is not read here."""
    text = config.get("text_config") or {}
    stated = config.get("quantization_config") or text.get("quantization_config")
    exported = folder / "hf_quant_config.json"
    if not stated and exported.is_file():
        stated = {"quant_method": "modelopt", **read_json(exported).get("quantization", {})}
    if not stated:
        return None
    method = str(stated.get("quant_method"))
    detail = _unread(method, stated)
    if detail is not None:
        raise ValueError(f"{folder} is quantised by {method}{detail}, which is not read here: {_READ}")
    return method


def _unread(method: str, stated: Mapping[str, Any]) -> str | None:
    """What of a quantisation is not read, None = nothing."""
    if method in ("fbgemm_fp8", FP8_STORAGE):
        return None
    if method == "modelopt":
        algorithm = stated.get("quant_algo")
        return None if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN") else f" as {algorithm}"
    if method != "compressed-tensors":
        return ""
    if stated.get("format") != "float-quantized":
        return f" as {stated.get('format')}"
    for group in (stated.get("config_groups") or {}).values():
        strategy, inputs = group["weights"].get("strategy"), group.get("input_activations") or {}
        if strategy not in ("channel", "tensor"):
            return f" with {strategy}-wise scales of the weights"
        if inputs.get("strategy") != ("token" if inputs.get("dynamic") else "tensor"):
            return f" with {inputs.get('strategy', 'no')}-wise scales of the activations"
    return None


def is_quantized(tensors: Tensors) -> bool:
    """Whether any layer's weights are FP8."""
    return any(tensor.dtype == FP8 and ".layers." in name for name, tensor in tensors.items())


def parameters(tensors: Iterable[tuple[str, LazyTensor]], tied: bool = False) -> Tensors:
    """A checkpoint's tensors by the names, shapes and orientation of the model's parameters; reads no data."""
    return check_tensors(merge_experts(split_experts(text_model(tensors, tied))))


def text_model(tensors: Iterable[tuple[str, LazyTensor]], tied: bool) -> Tensors:
    """Without the prefix and the other parts of a multimodal checkpoint, the cache's scales, and a tied head's copy."""
    kept: Tensors = {}
    ignored: list[str] = []
    for full, tensor in tensors:
        name = full.removeprefix("language_model.")
        if name.startswith(_OTHER_MODALITIES) or (tied and name == "lm_head.weight"):
            continue
        if _CACHE_SCALE.search(name):
            ignored.append(name)
            continue
        _put(kept, name, tensor)
    if ignored:
        warnings.warn(f"{ignored[0]} and its like are ignored: the KV cache here is not quantised", stacklevel=2)
    return kept


def split_experts(tensors: Tensors) -> Tensors:
    """Hugging Face's fused experts: gate (first half) and up apart, inputs last; scales follow their rows."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            _put(found, name, tensor)
            continue
        experts, which, kind = match[1], match[2], match[3] or "weight"
        weight = tensors.get(f"{experts}.{which}_proj")
        if weight is None:
            raise ValueError(f"the checkpoint has {name} but no weight for it: fetch the checkpoint again")
        rows = (weight.shape[0], weight.shape[-1])
        if kind == "weight":
            tensor = tensor.transpose()
        elif kind != "input_scale":
            kind, tensor = "weight_scale", row_scales(name, tensor, rows)
        for part, share in _shares(which, kind, tensor):
            _put(found, f"{experts}.{part}.{kind}", share)
    return found


def _shares(which: str, kind: str, tensor: LazyTensor) -> list[tuple[str, LazyTensor]]:
    """The linears that a fused expert tensor [E, N, ...] holds, and their rows of it."""
    if which == "down":
        return [("down_proj", tensor)]
    if kind == "input_scale":
        return [("gate_proj", tensor), ("up_proj", tensor)]
    half = tensor.shape[1] // 2
    return [("gate_proj", tensor.narrow(1, 0, half)), ("up_proj", tensor.narrow(1, half, half))]


def merge_experts(tensors: Tensors) -> Tensors:
    """Experts written one by one, as ModelOpt and compressed-tensors export them, as one tensor [E, ...]."""
    found: Tensors = {}
    groups: dict[str, dict[int, LazyTensor]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            _put(found, name, tensor)
        else:
            groups.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
    for name, group in groups.items():
        parts = [group[i] for i in sorted(group)]
        if sorted(group) != list(range(len(group))) or len({(part.shape, part.dtype) for part in parts}) > 1:
            raise ValueError(f"the experts of {name} are not all there, or not all alike: fetch the checkpoint again")
        _put(found, name, stack(parts))
    return found


def check_tensors(tensors: Tensors) -> Tensors:
    """Scales as the parameters hold them, of several input scales the largest; ValueError on dtypes that are not read."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        weight = tensors.get(name.removesuffix("_scale")) if name.endswith(".weight_scale") else None
        if weight is not None and weight.dtype == FP8:
            tensor = row_scales(name, tensor, weight.shape[:-1])
        elif weight is not None:
            raise ValueError(f"{name} scales a weight of {weight.dtype}: {_READ}")
        elif name.endswith(".input_scale"):
            tensor = tensor.map(_largest, (), torch.float32)
        elif tensor.dtype not in (*_FLOATS, FP8):
            raise ValueError(f"{name} is {tensor.dtype}: {_READ}")
        found[name] = tensor
    return found


def _largest(scales: Tensor) -> Tensor:
    return scales.float().amax()


def row_scales(name: str, scale: LazyTensor, rows: tuple[int, ...]) -> LazyTensor:
    """One scale in all, of each expert or of each row, as f32 [..., N]; ValueError for others (block-wise ones)."""
    sizes = tuple(size for size in scale.shape if size != 1)
    if sizes in ((), tuple(size for size in rows if size != 1)):
        shape = rows if sizes else (1,) * len(rows)
    elif len(rows) == 2 and sizes == rows[:1]:
        shape = (rows[0], 1)
    else:
        raise ValueError(f"{name} {list(scale.shape)} is neither one scale nor one for each row {list(rows)}: {_READ}")
    if scale.dtype not in _FLOATS:
        raise ValueError(f"{name} is {scale.dtype}: {_READ}")
    return scale.map(lambda whole: whole.float().reshape(shape).expand(rows), rows, torch.float32)


def _put(tensors: Tensors, name: str, tensor: LazyTensor) -> None:
    if name in tensors:
        raise ValueError(f"the checkpoint holds {name} twice: fetch the checkpoint again")
    tensors[name] = tensor
