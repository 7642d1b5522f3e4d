"""How weights lie for the kernels, the rows that a program needs together side by side; and products by the vendor's."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from specdec.kernels.reference import FP8, Fp8Weight, Weight

__all__ = ["data", "descriptor", "interleave", "pair_heads", "row_scale", "shape", "static_scale"]


def interleave(weight: Weight) -> Weight:
    """Rows [gate; up] of weights [..., 2 I, K] as gate 0, up 0, gate 1, ..., so that a program holds pairs."""
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(_alternate_bytes(weight.data, -2), _alternate(weight.scale, -1), weight.input_scale)
    return _alternate(weight, -2)


def pair_heads(weight: Weight, size: int) -> Weight:
    """Rows [N, K] of heads of `size` channels: the two that the rotary embedding turns stand together."""
    if isinstance(weight, Fp8Weight):
        rows = _alternate_bytes(weight.data.unflatten(0, (-1, size)), 1).flatten(0, 1)
        return Fp8Weight(rows, _alternate(weight.scale.view(-1, size), 1).flatten(), weight.input_scale)
    return _alternate(weight.unflatten(0, (-1, size)), 1).flatten(0, 1)


def _alternate_bytes(rows: Tensor, dim: int) -> Tensor:
    return _alternate(rows.view(torch.uint8), dim).view(FP8)


def _alternate(rows: Tensor, dim: int) -> Tensor:
    """The two halves along `dim`, in turns."""
    dim %= rows.ndim
    return torch.stack(rows.chunk(2, dim), dim + 1).reshape(rows.shape)


def data(weight: Weight) -> Tensor:
    """The matrix itself."""
    return weight if isinstance(weight, Tensor) else weight.data


def shape(weight: Weight) -> tuple[int, int]:
    """Outputs and inputs."""
    n, k = data(weight).shape
    return n, k


def row_scale(weight: Weight) -> Tensor:
    """Scales of the rows; for a plain weight something that is never read."""
    return weight if isinstance(weight, Tensor) else weight.scale


def static_scale(weight: Weight | None) -> Tensor | None:
    """The scale f32 [1] that a checkpoint gives for the inputs, if any."""
    if weight is None or isinstance(weight, Tensor) or weight.input_scale is None:
        return None
    return weight.input_scale.view(1)


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor | None:
    """Blocks of a matrix [..., K], leading dimensions as one, for the tensor memory accelerator; None where it is unaligned."""
    if matrix.shape[-1] * matrix.element_size() % 16 or matrix.data_ptr() % 16 or not matrix.is_contiguous():
        return None
    return TensorDescriptor.from_tensor(matrix.view(-1, matrix.shape[-1]), [rows, columns])
