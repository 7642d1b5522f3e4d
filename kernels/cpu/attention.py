"""Rotary embedding, KV append and attention over the static cache, for chains and trees.

Bit equality: a query's keys are taken in position order - the prefix, then its own path through the drafts - and every sum
runs in that order. A draft's key may lie in another slot than plain decoding would give it; the bits of the result cannot
tell. Keys of this forward are read as the cache stores them.

Shapes: B rows, T tokens a row, H query heads, G KV heads, S slots, E head size. Cache [B, G, S, E], one layer.
"""

from __future__ import annotations

import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from specdec.kernels.cpu import simd
from specdec.kernels.cpu.memory import aligned_empty
from specdec.kernels.cpu.parallel import MAX_ARGS, Kernel, bits_of, check_real, finish, take
from specdec.types import ModelInputs

_NEG_INF = float("-inf")


@njit(error_model="numpy")  # type: ignore[misc]
def _load(address, bf16):  # type: ignore[no-untyped-def]
    if bf16:
        return simd.load_bf16(address)
    return simd.load_f32(address)


@njit(error_model="numpy")  # type: ignore[misc]
def _store(address, value, bf16):  # type: ignore[no-untyped-def]
    if bf16:
        simd.store_bf16(address, value)
    else:
        simd.store_f32(address, value)


@njit(error_model="numpy")  # type: ignore[misc]
def _rope_item(a, item):  # type: ignore[no-untyped-def]
    """Rotate one head of one token in place (q) or into its slot (k), or copy it there (v)."""
    qkv, qkv_stride, per_row = a[3], a[4], a[6]
    positions, prefix_lens, offset, cos, sin = a[7], a[8], a[9], a[10], a[11]
    keys, values, row_stride, head_stride = a[12], a[13], a[14], a[15]
    heads, groups, size, bf16, rope = a[16], a[17], a[18], a[19] == 1, a[20] == 1
    width = 2 if bf16 else 4
    half = size // 32
    token, head = item // (heads + 2 * groups), item % (heads + 2 * groups)
    source = qkv + qkv_stride * token + 4 * size * head
    target, as_bf16, scale = source, False, 4
    if head >= heads:
        row = token // per_row
        slot = simd.load_int(prefix_lens + 4 * row) + offset + token % per_row
        cache = keys if head < heads + groups else values
        target = cache + row_stride * row + head_stride * ((head - heads) % groups) + slot * size * width
        as_bf16, scale = bf16, width
    if head < heads + groups and rope:
        angle = 4 * half * 16 * simd.load_int(positions + 4 * token)
        for i in range(half):
            c, s = simd.load_f32(cos + angle + 64 * i), simd.load_f32(sin + angle + 64 * i)
            x, y = simd.load_f32(source + 64 * i), simd.load_f32(source + 64 * (i + half))
            _store(target + 16 * scale * i, simd.sub(simd.mul(x, c), simd.mul(y, s)), as_bf16)
            _store(target + 16 * scale * (i + half), simd.add(simd.mul(y, c), simd.mul(x, s)), as_bf16)
    elif head >= heads:
        for i in range(2 * half):
            _store(target + 16 * scale * i, simd.load_f32(source + 64 * i), as_bf16)


@njit(error_model="numpy")  # type: ignore[misc]
def _rope_append(a, thread):  # type: ignore[no-untyped-def]
    """Items are (token, head)."""
    items = a[5] * a[6] * (a[16] + 2 * a[17])
    chunk = take(a)
    while chunk < a[1]:
        for item in range(chunk * a[2], min((chunk + 1) * a[2], items)):
            _rope_item(a, item)
        finish(a)
        chunk = take(a)


@njit(error_model="numpy")  # type: ignore[misc]
def _dot(query, key, vectors, bf16):  # type: ignore[no-untyped-def]
    total = simd.splat(0.0)
    for i in range(vectors):
        total = simd.fma(simd.load_f32(query + 64 * i), _load(key + (32 if bf16 else 64) * i, bf16), total)
    return simd.horizontal_sum(total)


