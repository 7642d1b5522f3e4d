"""Attention over the static cache, for chains and trees.

Bit equality: a query's keys are taken in position order - the prefix, then its own path through the drafts - and every sum
runs in that order. A draft's key may lie in another slot than plain decoding would give it; the bits of the result cannot
tell. Keys of this forward are read as the cache stores them.

Shapes: B rows, T tokens a row, H query heads, G KV heads, S slots, E head size. `append` says how keys and values lie.
"""

from __future__ import annotations

import torch
from numba import carray, njit, types
from torch import Tensor

from specdec.kernels.cpu import simd, tiles
from specdec.kernels.cpu.append import KEY_BLOCK, addresses, append
from specdec.kernels.cpu.memory import aligned_empty
from specdec.kernels.cpu.parallel import MAX_ARGS, bits_of, check_real, finish, kernel, take
from specdec.types import ModelInputs

_NEG_INF = float("-inf")
_HEADS = 4  # query heads that share the loads of one KV head
_sb1, _sb2, _sb3, _sb4 = (tiles.make_scores(h, True) for h in range(1, 5))
_sf1, _sf2, _sf3, _sf4 = (tiles.make_scores(h, False) for h in range(1, 5))
_vb1, _vb2, _vb3, _vb4 = (tiles.make_values(h, True) for h in range(1, 5))
_vf1, _vf2, _vf3, _vf4 = (tiles.make_values(h, False) for h in range(1, 5))


@njit(error_model="numpy")
def _scores(q, q_stride, keys, size, out, out_stride, heads, bf16):
    if bf16:
        if heads == 1:
            _sb1(q, q_stride, keys, size, out, out_stride)
        elif heads == 2:
            _sb2(q, q_stride, keys, size, out, out_stride)
        elif heads == 3:
            _sb3(q, q_stride, keys, size, out, out_stride)
        else:
            _sb4(q, q_stride, keys, size, out, out_stride)
    elif heads == 1:
        _sf1(q, q_stride, keys, size, out, out_stride)
    elif heads == 2:
        _sf2(q, q_stride, keys, size, out, out_stride)
    elif heads == 3:
        _sf3(q, q_stride, keys, size, out, out_stride)
    else:
        _sf4(q, q_stride, keys, size, out, out_stride)


@njit(error_model="numpy")
def _values(p, p_stride, rows, row_stride, count, sums, heads, bf16):
    if bf16:
        if heads == 1:
            _vb1(p, p_stride, rows, row_stride, count, sums)
        elif heads == 2:
            _vb2(p, p_stride, rows, row_stride, count, sums)
        elif heads == 3:
            _vb3(p, p_stride, rows, row_stride, count, sums)
        else:
            _vb4(p, p_stride, rows, row_stride, count, sums)
    elif heads == 1:
        _vf1(p, p_stride, rows, row_stride, count, sums)
    elif heads == 2:
        _vf2(p, p_stride, rows, row_stride, count, sums)
    elif heads == 3:
        _vf3(p, p_stride, rows, row_stride, count, sums)
    else:
        _vf4(p, p_stride, rows, row_stride, count, sums)


@njit(error_model="numpy")
def _softmax(scores, count, scale):
    """Exponentials of scale * scores[:count] in place (padded to 16 with zeros); returns their sum.

    Lanes are positions mod 16, so that the order of the sum knows nothing of slots.
    """
    blocks = (count + 15) // 16
    factor = simd.splat(scale)
    for i in range(blocks):
        simd.store_f32(scores + 64 * i, simd.mul(simd.load_f32(scores + 64 * i), factor))
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


