"""Triton forms of `kernels/steps.py`: one launch an operation, two for argmax of a large vocabulary.

No state outlives a launch and no host value is read, so every call can stand in a CUDA graph. Sums of floats occur nowhere:
maxima of (value, index) come out the same in any order.

Shapes: B rows, N nodes, L token buffer, E = D + 1 tokens a step can emit, K drafts, V vocabulary, S stop tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = (
    8192  # logits of one program: a row alone would wait for one multiprocessor, in parts it waits for a second launch
)
_TEXT_BLOCK = 2048  # tokens that lookup compares at a time
_NO_FUSION = {"enable_fp_fusion": False}


@triton.jit
def pack(value, index):
    """(f32, int32) as int64 in the order of values, of equal ones the lowest index first; 0 and -0 are equal."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - index)


@triton.jit
def unpack(key):
    """The index in a key, int64."""
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def argmax_kernel(logits, out, vocab, BLOCK: tl.constexpr, FINAL: tl.constexpr):
    """Grid (rows, parts). The best of BLOCK logits of a row: its index where FINAL, else its key. out int64 [rows, parts]."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocab + index, mask=index < vocab, other=float("-inf"))
    top = tl.max(x, 0)  # two narrow reductions: keys of all lanes would crowd the registers
    key = pack(top, tl.min(tl.where(x == top, index, vocab - 1), 0))
    tl.store(out + row * tl.num_programs(1) + part, unpack(key) if FINAL else key)


@triton.jit
def combine_kernel(keys, out, parts, PARTS: tl.constexpr):
    """Grid (rows,). Index of the largest key of a row. keys int64 [rows, parts], out int64 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, PARTS)
    key = tl.load(keys + row * parts + lane, mask=lane < parts, other=-0x8000000000000000)
    tl.store(out + row, unpack(tl.max(key, 0)))


