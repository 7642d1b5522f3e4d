"""Run a compiled kernel on all threads, in the OpenMP pool that torch uses already."""

from __future__ import annotations

import ctypes
import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from numba import types

MAX_ARGS = 32


@functools.cache
def _openmp() -> Any:
    """torch's libgomp, or None where torch brings another runtime (macOS, Windows)."""
    if sys.platform != "linux":
        return None
    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    found += sorted(Path(torch.__file__).parent.parent.glob("torch.libs/libgomp*.so*"))
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


def _no_thread_number() -> int:
    return 0


_NUMBER = ctypes.CFUNCTYPE(ctypes.c_int)
_single = _NUMBER(_no_thread_number)
_library = _openmp()
llvm.add_symbol(
    "specdec_thread_num",
    ctypes.cast(_library.omp_get_thread_num if _library else _single, ctypes.c_void_p).value,
)
thread_num = types.ExternalFunction("specdec_thread_num", types.int32())


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def check_real(x: torch.Tensor) -> None:
    """Kernels take addresses; a fake or subclassed tensor has none to give."""
    if type(x) is not torch.Tensor:
        raise TypeError(f"a compiled kernel got a {type(x).__name__}, which has no memory: use backend=torch there")


class Kernel:
    """A compiled kernel: `entry(args)` for OpenMP, `single(args, thread)` for a pool of our own.

    args[0] is the number of threads; the kernel shares its work out by thread number and never waits for another thread.
    """

    def __init__(self, entry: Any, single: Any) -> None:
        self._entry = entry.address
        self._single = single.ctypes
        self._args = (ctypes.c_int64 * MAX_ARGS)()
        self._address = ctypes.addressof(self._args)
        self._run = _library.GOMP_parallel if _library else None

    def __call__(self, *args: int) -> None:
        threads = torch.get_num_threads()
        self._args[0] = threads
        self._args[1 : 1 + len(args)] = args
        if self._run is not None:
            self._run(self._entry, self._address, threads, 0)
            return
        jobs = [_pool(threads).submit(self._single, self._args, thread) for thread in range(threads)]
        for job in jobs:
            job.result()
