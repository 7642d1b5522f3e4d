"""Run kernels on all threads: one at a time, or recorded into a program that replays in a single parallel region.

A kernel's work is cut into chunks that threads take as they come, and a kernel is over when its chunks are, not when every
thread has arrived: a thread that the operating system has put aside is waited for only if it holds a chunk. Threads are
those of torch's own OpenMP pool.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from specdec.kernels.cpu import simd
from specdec.paths import cache_dir

MAX_ARGS = 32  # int64 arguments of a kernel; the first two are the address of its counters and its number of chunks
_SPINS = 2000  # looks at an unfinished kernel before the processor is offered to others


@functools.cache
def _openmp() -> Any:
    """torch's libgomp, or None where torch brings another runtime (macOS, Windows)."""
    if sys.platform != "linux":
        return None
    root = Path(torch.__file__).parent
    found = sorted([*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")])
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


@ctypes.CFUNCTYPE(ctypes.c_int)
def _zero() -> int:
    return 0


_library = _openmp()
_symbols = {
    "specdec_thread_num": _library.omp_get_thread_num if _library else _zero,
    "specdec_give_way": getattr(ctypes.CDLL(None), "sched_yield", _zero) if sys.platform != "win32" else _zero,
}
for _name, _function in _symbols.items():
    llvm.add_symbol(_name, ctypes.cast(_function, ctypes.c_void_p).value)
_thread_num = types.ExternalFunction("specdec_thread_num", types.int32())
_give_way = types.ExternalFunction("specdec_give_way", types.int32())


# ---- compiling -------------------------------------------------------------------------------------------------------


def _sources() -> str:
    """Fingerprint of everything that goes into the kernels: Numba itself looks at a function's own file only."""
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compiled(signature: Any) -> Callable[[Any], Any]:
    """Compile a function of C arguments once, and keep the machine code for the next process."""

    def decorate(function: Any) -> Any:
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(cache_dir() / f"kernels-{_sources()}")
        try:
            return cfunc(signature, error_model="numpy", cache=True)(function)
        finally:
            numba.config.CACHE_DIR = before

    return decorate


_KERNEL = types.void(types.CPointer(types.int64), types.int64)


def kernel(function: Any) -> Kernel:
    """Make a launcher of `function(args: int64 *, thread: int64)`."""
    return Kernel(compiled(_KERNEL)(function))


# ---- compiled --------------------------------------------------------------------------------------------------------


@njit(error_model="numpy")
def take(a):
    """The next chunk of a kernel that nobody has taken yet; a[1] or more: none is left."""
    return simd.fetch_add(a[0], 1)


@njit(error_model="numpy")
def finish(a):
    """Tell that a chunk is done."""
    simd.fetch_add(a[0] + 8, 1)


@njit(error_model="numpy")
def _execute(header, thread):
    """header = [kernels, rows of (function, args, counters, chunks)]: one kernel after the other."""
    for i in range(header[0]):
        row = header[1] + 32 * i
        simd.call(simd.load_long(row), simd.load_long(row + 8), thread)
        counters, chunks = simd.load_long(row + 16), simd.load_long(row + 24)
        spins = 0
        while simd.fetch(counters + 8) < chunks:
            spins += 1
            if spins > _SPINS:
                _give_way()


@compiled(types.void(types.CPointer(types.int64)))
def _region(header):
    _execute(carray(header, (2,)), types.int64(_thread_num()))


@compiled(_KERNEL)
def _member(header, thread):
    _execute(carray(header, (2,)), thread)


_region_address = _region.address

# ---- launching -------------------------------------------------------------------------------------------------------


class Program:
    """Kernel launches with their arguments, in order. The tensors they point to must stay where they are."""

    def __init__(self) -> None:
        self._launches: list[tuple[int, tuple[int, ...], int]] = []
        self._kept: list[Tensor] = []

    def add(self, function: int, args: tuple[int, ...], chunks: int, keep: tuple[Tensor, ...]) -> None:
        self._launches.append((function, args, chunks))
        self._kept += keep

    def seal(self) -> None:
        """Lay the launches out in memory; `run` may follow any number of times."""
        count = len(self._launches)
        self._counters = np.zeros((count, 8), dtype=np.int64)  # a cache line each
        self._args = np.zeros((count, MAX_ARGS), dtype=np.int64)
        self._table = np.zeros((count, 4), dtype=np.int64)
        for i, (function, args, chunks) in enumerate(self._launches):
            counters = self._counters[i].ctypes.data
            self._args[i, : len(args) + 2] = (counters, chunks, *args)
            self._table[i] = (function, self._args[i].ctypes.data, counters, chunks)
        self._header = np.array([count, self._table.ctypes.data], dtype=np.int64)
        self._address = self._header.ctypes.data

    def run(self) -> None:
        """Run the kernels on torch's threads."""
        self._counters.fill(0)
        _launch(self._address)


def _launch(address: int) -> None:
    """Execute a header of launches on all threads."""
    threads = torch.get_num_threads()
    if _library is not None:
        _library.GOMP_parallel(_region_address, address, threads, 0)
        return
    header = ctypes.cast(address, ctypes.POINTER(ctypes.c_int64))
    for job in [_pool(threads).submit(_member.ctypes, header, thread) for thread in range(threads)]:
        job.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


_recording: Program | None = None


@contextmanager
def record() -> Iterator[Program]:
    """Launches within are written down instead of run."""
    global _recording
    assert _recording is None, "recordings do not nest"
    program = _recording = Program()
    try:
        yield program
    finally:
        _recording = None
    program.seal()


def recording() -> bool:
    return _recording is not None


class Kernel:
    """A compiled kernel, `function(int64 *args, int64 thread)`: it takes chunks, does them, and tells so."""

    def __init__(self, function: Any) -> None:
        self._function = function.address
        self._direct = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(self._function)
        self._counters = (ctypes.c_int64 * 8)()
        self._args = (ctypes.c_int64 * MAX_ARGS)()
        counters, args = ctypes.addressof(self._counters), ctypes.addressof(self._args)
        self._args[0] = counters
        self._row = (ctypes.c_int64 * 4)(self._function, args, counters, 0)
        self._header = (ctypes.c_int64 * 2)(1, ctypes.addressof(self._row))
        self._address = args

    def __call__(self, *args: int, chunks: int, keep: tuple[Tensor, ...] = ()) -> None:
        """Launch, or write down for a program. `keep`: memory that the arguments point to."""
        if _recording is not None:
            _recording.add(self._function, args, chunks, keep)
            return
        self._counters[0] = self._counters[1] = 0
        self._args[1] = self._row[3] = chunks
        self._args[2 : 2 + len(args)] = list(args)
        _launch(ctypes.addressof(self._header))

    def call(self, *args: int) -> None:
        """Run it here and now on this thread alone, without counters: for kernels that take no chunks."""
        self._args[2 : 2 + len(args)] = list(args)
        self._direct(self._address, 0)


def bits_of(value: float) -> int:
    """A float argument as `simd.float_of` reads it."""
    return int(struct.unpack("i", struct.pack("f", value))[0])


def check_real(x: Tensor) -> None:
    """Kernels take addresses; a fake or subclassed tensor has none to give."""
    if type(x) is not Tensor:
        raise TypeError(f"a compiled kernel got a {type(x).__name__}, which has no memory: use backend=torch there")