@njit(error_model="numpy")
def _mix(a, scores, totals, values, slots, prefix, count, heads, out):
    """out = sums over positions of weight * value / total, for `heads` heads, 32 channels at a time.

    Positions run in order: first the slots that lie as the positions do, then the path's, one by one.
    """
    size, bf16, stride = a[17], a[18] == 1, a[24]
    width = 2 if bf16 else 4
    sums = totals + 64
    contiguous = count if slots == 0 else prefix
    for i in range(size // 32):
        column = values + 32 * width * i
        for k in range(2 * heads):
            simd.store_f32(sums + 64 * k, simd.splat(types.float32(0.0)))
        if contiguous > 0:
            _values(scores, stride, column, size * width, contiguous, sums, heads, bf16)
        for j in range(contiguous, count):
            slot = prefix + simd.load_int(slots + 4 * (j - prefix))
            _values(scores + 4 * j, stride, column + slot * size * width, 0, 1, sums, heads, bf16)
        for k in range(2 * heads):
            inverse = simd.splat(types.float32(1.0) / simd.load_scalar(totals + 4 * (k // 2)))
            value = simd.mul(simd.load_f32(sums + 64 * k), inverse)
            target = out + width * (size * (k // 2) + 32 * i + 16 * (k % 2))
            if bf16:
                simd.store_bf16(target, value)
            else:
                simd.store_f32(target, value)


@njit(error_model="numpy")
def _attention_item(a, item, scratch):
    """All query heads of one token that share a KV head, a few at a time."""
    q, q_stride, per_row, prefix_lens, offset, paths, path_len = a[3], a[4], a[6], a[7], a[8], a[9], a[10]
    keys, values, row_stride, head_stride = a[11], a[12], a[13], a[14]
    all_heads, groups, size, bf16 = a[15], a[16], a[17], a[18] == 1
    stride, scale = a[24], simd.float_of(a[23])
    width = 2 if bf16 else 4
    token, group = item // groups, item % groups
    row = token // per_row
    prefix = simd.load_int(prefix_lens + 4 * row)
    here = row_stride * row + head_stride * group
    slots, count = types.int64(0), prefix + offset + token % per_row + 1
    last = count  # slots whose scores are needed
    if paths != 0:
        slots, count = paths + 4 * path_len * token, prefix
        while count - prefix < path_len and simd.load_int(slots + 4 * (count - prefix)) >= 0:
            last = prefix + simd.load_int(slots + 4 * (count - prefix)) + 1
            count += 1
    totals, scores = scratch, scratch + 64 * (2 * _HEADS + 1)
    shared = all_heads // groups
    for first in range(0, shared, _HEADS):
        heads = min(_HEADS, shared - first)
        head = shared * group + first
        query = q + q_stride * token + 4 * size * head
        for block in range((last + 15) // 16):
            place = keys + here + block * KEY_BLOCK * size * width
            _scores(query, 4 * size, place, size, scores + 64 * block, stride, heads, bf16)
        for h in range(heads):
            mine = scores + stride * h
            for j in range(prefix, count if slots != 0 else prefix):  # slot order to position order; never backwards
                slot = prefix + simd.load_int(slots + 4 * (j - prefix))
                simd.store_scalar(mine + 4 * j, simd.load_scalar(mine + 4 * slot))
            simd.store_scalar(totals + 4 * h, _softmax(mine, count, scale))
        _mix(a, scores, totals, values + here, slots, prefix, count, heads, a[19] + a[20] * token + size * width * head)


@njit(error_model="numpy")
def _attention(a, thread):
    """Items are (row, token, KV head); the last ones, which see most keys, are taken first."""
    items, scratch = a[5] * a[6] * a[16], a[21] + a[22] * thread
    chunk = take(a)
    while chunk < a[1]:
        behind = items - chunk * a[2]
        for item in range(max(0, behind - a[2]), behind):
            _attention_item(a, item, scratch)
        finish(a)
        chunk = take(a)


@kernel
def _run_attention(args, thread):
    _attention(carray(args, (MAX_ARGS,)), thread)


class Attention:
    """Launcher: holds the scratch memory of the threads."""

    def __init__(self) -> None:
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
        """`append`, then attend. qkv f32 [B*T, (H+2G)*E] (q and k are overwritten), out [B*T, H*E] in the cache's dtype."""
        check_real(qkv)
        rows, per_row = inputs.tokens.shape
        _, groups, slots, size = values.shape
        heads = out.shape[1] // size
        for name in ("positions", "prefix_lens", "paths"):  # read by address: strides are not looked at
            value = getattr(inputs, name)
            assert value is None or (value.dtype == torch.int32 and value.is_contiguous()), name
        append(qkv, keys, values, inputs, cos, sin, rope, heads)
        scores = 4 * slots + 64  # bytes of one head's; not a power of two apart, where caches would collide
        stride = 64 * (2 * _HEADS + 1) + _HEADS * scores
        if self._scratch.numel() < stride * torch.get_num_threads():
            self._scratch = aligned_empty(stride * torch.get_num_threads(), torch.uint8)
        items = rows * per_row * groups
        each = max(1, items // 64)
        paths, path_len = (0, 0) if inputs.paths is None else (inputs.paths.data_ptr(), inputs.paths.shape[2])
        _run_attention(
            each, qkv.data_ptr(), qkv.stride(0) * 4, rows, per_row, inputs.prefix_lens.data_ptr(), inputs.offset, paths,
            path_len, *addresses(keys, values), heads, groups, size, int(keys.dtype == torch.bfloat16), out.data_ptr(),
            out.stride(0) * out.element_size(), self._scratch.data_ptr(), stride, bits_of(size**-0.5), scores,
            chunks=-(-items // each), keep=(self._scratch, qkv, inputs.prefix_lens, keys, values, out),
        )  # fmt: skip
        return out


attention = Attention()