@triton.jit
def lookup_kernel(
    tokens, stride, lengths, out, counts, factor,
    DRAFTS: tl.constexpr, MAX_NGRAM: tl.constexpr, MIN_NGRAM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (B,). A match of n tokens that ends at j is the key n * 2^32 + j; the largest key is the longest, latest match."""
    row = tl.program_id(0).to(tl.int64)
    text = tokens + row * stride
    last = tl.load(lengths + row) - 1
    lane = tl.arange(0, BLOCK)
    best = tl.zeros([BLOCK], tl.int64)
    for start in range(0, last, BLOCK):
        end = start + lane
        matched = tl.zeros([BLOCK], tl.int32)
        for i in tl.static_range(MAX_NGRAM):
            wanted = tl.load(text + tl.maximum(last - i, 0))
            open_ = (end < last) & (matched == i) & (end >= i)
            matched += (open_ & (tl.load(text + end - i, mask=open_, other=0) == wanted)).to(tl.int32)
        best = tl.maximum(best, (matched.to(tl.int64) << 32) | end)
    key = tl.max(best, 0)
    length, end = (key >> 32).to(tl.int32), key & 0xFFFFFFFF
    count = tl.where(length >= MIN_NGRAM, tl.minimum((length.to(tl.float32) * factor).to(tl.int32), DRAFTS), 0)
    period = tl.maximum(last - end, 1)
    column = tl.arange(0, COLUMNS)  # 0 is the root
    drafted = (column > 0) & (column <= count)
    source = tl.where(drafted, end + 1 + (column - 1) % period, last)
    tl.store(out + row * (DRAFTS + 1) + column, tl.load(text + source), mask=column <= DRAFTS)
    tl.store(counts + row, count + 1)


@triton.jit
def entries_kernel(
    tokens, stride, lengths, num_new, following, positions, begins, places, first, count, BLOCK: tl.constexpr
):
    """Grid (B,). count entries of a row; see `kernels.steps.entries`."""
    row = tl.program_id(0).to(tl.int64)
    last, new = tl.load(lengths + row) - 1, tl.load(num_new + row)
    begin = tl.minimum(last - new + first, last)
    column = tl.arange(0, BLOCK)
    mask, position = column < count, begin + column
    token = tl.load(tokens + row * stride + tl.minimum(position + 1, last), mask, other=0)
    tl.store(following + row * count + column, token, mask)
    tl.store(positions + row * count + column, position, mask)
    tl.store(begins + row, begin)
    tl.store(places + row, tl.minimum(tl.maximum(new - 1 - first, 0), count - 1).to(tl.int64))


@triton.jit
def follow_kernel(
    nodes, node_stride, parents, parent_stride, num_nodes, chosen, chosen_stride, path, accepted, following,
    DEPTH: tl.constexpr, NODES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (B,). Every node asks at once whether its parent chose it; the walk only picks first children."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, NODES)
    real = (index > 0) & (index < tl.load(num_nodes + row))
    parent = tl.load(parents + row * parent_stride + index, mask=real, other=0)
    wanted = tl.load(chosen + row * chosen_stride + parent, mask=real, other=0)
    hit = real & (tl.load(nodes + row * node_stride + index, mask=real, other=0) == wanted)
    column = tl.arange(0, COLUMNS)
    steps = tl.zeros([COLUMNS], tl.int32)
    node, taken = 0, 0
    child = tl.min(tl.where(hit & (parent == 0), index, NODES), 0)
    while (child < NODES) & (taken < DEPTH):
        node = child
        taken += 1
        steps = tl.where(column >= taken, node, steps)
        child = tl.min(tl.where(hit & (parent == node), index, NODES), 0)
    tl.store(path + row * (DEPTH + 1) + column, steps, mask=column <= DEPTH)
    tl.store(accepted + row, taken)
    tl.store(following + row, tl.load(chosen + row * chosen_stride + node))


@triton.jit
def _deepest(parents, known, NODES: tl.constexpr, LEVELS: tl.constexpr):
    """Depth of the deepest of the first `known` nodes of a row, by pointer doubling over 2^LEVELS >= NODES."""
    index = tl.arange(0, NODES)
    real = (index > 0) & (index < known)
    above = tl.load(parents + index, mask=real, other=0)  # the root, and padding, hang on the root
    depth = real.to(tl.int32)
    for _ in tl.static_range(LEVELS):
        depth += tl.gather(depth, above, 0)
        above = tl.gather(above, above, 0)
    return tl.max(depth, 0)


@triton.jit
def advance_kernel(
    nodes, node_stride, parents, parent_stride, num_nodes, path, accepted, next_token, tokens, token_stride, size,
    lengths, limits, running, stop_ids, num_stops, counts, record,
    E: tl.constexpr, NODES: tl.constexpr, LEVELS: tl.constexpr, COLUMNS: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    """Grid (B,). tokens int64 [B, size], lengths and running are written in place, tokens never beyond their row."""
    row = tl.program_id(0).to(tl.int64)
    taken, known = tl.load(accepted + row), tl.load(num_nodes + row)
    length, limit, runs = tl.load(lengths + row), tl.load(limits + row), tl.load(running + row) != 0
    column = tl.arange(0, COLUMNS)
    drafted = (column < taken) & (column < E - 1)
    node = tl.load(path + row * E + column + 1, mask=drafted, other=0)
    emitted = tl.load(nodes + row * node_stride + node, mask=drafted, other=0)
    emitted = tl.where(drafted, emitted, tl.load(next_token + row))
    count = tl.minimum(taken + 1, limit - length)
    stop = tl.arange(0, STOPS)
    ids = tl.load(stop_ids + stop, mask=stop < num_stops, other=0)
    same = (emitted[:, None] == ids[None, :]) & (stop < num_stops)[None, :] & (column < count)[:, None]
    first = tl.min(tl.min(tl.where(same, column[:, None], E), 1), 0)
    stopped = first < count
    count = tl.where(runs, tl.minimum(count, first + 1), 0)
    ended = runs & (stopped | (length + count >= limit))
    place = length + column
    tl.store(tokens + row * token_stride + place, emitted, mask=(column < E) & (place < size))
    tl.store(lengths + row, length + count)
    tl.store(counts + row, count)
    tl.store(running + row, runs & (ended == 0))
    out = record + row * (5 + E)
    tl.store(out, known.to(tl.int64))
    tl.store(out + 1, _deepest(parents + row * parent_stride, known, NODES, LEVELS).to(tl.int64))
    tl.store(out + 2, taken.to(tl.int64))
    tl.store(out + 3, count.to(tl.int64))
    tl.store(out + 4, tl.where(ended, tl.where(stopped, 2, 1), 0).to(tl.int64))
    tl.store(out + 5 + column, emitted, mask=column < E)


def argmax(logits: Tensor) -> Tensor:
    """See `kernels.steps.argmax`; f32, contiguous."""
    out = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    vocab, rows = logits.shape[-1], out.numel()
    block = min(triton.next_power_of_2(vocab), _BLOCK)
    parts = triton.cdiv(vocab, block)
    keys = out if parts == 1 else out.new_empty(rows, parts)
    options = {"num_warps": max(1, block // 1024), **_NO_FUSION}
    argmax_kernel[(rows, parts)](logits, keys, vocab, BLOCK=block, FINAL=parts == 1, **options)
    return out if parts == 1 else combine(keys, out)


def combine(keys: Tensor, out: Tensor) -> Tensor:
    """Fill out int64 [...] with the indices of the best keys int64 [rows, parts] (see `pack`)."""
    rows, parts = keys.shape
    combine_kernel[(rows,)](keys, out, parts, PARTS=triton.next_power_of_2(parts), num_warps=1, **_NO_FUSION)
    return out


def lookup(
    tokens: Tensor, lengths: Tensor, num_drafts: int, max_ngram: int, min_ngram: int, factor: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.steps.lookup`; reads a row up to its length, _TEXT_BLOCK tokens at a time."""
    batch = tokens.shape[0]
    out = tokens.new_empty(batch, num_drafts + 1)
    counts = torch.empty(batch, dtype=torch.int32, device=tokens.device)
    lookup_kernel[(batch,)](
        tokens, tokens.stride(0), lengths, out, counts, float(factor), DRAFTS=num_drafts, MAX_NGRAM=max_ngram,
        MIN_NGRAM=min_ngram, BLOCK=min(_TEXT_BLOCK, triton.next_power_of_2(tokens.shape[1])),
        COLUMNS=triton.next_power_of_2(num_drafts + 1), num_warps=8, **_NO_FUSION,
    )  # fmt: skip
    return out, counts


def entries(
    tokens: Tensor, lengths: Tensor, num_new: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.steps.entries`."""
    batch = tokens.shape[0]
    following, positions = tokens.new_empty(batch, count), lengths.new_empty(batch, count)
    begins, places = torch.empty_like(lengths), tokens.new_empty(batch)
    entries_kernel[(batch,)](
        tokens, tokens.stride(0), lengths, num_new, following, positions, begins, places, first, count,
        BLOCK=triton.next_power_of_2(count), num_warps=1, **_NO_FUSION,
    )  # fmt: skip
    return following, positions, begins, places


def _rows_dense(x: Tensor) -> Tensor:
    """Rows may lie anywhere; within a row elements are next to each other."""
    return x if x.stride(1) == 1 else x.contiguous()


def follow(
    nodes: Tensor, parents: Tensor, num_nodes: Tensor, chosen: Tensor, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.steps.follow`."""
    batch, width = nodes.shape
    nodes, parents, chosen, num_nodes = *map(_rows_dense, (nodes, parents, chosen)), num_nodes.contiguous()
    path = torch.empty(batch, depth + 1, dtype=torch.int32, device=nodes.device)
    accepted, following = path.new_empty(batch), nodes.new_empty(batch)
    follow_kernel[(batch,)](
        nodes, nodes.stride(0), parents, parents.stride(0), num_nodes, chosen, chosen.stride(0),
        path, accepted, following, DEPTH=depth, NODES=triton.next_power_of_2(width),
        COLUMNS=triton.next_power_of_2(depth + 1), num_warps=1, **_NO_FUSION,
    )  # fmt: skip
    return path, accepted, following


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
    """See `kernels.steps.advance`; lengths and running are changed in place, which spares a graph two copies."""
    (batch, steps), width, stops = path.shape, nodes.shape[1], stop_ids.numel()
    nodes, parents, path, num_nodes = (
        _rows_dense(nodes),
        _rows_dense(parents),
        path.contiguous(),
        num_nodes.contiguous(),
    )
    accepted, next_token = accepted.contiguous(), next_token.contiguous()
    counts = torch.empty_like(lengths)
    record = tokens.new_empty(batch, 5 + steps)
    advance_kernel[(batch,)](
        nodes, nodes.stride(0), parents, parents.stride(0), num_nodes, path, accepted, next_token,
        tokens, tokens.stride(0), tokens.shape[1], lengths, limits, running, stop_ids, stops,
        counts, record, E=steps, NODES=triton.next_power_of_2(width), LEVELS=(width - 1).bit_length(),
        COLUMNS=triton.next_power_of_2(steps), STOPS=triton.next_power_of_2(max(stops, 1)), num_warps=1, **_NO_FUSION,
    )  # fmt: skip
    return lengths, counts, running, record
