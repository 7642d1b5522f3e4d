"""Rotary position tables (2104.09864), with Llama 3's long-context frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specdec.nn.config import ModelConfig


def rope_tables(config: ModelConfig, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, f32 [positions, head_dim / 2]; channel i pairs with i + head_dim / 2."""
    half = config.head_dim // 2
    frequency = 1.0 / config.rope_theta ** (torch.arange(half, dtype=torch.int64).float() * 2 / config.head_dim)
    if config.rope_scaling is not None:
        frequency = _llama3(frequency, config)
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * frequency
    return angle.cos().contiguous().to(device), angle.sin().contiguous().to(device)


def _llama3(frequency: Tensor, config: ModelConfig) -> Tensor:
    """Slow frequencies are divided by `factor`, fast ones kept, those between blended."""
    assert config.rope_scaling is not None
    scaling = config.rope_scaling
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * frequency / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    blended: Tensor = keep * frequency + (1 - keep) * frequency / factor
    return blended
