"""Triton's interpreter with bf16 and FP8 as the hardware rounds them: it truncates, and multiplies bf16 as integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
INTEGERS: dict[int, tuple[Any, torch.dtype]] = {
    4: (np.uint32, torch.int32),
    2: (np.uint16, torch.int16),
    1: (np.uint8, torch.uint8),
}


def convert(data: Any, source: Any, target: Any, rounding: Any = None) -> Any:
    """Bits of one float format to those of another, rounded to nearest even by torch."""
    old, new = TORCH[source], TORCH[target]
    signed = {4: np.int32, 2: np.int16, 1: np.uint8}[old.itemsize]
    bits = torch.from_numpy(np.ascontiguousarray(data).view(signed).copy())
    unsigned, same = INTEGERS[new.itemsize]
    return bits.view(old).to(torch.float32).to(new).view(same).numpy().view(unsigned)


def install() -> None:
    """Mend the interpreter of this process."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        wide = []
        for x in (a, b):
            if x.dtype.scalar in (tl.bfloat16, tl.float8e4nv):
                x = interpreter.TensorHandle(convert(x.data, x.dtype.scalar, tl.float32).view(np.float32), tl.float32)
            wide.append(x)
        return multiply(self, *wide, d, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert
