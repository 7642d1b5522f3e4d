"""Compiled forms of `kernels/steps.py`: one call each, no parallel region but for argmax."""

from __future__ import annotations

import torch
from numba import carray, njit, types
from torch import Tensor

from specdec.kernels.cpu import simd
from specdec.kernels.cpu.parallel import MAX_ARGS, bits_of, finish, kernel, take

_FEW = 8  # rows that are done before another thread has woken up
_SPAN = 256  # logits between two looks at the largest one so far


@njit(error_model="numpy")
def _argmax_row(row, size):
    """The first place of the largest value: its span by vectors, then within the span."""
    best, where = simd.load_scalar(row), 0
    for start in range(0, size, _SPAN):
        stop = min(start + _SPAN, size)
        largest = simd.splat(simd.load_scalar(row + 4 * start))
        i = start
        while i + 16 <= stop:
            largest = simd.maximum(largest, simd.load_f32(row + 4 * i))
            i += 16
        top = simd.horizontal_max(largest)
        while i < stop:
            top = max(top, simd.load_scalar(row + 4 * i))
            i += 1
        if top > best:
            best, where = top, start
    while where < size - 1 and simd.load_scalar(row + 4 * where) != best:
        where += 1
    return where


@kernel
def _argmax(args, thread):
    a = carray(args, (MAX_ARGS,))
    row = take(a)
    while row < a[1]:
        simd.store_long(a[4] + 8 * row, _argmax_row(a[2] + 4 * a[3] * row, a[3]))
        finish(a)
        row = take(a)


@kernel
def _argmax_few(args, thread):
    a = carray(args, (MAX_ARGS,))
    for row in range(a[5]):
        simd.store_long(a[4] + 8 * row, _argmax_row(a[2] + 4 * a[3] * row, a[3]))


@njit(error_model="numpy")
def _match(text, last, max_ngram):
    """Longest, then latest, earlier match of the text's end: (tokens, place of its last token)."""
    best, end = 0, -1
    for j in range(last - 1, -1, -1):
        n = 0
        while n < max_ngram and n <= j and simd.load_long(text + 8 * (j - n)) == simd.load_long(text + 8 * (last - n)):
            n += 1
        if n > best:
            best, end = n, j
            if n == max_ngram:
                break
    return best, end


@kernel
def _lookup(args, thread):
    a = carray(args, (MAX_ARGS,))
    rows, tokens, stride, lengths, drafts, max_ngram, min_ngram = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    factor, out, counts = simd.float_of(a[9]), a[10], a[11]
    for b in range(rows):
        text, last = tokens + stride * b, simd.load_int(lengths + 4 * b) - 1
        length, end = _match(text, last, max_ngram)
        count = min(types.int64(types.float32(length) * factor), drafts) if length >= min_ngram else 0
        root, target = simd.load_long(text + 8 * last), out + 8 * (drafts + 1) * b
        simd.store_long(target, root)
        for i in range(drafts):
            token = simd.load_long(text + 8 * (end + 1 + i % max(last - end, 1))) if i < count else root
            simd.store_long(target + 8 * (i + 1), token)
        simd.store_int(counts + 4 * b, count + 1)


@kernel
def _entries(args, thread):
    a = carray(args, (MAX_ARGS,))
    rows, tokens, stride, lengths, num_new, first, count = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    following, positions, begins, places = a[9], a[10], a[11], a[12]
    for b in range(rows):
        last, new = simd.load_int(lengths + 4 * b) - 1, simd.load_int(num_new + 4 * b)
        begin = min(last - new + first, last)
        for i in range(count):
            token = simd.load_long(tokens + stride * b + 8 * min(begin + i + 1, last))
            simd.store_long(following + 8 * (count * b + i), token)
            simd.store_int(positions + 4 * (count * b + i), begin + i)
        simd.store_int(begins + 4 * b, begin)
        simd.store_long(places + 8 * b, min(max(new - 1 - first, 0), count - 1))


