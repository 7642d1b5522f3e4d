"""Random weights for a model of any size, made where they stay: to measure speed, which values hardly change.

N rows, K columns. Weights have variance 1 / K, so that activations keep their size from layer to layer; norms are 1.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from specdec.kernels.reference import FP8, FP8_MAX
from specdec.nn import DecoderModel

_BLOCK = 1 << 25  # elements drawn at a time
_INPUT = 8.0  # largest input of an FP8 product, static as in the checkpoints of NVIDIA: eight standard deviations
_SPREAD = 96.0  # standard deviation of FP8 data: its tails reach the largest value, few saturate


@torch.no_grad()
def fill_random(model: DecoderModel, seed: int = 0) -> None:
    """Seeded values in every parameter, on its device. Ranks agree on the parameters that each holds whole."""
    state = dict(model.named_parameters())
    for name, parameter in state.items():
        if name.endswith("input_scale"):
            parameter.fill_(_INPUT / FP8_MAX)
        if name.endswith("_scale"):
            continue
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        split = getattr(parameter, "shard_dim", None)
        columns = parameter.shape[-1] * (model.shard.world if split == parameter.dim() - 1 else 1)
        rank = 0 if split is None else model.shard.rank
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{seed} {name} {rank}".encode()))
        if parameter.dtype == FP8:
            _draw(parameter, _SPREAD, generator)
            state[f"{name}_scale"].fill_(columns**-0.5 / _SPREAD)
        else:
            _draw(parameter, columns**-0.5, generator)


def _draw(parameter: Tensor, spread: float, generator: torch.Generator) -> None:
    """Normal values in pieces, within what FP8 holds."""
    rows = max(1, _BLOCK // parameter[0].numel())
    for piece in torch.split(parameter, rows):
        values = torch.randn(piece.shape, generator=generator, device=piece.device) * spread
        piece.copy_(values.clamp_(-FP8_MAX, FP8_MAX))
