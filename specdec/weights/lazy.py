"""Tensors that know their shape and dtype and read only what is asked for, so that a rank touches only its own part.

E experts, N rows, K columns. An index has one slice a dimension, start and stop given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Index = tuple[slice, ...]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor somewhere else. Views of it cost nothing until they are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[Index], Tensor]

    @classmethod
    def of(cls, tensor: Tensor | LazyTensor) -> LazyTensor:
        """A tensor in memory under the same interface."""
        if isinstance(tensor, LazyTensor):
            return tensor
        return cls(tuple(tensor.shape), tensor.dtype, lambda index: tensor.detach()[index])

    @classmethod
    def in_file(cls, file: Any, name: str) -> LazyTensor:
        """One tensor of an open safetensors file; ValueError on a dtype torch has no arithmetic for."""
        header = file.get_slice(name)
        kind = header.get_dtype()
        if kind not in _DTYPES:
            raise ValueError(f"{name} has dtype {kind}, which is not read here ({', '.join(_DTYPES)})")
        shape = tuple(header.get_shape())
        return cls(shape, _DTYPES[kind], lambda index: header[index])

    @property
    def everything(self) -> Index:
        return tuple(slice(0, size) for size in self.shape)

    def read(self, index: Index | None = None) -> Tensor:
        """The part under an index, as a CPU tensor with its dimensions in the order of `shape`, strides as stored."""
        tensor = self.fetch(self.everything if index is None else index)
        assert tensor.dtype == self.dtype
        return tensor

    def narrow(self, dim: int, start: int, length: int) -> LazyTensor:
        """`length` entries from `start` on along one dimension."""
        assert 0 <= start <= start + length <= self.shape[dim]

        def fetch(index: Index) -> Tensor:
            here = slice(index[dim].start + start, index[dim].stop + start)
            return self.fetch((*index[:dim], here, *index[dim + 1 :]))

        return LazyTensor((*self.shape[:dim], length, *self.shape[dim + 1 :]), self.dtype, fetch)

    def transpose(self) -> LazyTensor:
        """The last two dimensions swapped."""
        *outer, rows, columns = self.shape
        return LazyTensor(
            (*outer, columns, rows),
            self.dtype,
            lambda index: self.fetch((*index[:-2], index[-1], index[-2])).transpose(-1, -2),
        )

    def map(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
        """`function` of the whole tensor, for small ones such as scales."""
        return LazyTensor(shape, dtype, lambda index: function(self.read())[index])


def stack(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Equal tensors [...] as one [E, ...]; only the parts under an index are read."""
    assert len({(part.shape, part.dtype) for part in parts}) == 1
    return LazyTensor(
        (len(parts), *parts[0].shape),
        parts[0].dtype,
        lambda index: torch.stack([part.fetch(index[1:]) for part in parts[index[0]]]),
    )