@kernel
def _follow(args, thread):
    a = carray(args, (MAX_ARGS,))
    rows, depth, nodes, node_stride, parents, parent_stride = a[2], a[3], a[4], a[5], a[6], a[7]
    num_nodes, chosen, chosen_stride, path, accepted, following = a[8], a[9], a[10], a[11], a[12], a[13]
    for b in range(rows):
        node, taken = 0, 0
        wanted = simd.load_long(chosen + chosen_stride * b)
        simd.store_int(path + 4 * (depth + 1) * b, 0)
        for i in range(1, simd.load_int(num_nodes + 4 * b)):  # a parent stands before its children
            parent = simd.load_int(parents + parent_stride * b + 4 * i)
            if taken < depth and parent == node and simd.load_long(nodes + node_stride * b + 8 * i) == wanted:
                node, taken = i, taken + 1
                wanted = simd.load_long(chosen + chosen_stride * b + 8 * i)
                simd.store_int(path + 4 * ((depth + 1) * b + taken), node)
        for i in range(taken + 1, depth + 1):
            simd.store_int(path + 4 * ((depth + 1) * b + i), node)
        simd.store_int(accepted + 4 * b, taken)
        simd.store_long(following + 8 * b, wanted)


@njit(error_model="numpy")
def _deepest(parents, count, scratch):
    """Depth of the deepest of the first `count` nodes."""
    deepest = 0
    simd.store_long(scratch, 0)
    for i in range(1, count):
        depth = simd.load_long(scratch + 8 * simd.load_int(parents + 4 * i)) + 1
        simd.store_long(scratch + 8 * i, depth)
        deepest = max(deepest, depth)
    return deepest


@kernel
def _advance(args, thread):
    a = carray(args, (MAX_ARGS,))
    rows, steps, nodes, node_stride, parents, parent_stride = a[2], a[3], a[4], a[5], a[6], a[7]
    num_nodes, path, accepted, next_token, tokens, token_stride = a[8], a[9], a[10], a[11], a[12], a[13]
    lengths, limits, running, stop_ids, num_stops = a[14], a[15], a[16], a[17], a[18]
    new_lengths, counts, still, record, scratch = a[19], a[20], a[21], a[22], a[23]
    for b in range(rows):
        length, taken = simd.load_int(lengths + 4 * b), simd.load_int(accepted + 4 * b)
        limit, runs = simd.load_int(limits + 4 * b), simd.load_byte(running + b)
        count, stopped = min(taken + 1, limit - length), 0
        row = record + 8 * (5 + steps) * b
        for i in range(steps):
            token = simd.load_long(next_token + 8 * b)
            if i < taken:
                token = simd.load_long(nodes + node_stride * b + 8 * simd.load_int(path + 4 * (steps * b + i + 1)))
            simd.store_long(row + 8 * (5 + i), token)
            simd.store_long(tokens + token_stride * b + 8 * (length + i), token)
            for s in range(num_stops):
                if i < count and token == simd.load_long(stop_ids + 8 * s):
                    count, stopped = i + 1, 1
        if runs == 0:
            count = 0
        ended = runs != 0 and (stopped == 1 or length + count >= limit)
        known = simd.load_int(num_nodes + 4 * b)
        simd.store_int(new_lengths + 4 * b, length + count)
        simd.store_int(counts + 4 * b, count)
        simd.store_byte(still + b, 1 if runs != 0 and not ended else 0)
        simd.store_long(row, known)
        simd.store_long(row + 8, _deepest(parents + parent_stride * b, known, scratch))
        simd.store_long(row + 16, taken)
        simd.store_long(row + 24, count)
        simd.store_long(row + 32, (2 if stopped == 1 else 1) if ended else 0)


def argmax(logits: Tensor) -> Tensor:
    """See `kernels.steps.argmax`; f32, contiguous."""
    out = torch.empty(logits.shape[:-1], dtype=torch.int64)
    if out.numel() <= _FEW:
        _argmax_few.call(logits.data_ptr(), logits.shape[-1], out.data_ptr(), out.numel())
    else:
        _argmax(logits.data_ptr(), logits.shape[-1], out.data_ptr(), chunks=out.numel())
    return out


