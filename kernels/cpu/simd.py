"""Explicit SIMD for Numba: a vector of 16 floats as a value, and the matrix tile, written as LLVM IR.

Numba's own vectoriser may not touch a floating-point reduction (that would change its order), so the kernels say the
vectors themselves. Every operation here is exact about its order: the bits of a result depend on its operands alone. LLVM
splits a 16-float vector into whatever registers the machine has. Addresses are int64, in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LANES = 16
_F32, _I64, _I32, _I16, _I8, _I1 = (
    ir.FloatType(),
    ir.IntType(64),
    ir.IntType(32),
    ir.IntType(16),
    ir.IntType(8),
    ir.IntType(1),
)
_VF, _VI, _VH = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES), ir.VectorType(_I16, LANES)


class _BFloat(ir.Type):  # llvmlite has no bfloat; LLVM does
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


_VB = ir.VectorType(_BFloat(), 2 * LANES)


class Float32x16(types.Type):
    """Numba type of a vector register."""

    def __init__(self) -> None:
        super().__init__(name="Float32x16")


vec = Float32x16()


@register_model(Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VF)


def has_bf16_dot() -> bool:
    """Whether the processor multiplies bf16 pairs itself (AVX512-BF16)."""
    return bool(llvm.get_host_cpu_features().get("avx512bf16", False))


def _op(result: Any, *params: Any) -> Callable[[Callable[..., Any]], Any]:
    """Turn `emit(builder, *operands) -> value` into a Numba intrinsic of that signature."""

    def wrap(emit: Callable[..., Any]) -> Any:
        signature = result(*params)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = emit(builder, *args)
            return context.get_dummy_value() if result is types.void else value

        def typer1(ctx: Any, a: Any) -> Any:
            return signature, codegen

        def typer2(ctx: Any, a: Any, b: Any) -> Any:
            return signature, codegen

        def typer3(ctx: Any, a: Any, b: Any, c: Any) -> Any:
            return signature, codegen

        def typer6(ctx: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
            return signature, codegen

        return intrinsic({1: typer1, 2: typer2, 3: typer3, 6: typer6}[len(params)])

    return wrap


def _pointer(b: Any, address: Any, pointee: Any) -> Any:
    return b.inttoptr(address, pointee.as_pointer())


def _call(b: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def _constant(value: float) -> Any:
    return ir.Constant(_VF, [value] * LANES)


def _integers(value: int) -> Any:
    return ir.Constant(_VI, [value] * LANES)


def _broadcast(b: Any, scalar: Any, kind: Any) -> Any:
    undef = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(undef, scalar, ir.Constant(_I32, 0))
    return b.shuffle_vector(first, undef, ir.Constant(_VI, [0] * LANES))


def _widened(b: Any, address: Any) -> Any:
    half = b.load(_pointer(b, address, _VH), align=2)
    return b.bitcast(b.shl(b.zext(half, _VI), _integers(16)), _VF)


# ---- memory ----------------------------------------------------------------------------------------------------------


@_op(types.float32, types.int64)
def load_scalar(b: Any, address: Any) -> Any:
    """One f32."""
    return b.load(_pointer(b, address, _F32), align=4)


@_op(types.int32, types.int64)
def load_int(b: Any, address: Any) -> Any:
    """One int32."""
    return b.load(_pointer(b, address, _I32), align=4)


@_op(types.int64, types.int64)
def load_long(b: Any, address: Any) -> Any:
    """One int64."""
    return b.load(_pointer(b, address, _I64), align=8)


@_op(types.int64, types.int64)
def load_byte(b: Any, address: Any) -> Any:
    """One byte, 0..255."""
    return b.zext(b.load(_pointer(b, address, _I8)), _I64)


@_op(types.void, types.int64, types.int64)
def store_byte(b: Any, address: Any, value: Any) -> None:
    """The low byte."""
    b.store(b.trunc(value, _I8), _pointer(b, address, _I8))


@_op(types.void, types.int64, types.int64)
def store_int(b: Any, address: Any, value: Any) -> None:
    """The low 32 bits."""
    b.store(b.trunc(value, _I32), _pointer(b, address, _I32), align=4)


@_op(types.void, types.int64, types.int64)
def store_long(b: Any, address: Any, value: Any) -> None:
    """One int64."""
    b.store(value, _pointer(b, address, _I64), align=8)


@_op(types.void, types.int64, types.float32)
def store_scalar(b: Any, address: Any, value: Any) -> None:
    """One f32."""
    b.store(value, _pointer(b, address, _F32), align=4)


@_op(types.float32, types.int64)
def float_of(b: Any, bits: Any) -> Any:
    """The f32 whose bits are the lower half of an int64: how kernels take float arguments."""
    return b.bitcast(b.trunc(bits, _I32), _F32)


# ---- threads ---------------------------------------------------------------------------------------------------------


@_op(types.int64, types.int64, types.int64)
def fetch_add(b: Any, address: Any, value: Any) -> Any:
    """Atomic int64 += value; returns what was there before."""
    return b.atomic_rmw("add", _pointer(b, address, _I64), value, "seq_cst")


@_op(types.int64, types.int64)
def fetch(b: Any, address: Any) -> Any:
    """Atomic read of an int64: what was written before it was raised is visible after."""
    return b.load_atomic(_pointer(b, address, _I64), "acquire", 8)


@_op(types.void, types.int64, types.int64, types.int64)
def call(b: Any, function: Any, args: Any, thread: Any) -> None:
    """Call a compiled kernel by address: function(int64 *args, int64 thread)."""
    kind = ir.FunctionType(ir.VoidType(), [_I64.as_pointer(), _I64])
    b.call(_pointer(b, function, kind), [_pointer(b, args, _I64), thread])


@_op(types.void, types.int64, types.float32)
def store_scalar_bf16(b: Any, address: Any, value: Any) -> None:
    """One f32 rounded to the nearest bf16, ties to even."""
    bits = b.bitcast(value, _I32)
    odd = b.and_(b.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
    rounded = b.lshr(b.add(bits, b.add(odd, ir.Constant(_I32, 0x7FFF))), ir.Constant(_I32, 16))
    b.store(b.trunc(rounded, _I16), _pointer(b, address, _I16), align=2)


@_op(vec, types.int64)
def load_f32(b: Any, address: Any) -> Any:
    """16 f32."""
    return b.load(_pointer(b, address, _VF), align=4)


@_op(vec, types.int64)
def load_bf16(b: Any, address: Any) -> Any:
    """16 bf16, widened: a bf16 is the upper half of an f32."""
    return _widened(b, address)


@_op(types.void, types.int64, vec)
def store_f32(b: Any, address: Any, value: Any) -> None:
    """16 f32."""
    b.store(value, _pointer(b, address, _VF), align=4)


@_op(types.void, types.int64, vec)
def store_bf16(b: Any, address: Any, value: Any) -> None:
    """16 f32 rounded to the nearest bf16, ties to even."""
    bits = b.bitcast(value, _VI)
    odd = b.and_(b.lshr(bits, _integers(16)), _integers(1))
    rounded = b.lshr(b.add(bits, b.add(odd, _integers(0x7FFF))), _integers(16))
    b.store(b.trunc(rounded, _VH), _pointer(b, address, _VH), align=2)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@_op(vec, types.float32)
def splat(b: Any, value: Any) -> Any:
    """The same float in every lane."""
    return _broadcast(b, value, _VF)


@_op(vec, vec, vec)
def add(b: Any, x: Any, y: Any) -> Any:
    """x + y."""
    return b.fadd(x, y)


@_op(vec, vec, vec)
def sub(b: Any, x: Any, y: Any) -> Any:
    """x - y."""
    return b.fsub(x, y)


@_op(vec, vec, vec)
def mul(b: Any, x: Any, y: Any) -> Any:
    """x * y."""
    return b.fmul(x, y)


@_op(vec, vec, vec)
def div(b: Any, x: Any, y: Any) -> Any:
    """x / y."""
    return b.fdiv(x, y)


@_op(vec, vec, vec)
def maximum(b: Any, x: Any, y: Any) -> Any:
    """The larger one, lane by lane."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@_op(vec, vec, vec, vec)
