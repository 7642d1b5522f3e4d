"""The forward's kernels compiled as Hopper and Blackwell would get them, for the sizes of real models. No GPU needed.

A model without memory runs once on the GPU's operations; what these would launch is noted and compiled.
"""

from __future__ import annotations

from itertools import product

import pytest
from _cross_compile import CompiledInfo, Job, compile_kernels
from _launches import launches
from compiled_kernels import maverick_jobs

from specdec.kernels.gpu.linear import TOKENS
from specdec.kernels.gpu.table import tile
from specdec.nn import ModelConfig

LOOPS = "linear_kernel", "expert_gate_up_kernel", "expert_down_kernel"
SHARED = {86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024}  # bytes a program can have
SMOLLM2 = ModelConfig(49152, 576, 1536, 1, 9, 3, 64, tie_word_embeddings=True)
LLAMA_8B = ModelConfig(128256, 4096, 14336, 1, 32, 8, 128)
QWEN3 = ModelConfig(151936, 1024, 3072, 1, 16, 8, 128, model_type="qwen3", qk_norm="weighted")
SCOUT = ModelConfig(
    202048, 5120, 8192, 2, 40, 8, 128, model_type="llama4_text", qk_norm="unit", nope_layers=(1,), attention_chunk=8192,
    temperature_scale=0.1,
)  # fmt: skip


def select(jobs: list[Job], kernel: str, rows: int = 0) -> list[Job]:
    """The launches of one kernel, of products those with tiles of at least so many rows."""
    return [job for job in jobs if job.kernel == kernel and job.constexprs.get("BN", 0) >= rows]


def everything() -> list[Job]:
    """On each generation Maverick's and a small model, whose weights are loaded in one burst; then the other rules."""
    return [
        *(job for arch in (90, 100, 103) for job in maverick_jobs(arch)),
        *launches(SMOLLM2, 90),
        *launches(SMOLLM2, 100, tree=True),
        *select(launches(LLAMA_8B, 90), "linear_kernel"),
        *select(launches(LLAMA_8B, 100, quantized=True, static=True), "linear_kernel"),
        *select(launches(QWEN3, 90), "rotate_kernel"),
        *select(launches(SCOUT, 90), "rotate_kernel"),
        *select(launches(SCOUT, 90), "attention_kernel"),
        *launches(SMOLLM2, 86),
        *select(launches(LLAMA_8B, 86), "linear_kernel"),
    ]


Compiled = list[tuple[Job, CompiledInfo]]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Everything, in one start of the compiler."""
    jobs = everything()
    return list(zip(jobs, compile_kernels(jobs), strict=True))


def describe(job: Job, found: CompiledInfo) -> str:
    """For messages."""
    usage = f"{found.registers} registers, {found.shared} bytes shared, {found.spills} spilled"
    return f"sm_{job.arch} {job.kernel} {dict(job.constexprs)} {dict(job.options)}: {usage}"


def test_every_kernel_of_a_forward_is_compiled(compiled: Compiled) -> None:
    """What the operations launch was noted, for both generations, in every form the products have."""
    for arch in (90, 100):
        names = {job.kernel for job, _ in compiled if job.arch == arch}
        assert names >= {"embed_kernel", "add_norm_kernel", "burst_kernel", "linear_kernel"}
        assert names >= {"attention_kernel", "add_splits_kernel", "exchange_norm_kernel"}
    assert any(job.kernel == "rotate_kernel" for job, _ in compiled)
    found = [job.constexprs for job, _ in compiled]
    assert {c["INPUT"] for c in found if "INPUT" in c} == {"plain", "scaled", "static", "dynamic"}
    assert {c["USE"] for c in found if "USE" in c} == {"store", "swiglu", "heads", "add", "ready"}
    assert all(c["TMA"] for c in found if "TMA" in c)
    assert {c["NORM"] for c in found if "NORM" in c} == {"none", "weighted", "unit"}
    assert {c["TREE"] for c in found if "TREE" in c} == {False, True}
    assert all(job.constexprs["PDL"] == (job.arch >= 90) for job, _ in compiled)


def test_kernels_fit(compiled: Compiled) -> None:
    """In the registers of their threads and the shared memory of a multiprocessor, with nothing spilled."""
    for job, found in compiled:
        message = describe(job, found)
        assert f".target sm_{job.arch}" in found.ptx, message
        assert found.spills == 0, message
        assert 0 < found.registers <= min(255, 65536 // (32 * job.options.get("num_warps", 4))), message
        assert found.shared <= SHARED[job.arch], message


def test_kernels_overlap_their_predecessor(compiled: Compiled) -> None:
    """None writes before its predecessor is done, none lets its successor start earlier; bursts ask for weights at once."""
    for job, found in compiled:
        message = describe(job, found)
        waits, triggers = (found.ptx.count(f"griddepcontrol.{what}") for what in ("wait", "launch_dependents"))
        if job.arch < 90:
            assert waits == triggers == 0, message
            continue
        assert waits == triggers > 0, message
        early = found.ptx[: found.ptx.index("griddepcontrol.wait")]
        for what in ("griddepcontrol.launch", "st.global", "atom.global", "red.global"):
            assert what not in early, message
        if job.kernel in LOOPS:
            assert "cp.async.bulk.tensor" in found.ptx, message
        elif job.kernel != "attention_kernel":
            assert "ld.global" in early, message


def test_products_use_the_matrix_unit_of_their_generation(compiled: Compiled) -> None:
    """Tiles of 64 rows fill its widest instruction; smaller ones take the one that all generations have."""
    new = [(job, found) for job, found in compiled if job.arch >= 90]
    wide = [(job, found) for job, found in new if job.kernel in LOOPS and job.constexprs["BN"] >= 64]
    assert {(job.arch, job.kernel) for job, _ in wide} == set(product((90, 100, 103), LOOPS)), "no tile of 64 rows"
    for job, found in wide:
        assert ("wgmma.mma_async" if job.arch == 90 else "tcgen05.mma") in found.ptx, describe(job, found)
    for job, found in compiled:
        if job.kernel in (*LOOPS, "burst_kernel", "attention_kernel"):
            assert any(name in found.ptx for name in ("wgmma.mma", "tcgen05.mma", "mma.sync")), describe(job, found)


@pytest.mark.parametrize("kind", ["norm", "qkv", "add", "burst", "expert_gate_up", "expert_down"])
def test_the_table_gives_tiles_that_fit(kind: str) -> None:
    """Turns divide a part of K, as descriptors need; a pair of gate and up is not torn; stages fit the shared memory."""
    for n, k, width in product((16, 576, 5120, 28672), (64, 576, 1536, 4096, 5120, 14336), (1, 2, 4)):
        t = tile(kind, n, k, width)
        assert t.BN % 16 == 0, (n, k, width, t)
        assert t.splits == 1 or k // t.splits % t.BK == 0, (n, k, width, t)
        assert t.splits == 1 or kind in ("add", "qkv"), (n, k, width, t)
        assert kind == "burst" or t.stages * (t.BN + TOKENS) * t.BK * width < SHARED[90], (n, k, width, t)
