"""Triton's interpreter with bf16 and FP8 as the hardware rounds them: it truncates, and multiplies bf16 as integers.

It runs a launch's programs one after another; `side_by_side` lets them wait for one another.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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


def side_by_side(kernel: str) -> None:
    """From now on that kernel's programs are threads of this process, which take turns where one looks at volatile memory."""
    own, turn = threading.local(), threading.Lock()
    builder: Any = interpreter.InterpreterBuilder
    builder.grid_idx = property(lambda self: own.index, lambda self, index: setattr(own, "index", index))
    load, make = builder.create_masked_load, interpreter.GridExecutor.__init__

    def create_masked_load(self: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("is_volatile", arguments[-1]) and turn.locked():  # what is there may be another program's
            turn.release()
            time.sleep(1e-4)
            turn.acquire()
        return load(self, *arguments, **options)

    def init(self: Any, fn: Callable[..., None], *rest: Any) -> None:
        make(self, fn, *rest)
        if fn.__name__ != kernel:
            return
        programs: list[Future[None]] = []
        pool = ThreadPoolExecutor(64)

        def program(index: tuple[int, ...], arguments: dict[str, Any]) -> None:
            own.index = index
            with turn:
                fn(**arguments)

        @functools.wraps(fn)
        def start(**arguments: Any) -> None:
            programs.append(pool.submit(program, own.index, arguments))
            if len(programs) == math.prod(interpreter.interpreter_builder.grid_dim):
                pool.shutdown()
                for one in programs:
                    one.result()

        start.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]
        self.fn = start

    builder.create_masked_load = create_masked_load
    interpreter.GridExecutor.__init__ = init
