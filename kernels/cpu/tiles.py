"""The inner loops of the kernels, as LLVM IR: matrix tile, scores of a block of keys, weighted sums of values.

An output is one chain of sums, whatever else the tile computes: its bits depend on its operands alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from specdec.kernels.cpu.simd import (
    F32,
    I8,
    I32,
    I64,
    VB,
    VF,
    VI,
    broadcast,
    constant,
    emit_call,
    integers,
    op,
    pointer,
    widened,
)


def _load16(b: Any, address: Any, bf16: bool) -> Any:
    """16 values as f32, from either storage."""
    if not bf16:
        return b.load(pointer(b, address, VF), align=4)
    return widened(b, address)


def _accumulate(b: Any, count: Any, accs: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """for i in range(count), count >= 1: accs = body(i, accs), in registers."""
    entry, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(I64)
    i.add_incoming(ir.Constant(I64, 0), entry)
    inside = [b.phi(VF) for _ in accs]
    for phi, value in zip(inside, accs, strict=True):
        phi.add_incoming(value, entry)
    results = body(i, inside)
    following = b.add(i, ir.Constant(I64, 1))
    i.add_incoming(following, b.block)
    for phi, value in zip(inside, results, strict=True):
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, count), loop, done)
    b.position_at_end(done)
    return results


# ---- the matrix tile -------------------------------------------------------------------------------------------------


def _bf16_dot_step(b: Any, panel: Any, x: Any) -> Callable[[Any, int, Any], Any]:
    """AVX512-BF16: a register of 16 rows x 2 inputs times a broadcast pair of inputs."""
    weights = [b.load(pointer(b, b.add(panel, ir.Constant(I64, 64 * r)), VB), align=64) for r in range(2)]

    def step(acc: Any, r: int, address: Any) -> Any:
        pair = b.bitcast(broadcast(b, b.load(pointer(b, address, I32), align=4), VI), VB)
        return emit_call(b, "llvm.x86.avx512bf16.dpbf16ps.512", VF, acc, weights[r], pair)

    return step


def _bf16_fma_step(b: Any, panel: Any, x: Any) -> Callable[[Any, int, Any], Any]:
    """Any processor: the same packed pairs, widened, two fused multiply-adds."""
    even, odd = [], []
    for r in range(2):
        pairs = b.load(pointer(b, b.add(panel, ir.Constant(I64, 64 * r)), VI), align=64)
        even.append(b.bitcast(b.shl(pairs, integers(16)), VF))
        odd.append(b.bitcast(b.and_(pairs, integers(-65536)), VF))

    def step(acc: Any, r: int, address: Any) -> Any:
        pair = b.load(pointer(b, address, I32), align=4)
        first = b.bitcast(b.shl(pair, ir.Constant(I32, 16)), F32)
        second = b.bitcast(b.and_(pair, ir.Constant(I32, -65536)), F32)
        acc = emit_call(b, "llvm.fma.v16f32", VF, even[r], broadcast(b, first, VF), acc)
        return emit_call(b, "llvm.fma.v16f32", VF, odd[r], broadcast(b, second, VF), acc)

    return step


def _f32_step(b: Any, panel: Any, x: Any) -> Callable[[Any, int, Any], Any]:
    weights = [b.load(pointer(b, b.add(panel, ir.Constant(I64, 64 * r)), VF), align=64) for r in range(2)]

    def step(acc: Any, r: int, address: Any) -> Any:
        value = broadcast(b, b.load(pointer(b, address, F32), align=4), VF)
        return emit_call(b, "llvm.fma.v16f32", VF, weights[r], value, acc)

    return step


PREFETCH = 4096  # bytes ahead in the weight stream, which the hardware follows only to the end of a page


def make_tile(tokens: int, kind: str) -> Any:
    """Matrix tile: 32 outputs of `tokens` inputs, tile(panel, x, x_stride, steps, out, out_stride).

    panel holds 128 bytes a step: 32 outputs x (2 bf16 | 1 f32) inputs. Each output is one chain of additions over the steps,
    so its bits depend neither on `tokens` nor on where in the tile it stands.
    """
    step_of = {"bf16_dot": _bf16_dot_step, "bf16_fma": _bf16_fma_step, "f32": _f32_step}[kind]

    @op(types.void, *[types.int64] * 6)
    def tile(b: Any, panel: Any, x: Any, x_stride: Any, steps: Any, out: Any, out_stride: Any) -> None:
        def body(k: Any, accs: list[Any]) -> list[Any]:
            here = b.add(panel, b.mul(k, ir.Constant(I64, 128)))
            for line in range(2):
                ahead = pointer(b, b.add(here, ir.Constant(I64, PREFETCH + 64 * line)), I8)
                flags = [ir.Constant(I32, v) for v in (0, 2, 1)]  # read, into the second cache, data
                emit_call(b, "llvm.prefetch.p0", ir.VoidType(), ahead, *flags)
            step = step_of(b, here, x)
            column = b.add(x, b.mul(k, ir.Constant(I64, 4)))
            sums = []
            for t in range(tokens):
                address = b.add(column, b.mul(x_stride, ir.Constant(I64, t)))
                sums += [step(accs[2 * t + r], r, address) for r in range(2)]
            return sums

        sums = _accumulate(b, steps, [constant(0.0)] * (2 * tokens), body)
        for t in range(tokens):
            row = b.add(out, b.mul(out_stride, ir.Constant(I64, t)))
            for r in range(2):
                b.store(sums[2 * t + r], pointer(b, b.add(row, ir.Constant(I64, 64 * r)), VF), align=4)

    return tile


# ---- attention tiles -------------------------------------------------------------------------------------------------


def make_scores(heads: int, bf16: bool) -> Any:
    """Dot products of `heads` queries with 16 keys: scores(q, q_stride, keys, size, out, out_stride).

    keys is a block [size, 16]: a key's score is one chain over the channels, whatever its lane.
    """

    @op(types.void, *[types.int64] * 6)
    def scores(b: Any, q: Any, q_stride: Any, keys: Any, size: Any, out: Any, out_stride: Any) -> None:
        width = ir.Constant(I64, 32 if bf16 else 64)

        def body(e: Any, accs: list[Any]) -> list[Any]:
            key = _load16(b, b.add(keys, b.mul(e, width)), bf16)
            results = []
            for h, acc in enumerate(accs):
                at = b.add(b.add(q, b.mul(q_stride, ir.Constant(I64, h))), b.mul(e, ir.Constant(I64, 4)))
                value = broadcast(b, b.load(pointer(b, at, F32), align=4), VF)
                results.append(emit_call(b, "llvm.fma.v16f32", VF, key, value, acc))
            return results

        for h, acc in enumerate(_accumulate(b, size, [constant(0.0)] * heads, body)):
            at = b.add(out, b.mul(out_stride, ir.Constant(I64, h)))
            b.store(acc, pointer(b, at, VF), align=4)

    return scores


def make_values(heads: int, bf16: bool) -> Any:
    """Weighted sums of value rows, 32 channels: values(p, p_stride, rows, row_stride, count, sums).

    p: weights of the rows, one array a head; sums: f32 [heads, 32], carried from call to call.
    """

    @op(types.void, *[types.int64] * 6)
    def values(b: Any, p: Any, p_stride: Any, rows: Any, row_stride: Any, count: Any, sums: Any) -> None:
        places = [b.add(sums, ir.Constant(I64, 64 * i)) for i in range(2 * heads)]

        def body(j: Any, accs: list[Any]) -> list[Any]:
            row = b.add(rows, b.mul(j, row_stride))
            halves = [_load16(b, b.add(row, ir.Constant(I64, (32 if bf16 else 64) * i)), bf16) for i in range(2)]
            results = []
            for h in range(heads):
                at = b.add(b.add(p, b.mul(p_stride, ir.Constant(I64, h))), b.mul(j, ir.Constant(I64, 4)))
                weight = broadcast(b, b.load(pointer(b, at, F32), align=4), VF)
                pair = zip(halves, accs[2 * h : 2 * h + 2], strict=True)
                results += [emit_call(b, "llvm.fma.v16f32", VF, half, weight, acc) for half, acc in pair]
            return results

        starts = [b.load(pointer(b, place, VF), align=4) for place in places]
        for place, acc in zip(places, _accumulate(b, count, starts, body), strict=True):
            b.store(acc, pointer(b, place, VF), align=4)

    return values
