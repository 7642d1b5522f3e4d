"""Choosing a token by Gumbel-max in one pass over the logits; noise is made in full only where it could win.

A logarithm costs as much as a hundred logits, and 49,000 a token would cost as much as the forward. But the exponent of a
hashed number bounds its noise, so most tokens are out by one addition. The uniform noise is `specdec.sampling.uniform` to the
bit; logarithms are taken in f64, so last bits may differ from torch's.

Shapes: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from llvmlite import ir
from numba import carray, njit, types
from torch import Tensor

from specdec.kernels.cpu import simd
from specdec.kernels.cpu.parallel import MAX_ARGS, finish, kernel, take
from specdec.kernels.cpu.simd import LANES, VF, VI, broadcast, constant, integers
from specdec.kernels.cpu.steps import _argmax_row

_MUL1, _MUL2, _LOW = 0x7FEB352D, 0x846CA68B, 0xFFFFFFFF
_SPAN = 256  # logits between two looks at the best so far
_FEW = 2  # predictions that are done before another thread has woken up


def _mixed(b, x):
    """lowbias32 (Wellons 2018) on 16 lanes."""
    x = b.mul(b.xor(x, b.lshr(x, integers(16))), integers(_MUL1))
    x = b.mul(b.xor(x, b.lshr(x, integers(15))), integers(_MUL2))
    return b.xor(x, b.lshr(x, integers(16)))


@simd.op(simd.vec, types.int64, types.int64)
def noise_bound(b, first, key):
    """No noise of the 16 token ids from `first` on is above this: -log(-log(1 - u)) <= -log(u) <= -floor(log2(u)) log(2)."""
    ids = b.add(broadcast(b, b.trunc(first, simd.I32), VI), ir.Constant(VI, list(range(LANES))))
    keys = broadcast(b, b.trunc(key, simd.I32), VI)
    bits = _mixed(b, b.xor(_mixed(b, b.add(ids, keys)), keys))
    exponent = b.lshr(
        b.bitcast(b.uitofp(bits, VF), VI), integers(23)
    )  # 127 + floor(log2(bits)), where 0 has exponent 0
    return b.fmul(b.uitofp(b.sub(integers(127 + 32), exponent), VF), constant(math.log(2)))


@njit(error_model="numpy")
def _mix(x):
    """lowbias32 on one number, kept in an int64."""
    x = ((x ^ (x >> 16)) * _MUL1) & _LOW
    x = ((x ^ (x >> 15)) * _MUL2) & _LOW
    return x ^ (x >> 16)


@njit(error_model="numpy")
def _score(row, index, temperature, key):
    """Logit over temperature plus noise, f32."""
    bits = _mix(_mix((index + key) & _LOW) ^ key)
    u = min(types.float32((bits + 0.5) * 2.0**-32), types.float32(1 - 2.0**-24))
    noise = types.float32(-math.log(-math.log1p(-types.float64(u))))
    return types.float32(types.float32(simd.load_scalar(row + 4 * index) / temperature) + noise)


@njit(error_model="numpy")
def _choose_row(row, size, temperature, key):
    """The first token of the best score, beginning with the likeliest: whatever cannot reach the best so far is passed over."""
    where = _argmax_row(row, size)
    best = _score(row, where, temperature, key)
    inverse = simd.splat(types.float32(1.0) / temperature)
    for start in range(0, size, _SPAN):
        stop = min(start + _SPAN, size)
        needed = best - types.float32(1e-3) - types.float32(1e-6) * abs(best)  # above all rounding
        upper = simd.splat(types.float32(-3e38))
        i = start
        while i + LANES <= stop:
            bound = simd.fma(simd.load_f32(row + 4 * i), inverse, noise_bound(i, key))
            upper = simd.maximum(upper, bound)
            i += LANES
        if i == stop and simd.horizontal_max(upper) < needed:
            continue
        for first in range(start, stop, LANES):
            last = min(first + LANES, stop)
            if last - first == LANES:
                bound = simd.fma(simd.load_f32(row + 4 * first), inverse, noise_bound(first, key))
                if simd.horizontal_max(bound) < needed:
                    continue
            for index in range(first, last):
                score = _score(row, index, temperature, key)
                if score > best or (score == best and index < where):
                    best, where = score, index
    return where


@njit(error_model="numpy")
def _choose_one(a, item):
    """Prediction `item` of B * N."""
    logits, size, nodes, temperatures, seeds = a[2], a[3], a[4], a[5], a[6]
    positions, row_stride, node_stride, stream, out = a[7], a[8], a[9], a[10], a[11]
    b, n = item // nodes, item % nodes
    row, temperature = logits + 4 * size * item, simd.load_scalar(temperatures + 4 * b)
    if temperature > 0:
        seed = simd.load_long(seeds + 8 * b)
        position = types.int64(simd.load_int(positions + row_stride * b + node_stride * n)) & _LOW
        key = _mix((seed & _LOW) ^ _mix((((seed >> 32) & _LOW) + stream + 1) & _LOW))
        key = _mix(key ^ _mix((position * 4 + stream) & _LOW))
        simd.store_long(out + 8 * item, _choose_row(row, size, temperature, key))
    else:
        simd.store_long(out + 8 * item, _argmax_row(row, size))


@kernel
def _choose(args, thread):
    a = carray(args, (MAX_ARGS,))
    item = take(a)
    while item < a[1]:
        _choose_one(a, item)
        finish(a)
        item = take(a)


@kernel
def _choose_few(args, thread):
    a = carray(args, (MAX_ARGS,))
    for item in range(a[12]):
        _choose_one(a, item)


def choose(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """A token per prediction: argmax(logits / temperature + Gumbel noise), plain argmax where the temperature is 0.

    logits f32 [B, N, V], contiguous; temperature f32 and seed int64 [B], position int32 [B, N]. -> int64 [B, N].
    """
    batch, nodes, size = logits.shape
    temperature, seed = temperature.contiguous(), seed.contiguous()
    out = torch.empty(batch, nodes, dtype=torch.int64)
    arguments = (
        logits.data_ptr(), size, nodes, temperature.data_ptr(), seed.data_ptr(),
        position.data_ptr(), 4 * position.stride(0), 4 * position.stride(1), stream, out.data_ptr(),
    )  # fmt: skip
    if out.numel() <= _FEW:
        _choose_few.call(*arguments, out.numel())
    else:
        _choose(*arguments, chunks=out.numel())
    return out
