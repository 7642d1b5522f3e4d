"""Explicit SIMD for Numba: a vector of 16 floats as a value, and what can be done with it, written as LLVM IR.

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
F32, I64, I32, I16, I8 = ir.FloatType(), *(ir.IntType(bits) for bits in (64, 32, 16, 8))
VF, VI, VH = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I16, LANES)


class _BFloat(ir.Type):  # llvmlite has no bfloat; LLVM does
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


VB = ir.VectorType(_BFloat(), 2 * LANES)


class Float32x16(types.Type):
    """Numba type of a vector register."""

    def __init__(self) -> None:
        super().__init__(name="Float32x16")


vec = Float32x16()


@register_model(Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, VF)


def has_bf16_dot() -> bool:
    """Whether the processor multiplies bf16 pairs itself (AVX512-BF16)."""
    return bool(llvm.get_host_cpu_features().get("avx512bf16", False))


def op(result: Any, *params: Any) -> Callable[[Callable[..., Any]], Any]:
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


def pointer(b: Any, address: Any, pointee: Any) -> Any:
    return b.inttoptr(address, pointee.as_pointer())


def emit_call(b: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def constant(value: float) -> Any:
    return ir.Constant(VF, [value] * LANES)


def integers(value: int) -> Any:
    return ir.Constant(VI, [value] * LANES)


def broadcast(b: Any, scalar: Any, kind: Any) -> Any:
    undef = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(undef, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undef, ir.Constant(VI, [0] * LANES))


def widened(b: Any, address: Any) -> Any:
    half = b.load(pointer(b, address, VH), align=2)
    return b.bitcast(b.shl(b.zext(half, VI), integers(16)), VF)


# ---- memory ----------------------------------------------------------------------------------------------------------


@op(types.float32, types.int64)
def load_scalar(b: Any, address: Any) -> Any:
    """One f32."""
    return b.load(pointer(b, address, F32), align=4)


@op(types.int32, types.int64)
def load_int(b: Any, address: Any) -> Any:
    """One int32."""
    return b.load(pointer(b, address, I32), align=4)


@op(types.int64, types.int64)
def load_long(b: Any, address: Any) -> Any:
    """One int64."""
    return b.load(pointer(b, address, I64), align=8)


@op(types.int64, types.int64)
def load_byte(b: Any, address: Any) -> Any:
    """One byte, 0..255."""
    return b.zext(b.load(pointer(b, address, I8)), I64)


@op(types.void, types.int64, types.int64)
def store_byte(b: Any, address: Any, value: Any) -> None:
    """The low byte."""
    b.store(b.trunc(value, I8), pointer(b, address, I8))


@op(types.void, types.int64, types.int64)
def store_int(b: Any, address: Any, value: Any) -> None:
    """The low 32 bits."""
    b.store(b.trunc(value, I32), pointer(b, address, I32), align=4)


@op(types.void, types.int64, types.int64)
def store_long(b: Any, address: Any, value: Any) -> None:
    """One int64."""
    b.store(value, pointer(b, address, I64), align=8)


@op(types.void, types.int64, types.float32)
def store_scalar(b: Any, address: Any, value: Any) -> None:
    """One f32."""
    b.store(value, pointer(b, address, F32), align=4)


@op(types.float32, types.int64)
def float_of(b: Any, bits: Any) -> Any:
    """The f32 whose bits are the lower half of an int64: how kernels take float arguments."""
    return b.bitcast(b.trunc(bits, I32), F32)


# ---- threads ---------------------------------------------------------------------------------------------------------


@op(types.int64, types.int64, types.int64)
def fetch_add(b: Any, address: Any, value: Any) -> Any:
    """Atomic int64 += value; returns what was there before."""
    return b.atomic_rmw("add", pointer(b, address, I64), value, "seq_cst")


@op(types.int64, types.int64)
def fetch(b: Any, address: Any) -> Any:
    """Atomic read of an int64: what was written before it was raised is visible after."""
    return b.load_atomic(pointer(b, address, I64), "acquire", 8)


@op(types.void, types.int64, types.int64, types.int64)
def call(b: Any, function: Any, args: Any, thread: Any) -> None:
    """Call a compiled kernel by address: function(int64 *args, int64 thread)."""
    kind = ir.FunctionType(ir.VoidType(), [I64.as_pointer(), I64])
    b.call(pointer(b, function, kind), [pointer(b, args, I64), thread])


@op(types.void, types.int64, types.float32)
def store_scalar_bf16(b: Any, address: Any, value: Any) -> None:
    """One f32 rounded to the nearest bf16, ties to even."""
    bits = b.bitcast(value, I32)
    odd = b.and_(b.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = b.lshr(b.add(bits, b.add(odd, ir.Constant(I32, 0x7FFF))), ir.Constant(I32, 16))
    b.store(b.trunc(rounded, I16), pointer(b, address, I16), align=2)


@op(vec, types.int64)
def load_f32(b: Any, address: Any) -> Any:
    """16 f32."""
    return b.load(pointer(b, address, VF), align=4)


@op(types.void, types.int64, vec)
def store_f32(b: Any, address: Any, value: Any) -> None:
    """16 f32."""
    b.store(value, pointer(b, address, VF), align=4)


@op(types.void, types.int64, vec)
def store_bf16(b: Any, address: Any, value: Any) -> None:
    """16 f32 rounded to the nearest bf16, ties to even."""
    bits = b.bitcast(value, VI)
    odd = b.and_(b.lshr(bits, integers(16)), integers(1))
    rounded = b.lshr(b.add(bits, b.add(odd, integers(0x7FFF))), integers(16))
    b.store(b.trunc(rounded, VH), pointer(b, address, VH), align=2)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@op(vec, types.float32)
def splat(b: Any, value: Any) -> Any:
    """The same float in every lane."""
    return broadcast(b, value, VF)


@op(vec, vec, vec)
def add(b: Any, x: Any, y: Any) -> Any:
    """x + y."""
    return b.fadd(x, y)


@op(vec, vec, vec)
def sub(b: Any, x: Any, y: Any) -> Any:
    """x - y."""
    return b.fsub(x, y)


@op(vec, vec, vec)
def mul(b: Any, x: Any, y: Any) -> Any:
    """x * y."""
    return b.fmul(x, y)


@op(vec, vec, vec)
def maximum(b: Any, x: Any, y: Any) -> Any:
    """The larger one, lane by lane."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@op(vec, vec, vec, vec)
