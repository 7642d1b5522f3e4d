"""Rotary embedding and KV append, and how a layer's cache lies in memory: what the attention kernel finds.

Shapes: B rows, T tokens a row, H query heads, G KV heads, S slots, E head size. Values of a layer lie as [B, G, S, E], keys in
blocks of 16 slots, [B, G, S/16, E, 16], so that 16 scores come out of one vector and need no horizontal sums.
"""

from __future__ import annotations

import torch
from numba import carray, njit
from torch import Tensor

from specdec.kernels.cpu import simd
from specdec.kernels.cpu.parallel import MAX_ARGS, finish, kernel, take
from specdec.types import ModelInputs

KEY_BLOCK = 16


def to_blocks(keys: Tensor) -> Tensor:
    """Keys [..., S, E] as the kernels keep them: [..., S/16, E, 16]."""
    shape = (*keys.shape[:-2], -1, KEY_BLOCK, keys.shape[-1])
    return keys.reshape(shape).transpose(-1, -2).contiguous()


def from_blocks(keys: Tensor) -> Tensor:
    """The inverse of `to_blocks`."""
    return keys.transpose(-1, -2).flatten(-3, -2)


def addresses(keys: Tensor, values: Tensor) -> tuple[int, int, int, int]:
    """Of keys and values, then bytes from row to row and from head to head: a layer's cache as kernels take it."""
    slots, size = values.shape[2:]
    assert keys.shape[2:] == (slots // KEY_BLOCK, size, KEY_BLOCK)
    assert keys.stride()[:2] == values.stride()[:2]
    assert keys[0, 0].is_contiguous()
    assert values[0, 0].is_contiguous()
    item = keys.element_size()
    return keys.data_ptr(), values.data_ptr(), keys.stride(0) * item, keys.stride(1) * item


@njit(error_model="numpy")
def _rotate(source, cos, sin, half):
    """Rotary embedding of one head, f32, in place; half: vectors in half a head."""
    for i in range(half):
        c, s = simd.load_f32(cos + 64 * i), simd.load_f32(sin + 64 * i)
        x, y = simd.load_f32(source + 64 * i), simd.load_f32(source + 64 * (i + half))
        simd.store_f32(source + 64 * i, simd.sub(simd.mul(x, c), simd.mul(y, s)))
        simd.store_f32(source + 64 * (i + half), simd.add(simd.mul(y, c), simd.mul(x, s)))


@njit(error_model="numpy")
def _append_item(a, item):
    """Rotate one head of one token (q and k) in place; put k into its lane of a block, v into its row."""
    qkv, qkv_stride, per_row = a[3], a[4], a[6]
    positions, prefix_lens, offset, cos, sin = a[7], a[8], a[9], a[10], a[11]
    keys, values, row_stride, head_stride = a[12], a[13], a[14], a[15]
    heads, groups, size, bf16, rope = a[16], a[17], a[18], a[19] == 1, a[20] == 1
    width = 2 if bf16 else 4
    token, head = item // (heads + 2 * groups), item % (heads + 2 * groups)
    source = qkv + qkv_stride * token + 4 * size * head
    if head < heads + groups and rope:
        angle = 2 * size * simd.load_int(positions + 4 * token)
        _rotate(source, cos + angle, sin + angle, size // 32)
    if head < heads:
        return
    row = token // per_row
    slot = simd.load_int(prefix_lens + 4 * row) + offset + token % per_row
    here = row_stride * row + head_stride * ((head - heads) % groups)
    if head < heads + groups:
        lane = keys + here + width * ((slot // KEY_BLOCK) * size * KEY_BLOCK + slot % KEY_BLOCK)
        for e in range(size):
            value = simd.load_scalar(source + 4 * e)
            if bf16:
                simd.store_scalar_bf16(lane + 32 * e, value)
            else:
                simd.store_scalar(lane + 64 * e, value)
        return
    target = values + here + slot * size * width
    for i in range(size // 16):
        if bf16:
            simd.store_bf16(target + 32 * i, simd.load_f32(source + 64 * i))
        else:
            simd.store_f32(target + 64 * i, simd.load_f32(source + 64 * i))


@njit(error_model="numpy")
def _append(a, thread):
    """Items are (token, head)."""
    items = a[5] * a[6] * (a[16] + 2 * a[17])
    chunk = take(a)
    while chunk < a[1]:
        for item in range(chunk * a[2], min((chunk + 1) * a[2], items)):
            _append_item(a, item)
        finish(a)
        chunk = take(a)


@kernel
def _run_append(args, thread):
    _append(carray(args, (MAX_ARGS,)), thread)


def append(
    qkv: Tensor, keys: Tensor, values: Tensor, inputs: ModelInputs, cos: Tensor, sin: Tensor, rope: bool, heads: int
) -> None:
    """Rotate q and k of qkv f32 [B*T, (H+2G)*E] in place, if `rope`, and write k and v to the slots of `ModelInputs`.

    cos, sin f32 [positions, E/2].
    """
    rows, per_row = inputs.tokens.shape
    groups, size, bf16 = values.shape[1], values.shape[3], int(keys.dtype == torch.bfloat16)
    items = rows * per_row * (heads + 2 * groups)
    each = max(16, items // 64)
    _run_append(
        each, qkv.data_ptr(), qkv.stride(0) * 4, rows, per_row, inputs.positions.data_ptr(), inputs.prefix_lens.data_ptr(),
        inputs.offset, cos.data_ptr(), sin.data_ptr(), *addresses(keys, values), heads, groups, size, bf16, int(rope),
        chunks=-(-items // each), keep=(qkv, inputs.positions, inputs.prefix_lens, cos, sin, keys, values),
    )  # fmt: skip
