"""Matrix products with few tokens: prepacked weights, RMSNorm in front, residual or SwiGLU behind, one kernel each.

Layout: [N, K] weights become panels of 32 outputs, 128 bytes a step: [N/32, K/2, 32, 2] in bf16, [N/32, K, 32] in f32. A
panel is read once, front to back, whatever the number of tokens, so a product of 1 to 6 tokens costs the memory traffic of
the weights. An output is a single chain of sums over K: its bits do not depend on how many tokens share the product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numba import carray, njit, types
from torch import Tensor

from specdec.kernels.cpu import simd, tiles
from specdec.kernels.cpu.memory import aligned_empty, weight_empty
from specdec.kernels.cpu.parallel import MAX_ARGS, bits_of, check_real, finish, kernel, take

PANEL = 32
STORE, ADD, SWIGLU = 0, 1, 2
_KIND = "bf16_dot" if simd.has_bf16_dot() else "bf16_fma"
_b1, _b2, _b3, _b4, _b5, _b6, _b7, _b8 = (tiles.make_tile(m, _KIND) for m in range(1, 9))
_f1, _f2, _f3, _f4, _f5, _f6, _f7, _f8 = (tiles.make_tile(m, "f32") for m in range(1, 9))
_CHUNKS = 64  # of a product with many panels; few enough that taking them costs nothing
_TOKENS = 8  # of one tile: 16 accumulators and what feeds them fit the vector registers


@dataclass(slots=True)
class PackedLinear:
    """Weights of one product, packed. `data` is 64-byte aligned; `outputs` and `inputs` are N and K."""

    data: Tensor
    outputs: int
    inputs: int
    dtype: torch.dtype
    swiglu: bool = False  # rows are [gate; up], interleaved by 16


def pack(weight: Tensor, swiglu: bool = False) -> PackedLinear:
    """Pack [N, K] weights (bf16 or f32). With `swiglu` the rows are [gate; up]; a panel takes 16 of each."""
    outputs, inputs = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    if weight.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"packed weights are bfloat16 or float32, got {weight.dtype}; set target.dtype to one of them")
    if inputs % pair:
        raise ValueError(f"bfloat16 products need an even number of inputs, got {inputs}; use target.dtype=float32")
    if swiglu:
        if outputs % 32:
            raise ValueError(
                f"the intermediate size must be a multiple of 16, got {outputs / 2:g}; use target.backend=torch"
            )
        gate, up = weight.chunk(2)
        weight = torch.stack([gate.view(-1, 16, inputs), up.view(-1, 16, inputs)], dim=1).reshape(-1, inputs)
    else:
        weight = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % PANEL))
    panels = weight.view(-1, PANEL, inputs // pair, pair).transpose(1, 2)
    data = weight_empty(panels.numel(), weight.dtype)
    data.view(panels.shape).copy_(panels)
    return PackedLinear(data, outputs, inputs, weight.dtype, swiglu)


@njit(error_model="numpy")
def _tile(panel, x, x_stride, steps, out, tokens, bf16):
    if bf16:
        if tokens == 1:
            _b1(panel, x, x_stride, steps, out, 128)
        elif tokens == 2:
            _b2(panel, x, x_stride, steps, out, 128)
        elif tokens == 3:
            _b3(panel, x, x_stride, steps, out, 128)
        elif tokens == 4:
            _b4(panel, x, x_stride, steps, out, 128)
        elif tokens == 5:
            _b5(panel, x, x_stride, steps, out, 128)
        elif tokens == 6:
            _b6(panel, x, x_stride, steps, out, 128)
        elif tokens == 7:
            _b7(panel, x, x_stride, steps, out, 128)
        else:
            _b8(panel, x, x_stride, steps, out, 128)
    elif tokens == 1:
        _f1(panel, x, x_stride, steps, out, 128)
    elif tokens == 2:
        _f2(panel, x, x_stride, steps, out, 128)
    elif tokens == 3:
        _f3(panel, x, x_stride, steps, out, 128)
    elif tokens == 4:
        _f4(panel, x, x_stride, steps, out, 128)
    elif tokens == 5:
        _f5(panel, x, x_stride, steps, out, 128)
    elif tokens == 6:
        _f6(panel, x, x_stride, steps, out, 128)
    elif tokens == 7:
        _f7(panel, x, x_stride, steps, out, 128)
    else:
        _f8(panel, x, x_stride, steps, out, 128)


@njit(error_model="numpy")
def _normalise(x, weight, eps, inputs, out, bf16):
    """RMSNorm of one f32 row into the product's input type; weight = 0 only converts."""
    scale = simd.splat(1.0)
    vectors = inputs // 16
    if weight != 0:
        squares = simd.splat(0.0)
        for i in range(vectors):
            v = simd.load_f32(x + 64 * i)
            squares = simd.fma(v, v, squares)
        total = simd.horizontal_sum(squares)
        scale = simd.splat(
            types.float32(1.0) / types.float32((total / types.float32(inputs) + eps) ** types.float32(0.5))
        )
    for i in range(vectors):
        v = simd.mul(simd.load_f32(x + 64 * i), scale)
        if weight != 0:
            v = simd.mul(v, simd.load_f32(weight + 64 * i))
        if bf16:
            simd.store_bf16(out + 32 * i, v)
        else:
            simd.store_f32(out + 64 * i, v)