def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""
    return emit_call(b, "llvm.fma.v16f32", VF, x, y, z)


def _reduce(b: Any, x: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Halve the vector until one lane is left: a fixed tree."""
    width = LANES
    while width > 1:
        width //= 2
        low = ir.Constant(ir.VectorType(I32, width), list(range(width)))
        high = ir.Constant(ir.VectorType(I32, width), list(range(width, 2 * width)))
        undef = ir.Constant(x.type, ir.Undefined)
        x = combine(b.shuffle_vector(x, undef, low), b.shuffle_vector(x, undef, high))
    return b.extract_element(x, ir.Constant(I32, 0))


@op(types.float32, vec)
def horizontal_sum(b: Any, x: Any) -> Any:
    """Sum of the lanes."""
    return _reduce(b, x, b.fadd)


@op(types.float32, vec)
def horizontal_max(b: Any, x: Any) -> Any:
    """Largest lane."""
    return _reduce(b, x, lambda u, v: b.select(b.fcmp_ordered(">", u, v), u, v))


def _exp(b: Any, x: Any) -> Any:
    """e^x: x = n ln 2 + r with |r| <= ln 2 / 2, a degree-7 Taylor polynomial in r, and n put into the exponent.

    Relative error below 2e-7 (the tests hold it to that); arguments are clamped to [-87, 88].
    """
    x = b.select(b.fcmp_ordered(">", x, constant(88.0)), constant(88.0), x)
    x = b.select(b.fcmp_ordered("<", x, constant(-87.0)), constant(-87.0), x)
    n = emit_call(b, "llvm.rint.v16f32", VF, b.fmul(x, constant(1 / math.log(2))))
    r = emit_call(b, "llvm.fma.v16f32", VF, n, constant(-0.693359375), x)  # ln 2 in two parts: n * first is exact
    r = emit_call(b, "llvm.fma.v16f32", VF, n, constant(0.693359375 - math.log(2)), r)
    y = constant(1 / math.factorial(7))
    for k in range(6, -1, -1):
        y = emit_call(b, "llvm.fma.v16f32", VF, y, r, constant(1 / math.factorial(k)))
    exponent = b.shl(b.add(b.fptosi(n, VI), integers(127)), integers(23))
    return b.fmul(y, b.bitcast(exponent, VF))


exp = op(vec, vec)(_exp)


@op(vec, vec)
def silu(b: Any, x: Any) -> Any:
    """x / (1 + e^-x)."""
    return b.fdiv(x, b.fadd(constant(1.0), _exp(b, b.fneg(x))))