@njit(error_model="numpy")  # type: ignore[misc]
def _softmax(scores, count):  # type: ignore[no-untyped-def]
    """Exponentials of scores[:count] in place (padded to 16 with zeros); returns their sum. Lanes are positions mod 16."""
    blocks = (count + 15) // 16
    for i in range(count, 16 * blocks):
        simd.store_scalar(scores + 4 * i, types.float32(_NEG_INF))
    largest = simd.load_f32(scores)
    for i in range(1, blocks):
        largest = simd.maximum(largest, simd.load_f32(scores + 64 * i))
    shift = simd.splat(simd.horizontal_max(largest))
    for i in range(blocks):
        simd.store_f32(scores + 64 * i, simd.exp(simd.sub(simd.load_f32(scores + 64 * i), shift)))
    for i in range(count, 16 * blocks):
        simd.store_scalar(scores + 4 * i, types.float32(0.0))
    total = simd.splat(0.0)
    for i in range(blocks):
        total = simd.add(total, simd.load_f32(scores + 64 * i))
    return simd.horizontal_sum(total)


@njit(error_model="numpy")  # type: ignore[misc]
def _mix_values(scores, values, slots, prefix, count, size, total, out, bf16):  # type: ignore[no-untyped-def]
    """out = sum over positions of scores[i] * value(i) / total, 32 channels at a time, each one chain of sums."""
    width = 2 if bf16 else 4
    inverse = simd.splat(types.float32(1.0) / total)
    for i in range(size // 32):
        column = values + 32 * width * i
        low, high = simd.splat(0.0), simd.splat(0.0)
        for j in range(count):
            slot = j
            if slots != 0 and j >= prefix:
                slot = prefix + simd.load_int(slots + 4 * (j - prefix))
            weight = simd.splat(simd.load_scalar(scores + 4 * j))
            address = column + slot * size * width
            low = simd.fma(weight, _load(address, bf16), low)
            high = simd.fma(weight, _load(address + 16 * width, bf16), high)
        _store(out + 32 * width * i, simd.mul(low, inverse), bf16)
        _store(out + 32 * width * i + 16 * width, simd.mul(high, inverse), bf16)


@njit(error_model="numpy")  # type: ignore[misc]
def _attention_item(a, item, scores):  # type: ignore[no-untyped-def]
    """One head of one token. Scores lie in position order whatever the slots."""
    q, q_stride, per_row, prefix_lens, offset, paths, path_len = a[3], a[4], a[6], a[7], a[8], a[9], a[10]
    keys, values, row_stride, head_stride = a[11], a[12], a[13], a[14]
    heads, groups, size, bf16 = a[15], a[16], a[17], a[18] == 1
    scale = simd.float_of(a[23])
    width = 2 if bf16 else 4
    vectors = size // 16
    token, head = item // heads, item % heads
    row = token // per_row
    prefix = simd.load_int(prefix_lens + 4 * row)
    here = row_stride * row + head_stride * (head // (heads // groups))
    query = q + q_stride * token + 4 * size * head
    slots, count = types.int64(0), prefix + offset + token % per_row + 1
    contiguous = count
    if paths != 0:
        slots, count, contiguous = paths + 4 * path_len * token, prefix, prefix
        while count - prefix < path_len and simd.load_int(slots + 4 * (count - prefix)) >= 0:
            count += 1
    for j in range(contiguous):
        dot = _dot(query, keys + here + j * size * width, vectors, bf16)
        simd.store_scalar(scores + 4 * j, dot * scale)
    for j in range(contiguous, count):
        slot = prefix + simd.load_int(slots + 4 * (j - prefix))
        dot = _dot(query, keys + here + slot * size * width, vectors, bf16)
        simd.store_scalar(scores + 4 * j, dot * scale)
    total = _softmax(scores, count)
    target = a[19] + a[20] * token + size * width * head
    _mix_values(scores, values + here, slots, prefix, count, size, total, target, bf16)


@njit(error_model="numpy")  # type: ignore[misc]
def _attention(a, thread):  # type: ignore[no-untyped-def]
    """Items are (row, token, head); the last ones, which see most keys, are taken first."""
    items, scores = a[5] * a[6] * a[15], a[21] + a[22] * thread
    chunk = take(a)
    while chunk < a[1]:
        behind = items - chunk * a[2]
        for item in range(max(0, behind - a[2]), behind):
            _attention_item(a, item, scores)
        finish(a)
        chunk = take(a)


_SIGNATURE = types.void(types.CPointer(types.int64), types.int64)


@cfunc(_SIGNATURE, error_model="numpy", cache=True)  # type: ignore[misc]
def _rope_kernel(args, thread):  # type: ignore[no-untyped-def]
    _rope_append(carray(args, (MAX_ARGS,)), thread)


@cfunc(_SIGNATURE, error_model="numpy", cache=True)  # type: ignore[misc]
def _attention_kernel(args, thread):  # type: ignore[no-untyped-def]
    _attention(carray(args, (MAX_ARGS,)), thread)


class Attention:
    """Launcher of both kernels: holds the scratch memory of the threads."""

    def __init__(self) -> None:
        self._rope = Kernel(_rope_kernel)
        self._attention = Kernel(_attention_kernel)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __call__(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        inputs: ModelInputs,
        cos: Tensor,
        sin: Tensor,
        rope: bool,
        out: Tensor,
    ) -> Tensor:
        """Rotate, append and attend. qkv f32 [B*T, (H+2G)*E] (q is overwritten), out [B*T, H*E] in the cache's dtype.

        cos, sin f32 [positions, E/2]. Slots behind the prefix are those of `ModelInputs`.
        """
        check_real(qkv)
        rows, per_row = inputs.tokens.shape
        _, groups, slots, size = keys.shape
        heads = out.shape[1] // size
        for name in ("positions", "prefix_lens", "paths"):  # read by address: strides are not looked at
            value = getattr(inputs, name)
            assert value is None or (value.dtype == torch.int32 and value.is_contiguous()), name
        assert keys.stride(2) == size and keys.stride(3) == 1 and keys.stride() == values.stride()
        bf16 = int(keys.dtype == torch.bfloat16)
        stride = 64 * ((slots + 15) // 16)
        if self._scratch.numel() < stride * torch.get_num_threads():
            self._scratch = aligned_empty(stride * torch.get_num_threads(), torch.uint8)
        item = keys.element_size()
        cache = (keys.data_ptr(), values.data_ptr(), keys.stride(0) * item, keys.stride(1) * item)
        prefix, row_bytes = inputs.prefix_lens.data_ptr(), qkv.stride(0) * 4
        moved, attended = rows * per_row * (heads + 2 * groups), rows * per_row * heads
        moved_each, attended_each = max(16, moved // 64), max(1, attended // 64)
        self._rope(
            moved_each, qkv.data_ptr(), row_bytes, rows, per_row, inputs.positions.data_ptr(), prefix, inputs.offset,
            cos.data_ptr(), sin.data_ptr(), *cache, heads, groups, size, bf16, int(rope),
            chunks=-(-moved // moved_each), keep=(qkv, inputs.positions, inputs.prefix_lens, cos, sin),
        )  # fmt: skip
        paths, path_len = (0, 0) if inputs.paths is None else (inputs.paths.data_ptr(), inputs.paths.shape[2])
        self._attention(
            attended_each, qkv.data_ptr(), row_bytes, rows, per_row, prefix, inputs.offset, paths, path_len, *cache,
            heads, groups, size, bf16, out.data_ptr(), out.stride(0) * item, self._scratch.data_ptr(), stride,
            bits_of(size**-0.5), chunks=-(-attended // attended_each), keep=(self._scratch, keys, values, out),
        )  # fmt: skip
        return out


attention = Attention()