@njit(error_model="numpy")
def _finish(tile, tokens, out, out_stride, first, outputs, epilogue, bf16):
    """Write a tile [tokens, 32] f32 where it belongs; `first` is the panel's first output (of the gate for SWIGLU)."""
    width = 16 if epilogue == SWIGLU else PANEL
    whole = first + width <= outputs
    for t in range(tokens):
        low, high = simd.load_f32(tile + 128 * t), simd.load_f32(tile + 128 * t + 64)
        row = out + out_stride * t
        if epilogue == SWIGLU:
            low = simd.mul(simd.silu(low), high)
            if bf16:
                simd.store_bf16(row + 2 * first, low)
            else:
                simd.store_f32(row + 4 * first, low)
        elif whole:
            if epilogue == ADD:
                low = simd.add(simd.load_f32(row + 4 * first), low)
                high = simd.add(simd.load_f32(row + 4 * first + 64), high)
            simd.store_f32(row + 4 * first, low)
            simd.store_f32(row + 4 * first + 64, high)
        else:
            for i in range(outputs - first):
                value = simd.load_scalar(tile + 128 * t + 4 * i)
                address = row + 4 * (first + i)
                if epilogue == ADD:
                    value = simd.load_scalar(address) + value
                simd.store_scalar(address, value)


@njit(error_model="numpy")
def _linear(a, thread):
    """A thread prepares all inputs for itself when it takes its first chunk (cheap, and nobody waits)."""
    chunk = take(a)
    if chunk >= a[1]:
        return
    data, outputs, inputs, tokens, per_chunk = a[2], a[3], a[4], a[5], a[6]
    x, x_stride, norm, scratch, scratch_size = a[7], a[8], a[9], a[10], a[11]
    out, out_stride, epilogue, bf16, convert = a[12], a[13], a[14], a[15] == 1, a[16] == 1
    tile = scratch + scratch_size * thread
    if convert:
        eps, parts, part_stride = simd.float_of(a[17]), a[18], a[19]
        ready, share = tile + 128 * _TOKENS, inputs // a[18]
        ready_stride = inputs * (2 if bf16 else 4)
        for t in range(tokens):
            for p in range(parts):  # where there is no norm there is one part
                target = ready + ready_stride * t + ready_stride // parts * p
                _normalise(x + x_stride * t + part_stride * p, norm + 4 * share * p, eps, share, target, bf16)
        x, x_stride = ready, ready_stride
    width = 16 if epilogue == SWIGLU else PANEL
    panels = (outputs + width - 1) // width
    steps = inputs // 2 if bf16 else inputs
    while chunk < a[1]:
        for panel in range(chunk * per_chunk, min((chunk + 1) * per_chunk, panels)):
            done = 0
            while done < tokens:
                count = min(_TOKENS, tokens - done)
                _tile(data + panel * steps * 128, x + x_stride * done, x_stride, steps, tile, count, bf16)
                _finish(tile, count, out + out_stride * done, out_stride, panel * width, outputs, epilogue, bf16)
                done += count
        finish(a)
        chunk = take(a)


@kernel
def _run_linear(args, thread):
    _linear(carray(args, (MAX_ARGS,)), thread)


class Linear:
    """The product's launcher: holds the scratch memory of the threads."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __call__(
        self,
        x: Tensor,
        weight: PackedLinear,
        out: Tensor,
        epilogue: int = STORE,
        norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """out [M, N] = (STORE) or += (ADD) x [M, K] @ weight.T, or [M, N/2] = silu(gate) * up (SWIGLU).

        With norm f32 [K] the product takes RMSNorm(x) * norm; of x [P, M, K/P] with norm [P, K/P] each part by itself, side
        by side. x is f32 (normalised and rounded here) or already in the weights' dtype. Rows are contiguous.
        """
        check_real(x)
        bf16 = weight.dtype == torch.bfloat16
        convert = norm is not None or x.dtype != weight.dtype
        tokens, parts = x.shape[-2], x.numel() // x.shape[-2] // x.shape[-1]
        assert not convert or (x.dtype == torch.float32 and weight.inputs % (16 * parts) == 0)
        assert parts * x.shape[-1] == weight.inputs
        assert weight.swiglu == (epilogue == SWIGLU)
        size = 128 * _TOKENS + (tokens * weight.inputs * 4 if convert else 0) + 64
        size += -size % 64
        if self._scratch.numel() < size * torch.get_num_threads():
            self._scratch = aligned_empty(size * torch.get_num_threads(), torch.uint8)
        outputs = weight.outputs // 2 if weight.swiglu else weight.outputs
        panels = -(-outputs // (16 if weight.swiglu else PANEL))
        per_chunk = max(1, panels // _CHUNKS)
        _run_linear(
            weight.data.data_ptr(), outputs, weight.inputs, tokens, per_chunk,
            x.data_ptr(), x.stride(-2) * x.element_size(), 0 if norm is None else norm.data_ptr(),
            self._scratch.data_ptr(), size, out.data_ptr(), out.stride(0) * out.element_size(), epilogue,
            int(bf16), int(convert), bits_of(eps), parts, 4 * x.stride(0),
            chunks=-(-panels // per_chunk), keep=(self._scratch, x, out),
        )  # fmt: skip
        return out


linear = Linear()
