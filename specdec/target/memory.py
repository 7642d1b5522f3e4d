"""Whether a model fits its device, found out before minutes of loading. Sizes in bytes, in messages in GB of 1e9."""

from __future__ import annotations

import os

import torch

from specdec.kernels.reference import FP8
from specdec.nn import DecoderModel, ModelConfig
from specdec.nn.parallel import Shard


def check_weights(model: DecoderModel, device: torch.device) -> None:
    """ValueError where the parameters of a meta model are more than the device has."""
    need, have = sum(parameter.nbytes for parameter in model.parameters()), capacity(device)
    if need > have:
        token = kv_bytes(model.config, model.shard, model.dtype)
        quantized = any(parameter.dtype == FP8 for parameter in model.parameters())
        remedy = "use more ranks" if quantized else "use more ranks or target.quantize=fp8"
        raise ValueError(
            f"the weights of rank {model.shard.rank} of {model.shard.world} need {need / 1e9:.1f} GB "
            f"({token / 1e3:.0f} kB more for each token of context), and {device} has {have / 1e9:.1f} GB: {remedy}"
        )


def check_cache(config: ModelConfig, shard: Shard, dtype: torch.dtype, tokens: int, device: torch.device) -> None:
    """ValueError where a KV cache of so many tokens, all rows together, is more than the device has left."""
    need, have = tokens * kv_bytes(config, shard, dtype), capacity(device)
    if need > have:
        raise ValueError(
            f"a KV cache of {tokens} tokens needs {need / 1e9:.1f} GB, and {device} has {have / 1e9:.1f} GB: "
            "use more ranks, a smaller batch_size or shorter prompts and answers"
        )


def kv_bytes(config: ModelConfig, shard: Shard, dtype: torch.dtype) -> int:
    """Of one token, keys and values of all layers on one rank."""
    return 2 * config.num_layers * config.num_kv_heads // shard.world * config.head_dim * dtype.itemsize


def capacity(device: torch.device) -> int:
    """Free bytes of a GPU, with what torch holds unused; all the memory of the machine, whose free part files fill."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
