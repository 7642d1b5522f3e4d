"""Compiles Triton kernels for GPUs that need not be there, in a process of its own without the interpreter.

Run as a script: jobs as JSON on stdin, what was compiled as JSON on stdout, so that torch is loaded once for all of them.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Kind = str | Sequence[str]  # of a tuple the types of its elements


@dataclass
class Job:
    """One kernel for one architecture (86: Ampere, 90: Hopper, 100: Blackwell)."""

    module: str
    kernel: str
    signature: Mapping[str, Kind]  # run-time argument -> type, e.g. "*fp32", "i32"; pointers count as 16-byte aligned
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    arch: int = 90
    options: Mapping[str, Any] = field(default_factory=dict)  # num_warps, num_stages, ...
    divisible: Sequence[str] = ()  # integer arguments that are multiples of 16


@dataclass
class CompiledInfo:
    """What came out. registers: per thread; shared, spills: bytes; spills of stores and loads together."""

    ptx: str
    registers: int
    shared: int
    spills: int


def compile_kernels(jobs: Sequence[Job], python: str = sys.executable) -> list[CompiledInfo]:
    """All jobs in one subprocess; the compiler's message is in the error of a job that fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [python, __file__], input=json.dumps([asdict(job) for job in jobs]), cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [CompiledInfo(**found) for found in json.loads(done.stdout.splitlines()[-1])]


def compile_kernel(
    module: str, kernel: str, signature: Mapping[str, Kind], constexprs: Mapping[str, Any], arch: int, **options: Any
) -> CompiledInfo:
    """One job."""
    return compile_kernels([Job(module, kernel, signature, constexprs, arch, options)])[0]


def _compile(job: Job) -> CompiledInfo:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(job.module), job.kernel)
    names = list(function.arg_names)
    given = {name: kind if isinstance(kind, str) else tuple(kind) for name, kind in job.signature.items()}
    kinds: dict[str, Any] = {**{name: "constexpr" for name in job.constexprs}, **given}
    assert set(kinds) == set(names), f"{job.kernel} takes {names}, the job names {sorted(kinds)}"
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(names):
        if isinstance(kinds[name], tuple):
            aligned += [(i, j) for j, kind in enumerate(kinds[name]) if kind.startswith("*")]
        elif kinds[name].startswith("*") or name in job.divisible:
            aligned.append((i,))
    source = ASTSource(
        fn=function, signature={name: kinds[name] for name in names}, constexprs=dict(job.constexprs),
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )  # fmt: skip
    options = {"enable_fp_fusion": False, **job.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    ptx: str = compiled.asm["ptx"]
    registers, spills = _resources(ptx, job.arch)
    return CompiledInfo(ptx, registers, compiled.metadata.shared, spills)


def _resources(ptx: str, arch: int) -> tuple[int, int]:
    """Registers a thread and bytes spilled, as the bundled assembler reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            get_ptxas(arch).path,
            "-v",
            "--fmad=false",
            f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}",
            str(path),
            "-o",
            f"{folder}/out",
        ]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    used = re.search(r"Used (\d+) registers", log)
    assert used, log
    return int(used.group(1)), sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


if __name__ == "__main__":
    print(json.dumps([asdict(_compile(Job(**job))) for job in json.load(sys.stdin)]))
