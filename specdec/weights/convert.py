"""Moving a part of a lazy tensor into a parameter on its device, block by block, on the way into or out of FP8.

N rows, K columns: a weight [..., N, K] has one scale a row, f32 [..., N], and value = data * scale. An index is a rank's
part of the whole tensor, one slice a dimension, and the parameter has the shape of that part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from specdec.kernels import reference
from specdec.weights.lazy import Index, LazyTensor

_BLOCK = 1 << 25  # elements moved at a time: bounds what the host and the device hold besides the parameter

Advance = Callable[[int], None]  # told the bytes that a parameter has gained


def copy(parameter: Tensor, source: LazyTensor, index: Index, advance: Advance) -> None:
    """Cast where the dtypes differ."""
    for rows, piece in _blocks(index):
        block = parameter[rows]
        block.copy_(source.read(piece).to(parameter.device))  # moved as it is stored, turned on the device
        advance(block.nbytes)


def dequantize(parameter: Tensor, source: LazyTensor, scale: LazyTensor, index: Index, advance: Advance) -> None:
    """FP8 data times the scales of its rows."""
    for rows, piece in _blocks(index):
        data, factor = (t.to(parameter.device).float() for t in (source.read(piece), scale.read(piece[:-1])))
        block = parameter[rows]
        block.copy_(data * factor[..., None])
        advance(block.nbytes)


def quantize(parameter: Tensor, scale: Tensor, source: LazyTensor, index: Index, advance: Advance) -> None:
    """Scales are of whole rows, also where a rank keeps some columns of them: every split holds the same numbers."""
    for rows, piece in _blocks(index):
        whole = source.read((*piece[:-1], source.everything[-1])).to(parameter.device).float()
        data, scale[rows] = reference.quantize(whole)
        block = parameter[rows]
        block.copy_(data[..., piece[-1]])
        advance(block.nbytes)


def _blocks(index: Index) -> Iterator[tuple[Index, Index]]:
    """Pieces of an index along its first dimension: their place in the parameter, and in the whole tensor."""
    if not index:
        yield (), ()
        return
    first, rest = index[0], index[1:]
    inner = 1
    for size in rest:
        inner *= size.stop - size.start
    step = max(1, _BLOCK // max(1, inner))
    for start in range(first.start, first.stop, step):
        stop = min(start + step, first.stop)
        yield (slice(start - first.start, stop - first.start),), (slice(start, stop), *rest)