def lookup(
    tokens: Tensor, lengths: Tensor, num_drafts: int, max_ngram: int, min_ngram: int, factor: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.steps.lookup`."""
    batch = tokens.shape[0]
    out = torch.empty(batch, num_drafts + 1, dtype=torch.int64)
    counts = torch.empty(batch, dtype=torch.int32)
    _lookup.call(
        batch, tokens.data_ptr(), 8 * tokens.stride(0), lengths.data_ptr(), num_drafts, max_ngram, min_ngram,
        bits_of(factor), out.data_ptr(), counts.data_ptr(),
    )  # fmt: skip
    return out, counts


def entries(
    tokens: Tensor, lengths: Tensor, num_new: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.steps.entries`."""
    batch = tokens.shape[0]
    lengths, num_new = lengths.int().contiguous(), num_new.int().contiguous()
    following, positions = tokens.new_empty(batch, count), lengths.new_empty(batch, count)
    begins, places = torch.empty_like(lengths), tokens.new_empty(batch)
    _entries.call(
        batch, tokens.data_ptr(), 8 * tokens.stride(0), lengths.data_ptr(), num_new.data_ptr(), first, count,
        following.data_ptr(), positions.data_ptr(), begins.data_ptr(), places.data_ptr(),
    )  # fmt: skip
    return following, positions, begins, places


def follow(
    nodes: Tensor, parents: Tensor, num_nodes: Tensor, chosen: Tensor, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.steps.follow`."""
    batch = nodes.shape[0]
    parents, num_nodes = _rows_dense(parents.int()), num_nodes.int().contiguous()
    nodes, chosen = _rows_dense(nodes), _rows_dense(chosen)
    path = torch.empty(batch, depth + 1, dtype=torch.int32)
    accepted, following = torch.empty(batch, dtype=torch.int32), torch.empty(batch, dtype=torch.int64)
    _follow.call(
        batch, depth, nodes.data_ptr(), 8 * nodes.stride(0), parents.data_ptr(), 4 * parents.stride(0),
        num_nodes.data_ptr(), chosen.data_ptr(), 8 * chosen.stride(0),
        path.data_ptr(), accepted.data_ptr(), following.data_ptr(),
    )  # fmt: skip
    return path, accepted, following


def _rows_dense(x: Tensor) -> Tensor:
    """Rows may lie anywhere; within a row elements are next to each other."""
    return x if x.stride(1) == 1 else x.contiguous()


def advance(
    nodes: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    path: Tensor,
    accepted: Tensor,
    next_token: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    limits: Tensor,
    running: Tensor,
    stop_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.steps.advance`."""
    batch, steps = path.shape
    path, parents, num_nodes = path.int().contiguous(), _rows_dense(parents.int()), num_nodes.int().contiguous()
    nodes, accepted, next_token = _rows_dense(nodes), accepted.int().contiguous(), next_token.contiguous()
    new_lengths, counts = torch.empty_like(lengths), torch.empty_like(lengths)
    still = torch.empty_like(running)
    record = torch.empty(batch, 5 + steps, dtype=torch.int64)
    scratch = torch.empty(nodes.shape[1], dtype=torch.int64)
    _advance.call(
        batch, steps, nodes.data_ptr(), 8 * nodes.stride(0), parents.data_ptr(), 4 * parents.stride(0),
        num_nodes.data_ptr(), path.data_ptr(), accepted.data_ptr(), next_token.data_ptr(),
        tokens.data_ptr(), 8 * tokens.stride(0), lengths.data_ptr(), limits.data_ptr(), running.data_ptr(),
        stop_ids.data_ptr(), stop_ids.numel(), new_lengths.data_ptr(), counts.data_ptr(), still.data_ptr(),
        record.data_ptr(), scratch.data_ptr(),
    )  # fmt: skip
    return new_lengths, counts, still, record