def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""
    return _call(b, "llvm.fma.v16f32", _VF, x, y, z)


def _reduce(b: Any, x: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Halve the vector until one lane is left: a fixed tree."""
    width = LANES
    while width > 1:
        width //= 2
        low = ir.Constant(ir.VectorType(_I32, width), list(range(width)))
        high = ir.Constant(ir.VectorType(_I32, width), list(range(width, 2 * width)))
        undef = ir.Constant(x.type, ir.Undefined)
        x = combine(b.shuffle_vector(x, undef, low), b.shuffle_vector(x, undef, high))
    return b.extract_element(x, ir.Constant(_I32, 0))


@_op(types.float32, vec)
def horizontal_sum(b: Any, x: Any) -> Any:
    """Sum of the lanes."""
    return _reduce(b, x, b.fadd)


@_op(types.float32, vec)
def horizontal_max(b: Any, x: Any) -> Any:
    """Largest lane."""
    return _reduce(b, x, lambda u, v: b.select(b.fcmp_ordered(">", u, v), u, v))


def _exp(b: Any, x: Any) -> Any:
    """e^x: x = n ln 2 + r with |r| <= ln 2 / 2, a degree-7 Taylor polynomial in r, and n put into the exponent.

    Relative error below 2e-7 (the tests hold it to that); arguments are clamped to [-87, 88].
    """
    x = b.select(b.fcmp_ordered(">", x, _constant(88.0)), _constant(88.0), x)
    x = b.select(b.fcmp_ordered("<", x, _constant(-87.0)), _constant(-87.0), x)
    n = _call(b, "llvm.rint.v16f32", _VF, b.fmul(x, _constant(1 / math.log(2))))
    r = _call(b, "llvm.fma.v16f32", _VF, n, _constant(-0.693359375), x)  # ln 2 in two parts: n * first is exact
    r = _call(b, "llvm.fma.v16f32", _VF, n, _constant(0.693359375 - math.log(2)), r)
    y = _constant(1 / math.factorial(7))
    for k in range(6, -1, -1):
        y = _call(b, "llvm.fma.v16f32", _VF, y, r, _constant(1 / math.factorial(k)))
    exponent = b.shl(b.add(b.fptosi(n, _VI), _integers(127)), _integers(23))
    return b.fmul(y, b.bitcast(exponent, _VF))


exp = _op(vec, vec)(_exp)


@_op(vec, vec)
def silu(b: Any, x: Any) -> Any:
    """x / (1 + e^-x)."""
    return b.fdiv(x, b.fadd(_constant(1.0), _exp(b, b.fneg(x))))


# ---- loops -----------------------------------------------------------------------------------------------------------


def _load16(b: Any, address: Any, bf16: bool) -> Any:
    """16 values as f32, from either storage."""
    if not bf16:
        return b.load(_pointer(b, address, _VF), align=4)
    return _widened(b, address)


def _accumulate(b: Any, count: Any, accs: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """for i in range(count), count >= 1: accs = body(i, accs), in registers."""
    entry, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(_I64)
    i.add_incoming(ir.Constant(_I64, 0), entry)
    inside = [b.phi(_VF) for _ in accs]
    for phi, value in zip(inside, accs, strict=True):
        phi.add_incoming(value, entry)
    results = body(i, inside)
    following = b.add(i, ir.Constant(_I64, 1))
    i.add_incoming(following, b.block)
    for phi, value in zip(inside, results, strict=True):
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, count), loop, done)
    b.position_at_end(done)
    return results


# ---- the matrix tile -------------------------------------------------------------------------------------------------


def _bf16_dot_step(b: Any, panel: Any, x: Any) -> Callable[[Any, int, Any], Any]:
    """AVX512-BF16: a register of 16 rows x 2 inputs times a broadcast pair of inputs."""
    weights = [b.load(_pointer(b, b.add(panel, ir.Constant(_I64, 64 * r)), _VB), align=64) for r in range(2)]

    def step(acc: Any, r: int, address: Any) -> Any:
        pair = b.bitcast(_broadcast(b, b.load(_pointer(b, address, _I32), align=4), _VI), _VB)
        return _call(b, "llvm.x86.avx512bf16.dpbf16ps.512", _VF, acc, weights[r], pair)

    return step


def _bf16_fma_step(b: Any, panel: Any, x: Any) -> Callable[[Any, int, Any], Any]:
    """Any processor: the same packed pairs, widened, two fused multiply-adds."""
    even, odd = [], []
    for r in range(2):
        pairs = b.load(_pointer(b, b.add(panel, ir.Constant(_I64, 64 * r)), _VI), align=64)
        even.append(b.bitcast(b.shl(pairs, _integers(16)), _VF))
        odd.append(b.bitcast(b.and_(pairs, _integers(-65536)), _VF))

    def step(acc: Any, r: int, address: Any) -> Any:
        pair = b.load(_pointer(b, address, _I32), align=4)
        first = b.bitcast(b.shl(pair, ir.Constant(_I32, 16)), _F32)
        second = b.bitcast(b.and_(pair, ir.Constant(_I32, -65536)), _F32)
        acc = _call(b, "llvm.fma.v16f32", _VF, even[r], _broadcast(b, first, _VF), acc)
        return _call(b, "llvm.fma.v16f32", _VF, odd[r], _broadcast(b, second, _VF), acc)

    return step


def _f32_step(b: Any, panel: Any, x: Any) -> Callable[[Any, int, Any], Any]:
    weights = [b.load(_pointer(b, b.add(panel, ir.Constant(_I64, 64 * r)), _VF), align=64) for r in range(2)]

    def step(acc: Any, r: int, address: Any) -> Any:
        value = _broadcast(b, b.load(_pointer(b, address, _F32), align=4), _VF)
        return _call(b, "llvm.fma.v16f32", _VF, weights[r], value, acc)

    return step


PREFETCH = 2048  # bytes ahead in the weight stream, which the hardware follows only to the end of a page


def make_tile(tokens: int, kind: str) -> Any:
    """Matrix tile: 32 outputs of `tokens` inputs, tile(panel, x, x_stride, steps, out, out_stride).

    panel holds 128 bytes a step: 32 outputs x (2 bf16 | 1 f32) inputs. Each output is one chain of additions over the steps,
    so its bits depend neither on `tokens` nor on where in the tile it stands.
    """
    step_of = {"bf16_dot": _bf16_dot_step, "bf16_fma": _bf16_fma_step, "f32": _f32_step}[kind]

    @_op(types.void, *[types.int64] * 6)
    def tile(b: Any, panel: Any, x: Any, x_stride: Any, steps: Any, out: Any, out_stride: Any) -> None:
        def body(k: Any, accs: list[Any]) -> list[Any]:
            here = b.add(panel, b.mul(k, ir.Constant(_I64, 128)))
            for line in range(2):
                ahead = _pointer(b, b.add(here, ir.Constant(_I64, PREFETCH + 64 * line)), _I8)
                flags = [ir.Constant(_I32, v) for v in (0, 2, 1)]  # read, into the second cache, data
                _call(b, "llvm.prefetch.p0", ir.VoidType(), ahead, *flags)
            step = step_of(b, here, x)
            column = b.add(x, b.mul(k, ir.Constant(_I64, 4)))
            sums = []
            for t in range(tokens):
                address = b.add(column, b.mul(x_stride, ir.Constant(_I64, t)))
                sums += [step(accs[2 * t + r], r, address) for r in range(2)]
            return sums

        sums = _accumulate(b, steps, [_constant(0.0)] * (2 * tokens), body)
        for t in range(tokens):
            row = b.add(out, b.mul(out_stride, ir.Constant(_I64, t)))
            for r in range(2):
                b.store(sums[2 * t + r], _pointer(b, b.add(row, ir.Constant(_I64, 64 * r)), _VF), align=4)

    return tile


# ---- attention tiles -------------------------------------------------------------------------------------------------


def make_scores(heads: int, bf16: bool) -> Any:
    """Dot products of `heads` queries with 16 keys: scores(q, q_stride, keys, size, out, out_stride).

    keys is a block [size, 16]: a key's score is one chain over the channels, whatever its lane.
    """

    @_op(types.void, *[types.int64] * 6)
    def scores(b: Any, q: Any, q_stride: Any, keys: Any, size: Any, out: Any, out_stride: Any) -> None:
        width = ir.Constant(_I64, 32 if bf16 else 64)

        def body(e: Any, accs: list[Any]) -> list[Any]:
            key = _load16(b, b.add(keys, b.mul(e, width)), bf16)
            results = []
            for h, acc in enumerate(accs):
                at = b.add(b.add(q, b.mul(q_stride, ir.Constant(_I64, h))), b.mul(e, ir.Constant(_I64, 4)))
                value = _broadcast(b, b.load(_pointer(b, at, _F32), align=4), _VF)
                results.append(_call(b, "llvm.fma.v16f32", _VF, key, value, acc))
            return results

        for h, acc in enumerate(_accumulate(b, size, [_constant(0.0)] * heads, body)):
            at = b.add(out, b.mul(out_stride, ir.Constant(_I64, h)))
            b.store(acc, _pointer(b, at, _VF), align=4)

    return scores


def make_values(heads: int, bf16: bool) -> Any:
    """Weighted sums of value rows, 32 channels: values(p, p_stride, rows, row_stride, count, sums).

    p: weights of the rows, one array a head; sums: f32 [heads, 32], carried from call to call.
    """

    @_op(types.void, *[types.int64] * 6)
    def values(b: Any, p: Any, p_stride: Any, rows: Any, row_stride: Any, count: Any, sums: Any) -> None:
        places = [b.add(sums, ir.Constant(_I64, 64 * i)) for i in range(2 * heads)]

        def body(j: Any, accs: list[Any]) -> list[Any]:
            row = b.add(rows, b.mul(j, row_stride))
            halves = [_load16(b, b.add(row, ir.Constant(_I64, (32 if bf16 else 64) * i)), bf16) for i in range(2)]
            results = []
            for h in range(heads):
                at = b.add(b.add(p, b.mul(p_stride, ir.Constant(_I64, h))), b.mul(j, ir.Constant(_I64, 4)))
                weight = _broadcast(b, b.load(_pointer(b, at, _F32), align=4), _VF)
                for i in range(2):
                    results.append(_call(b, "llvm.fma.v16f32", _VF, halves[i], weight, accs[2 * h + i]))
            return results

        starts = [b.load(_pointer(b, place, _VF), align=4) for place in places]
        for place, acc in zip(places, _accumulate(b, count, starts, body), strict=True):
            b.store(acc, _pointer(b, place, _VF), align=4)

    return values
