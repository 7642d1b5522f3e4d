"""From what a user asks for to a filled model: every mistake is found from headers, before memory is taken or data read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from specdec.nn import DecoderModel, ModelConfig, Shard
from specdec.target.formats import FP8_STORAGE, is_quantized, parameters, quantization
from specdec.target.memory import check_weights
from specdec.target.presets import read_preset
from specdec.target.random import fill_random
from specdec.weights import checkpoint as checkpoints
from specdec.weights.checkpoint import Named

QUANTIZE, WEIGHTS = ("auto", "fp8", "none"), ("checkpoint", "random")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from."""

    config: ModelConfig
    folder: Path | None  # None: a built-in configuration
    tensors: Iterable[Named] | None  # by parameter name; None: random ones
    quantized: bool  # whether the layers' linears are to be FP8


def open_source(checkpoint: str | Path | None, preset: str | None, quantize: str, weights: str) -> Source:
    """Read the configuration and the headers. `preset` counts only where no checkpoint is given."""
    for option, value, known in (("quantize", quantize, QUANTIZE), ("weights", weights, WEIGHTS)):
        if value not in known:
            raise ValueError(f"target.{option}={value} is unknown; choose one of {', '.join(known)}")
    loads = weights == "checkpoint"
    if checkpoint is None:
        if loads:
            raise ValueError("target.checkpoint names no weights: give a folder or Hub name, or target.weights=random")
        return Source(ModelConfig.from_huggingface(read_preset(preset)), None, None, quantize == "fp8")
    folder = checkpoints.resolve(checkpoint, weights=loads)
    stated = checkpoints.read_config(folder)
    config = ModelConfig.from_huggingface(stated)
    method = quantization(folder, stated)
    tensors = parameters(checkpoints.iter_tensors(folder), config.tie_word_embeddings) if loads else None
    if quantize == "auto":
        stated_or_seen = method is not None or (tensors is not None and is_quantized(tensors))
        fp8 = stated_or_seen and method != FP8_STORAGE
    else:
        fp8 = quantize == "fp8"
    return Source(config, folder, None if tensors is None else tensors.items(), fp8)


def make_model(
    config: ModelConfig,
    tensors: Iterable[Named] | None,
    dtype: torch.dtype,
    device: torch.device,
    quantized: bool,
    shard: Shard,
    seed: int,
) -> DecoderModel:
    """A filled model; tensors None = seeded random ones. A model without memory is matched and measured first."""
    with torch.device("meta"):
        plan = DecoderModel(config, dtype, quantized, shard)
    if tensors is not None:
        tensors = checkpoints.match(plan, tensors, shard).items()
    check_weights(plan, device)
    with device:
        model = DecoderModel(config, dtype, quantized, shard)
    if tensors is None:
        fill_random(model, seed)
    else:
        checkpoints.load_state(model, tensors, shard)
    return model


def parse_shard(shard: str | None) -> Shard:
    """ "3/8" is rank 3 of 8."""
    if shard is None:
        return Shard()
    rank, slash, world = shard.partition("/")
    if not (slash and rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"target.shard={shard} is not a rank and how many there are: write 0/8 to 7/8")
    return Shard(int(rank), int(world))
