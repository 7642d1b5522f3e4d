"""The forward's kernels compiled as Hopper and Blackwell would get them, for the shapes of two models. No GPU needed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import triton
from cross_compile import CompiledInfo, Job, compile_kernels

from specdec.kernels.gpu.attention import ROWS
from specdec.kernels.gpu.linear import TOKENS
from specdec.kernels.gpu.ops import BLOCK, SPLIT
from specdec.kernels.gpu.table import Tile, tile

LINEAR, NORM, ATTENTION = (f"specdec.kernels.gpu.{name}" for name in ("linear", "norm", "attention"))
FLOATS = "x pending norm x_scale input_scale weight_scale stream scales qkv cos sin q_norm k_norm sums weights".split()
KINDS = {
    **dict.fromkeys(FLOATS, "*fp32"),
    **dict.fromkeys(("positions", "prefix_lens", "paths", "arrived"), "*i32"),
    **dict.fromkeys(("M", "T", "C", "offset", "width", "stride", "chunk", "temperature_floor"), "i32"),
    **dict.fromkeys(("eps", "scale", "temperature"), "fp32"),
    "plain": "*bf16", "quantised": "*fp8e4nv", "keys": "*bf16", "values": "*bf16",
}  # fmt: skip

SHARED = 227 * 1024  # bytes a program can have


@dataclass(frozen=True)
class Sizes:
    """What of a model decides its products: hidden, query and KV heads, their size, intermediate, vocabulary."""

    hidden: int
    heads: int
    groups: int
    head_dim: int
    inner: int
    vocab: int


SMOLLM2 = Sizes(576, 9, 3, 64, 1536, 49152)
LLAMA_8B = Sizes(4096, 32, 8, 128, 14336, 128256)


def make(
    module: str, kernel: str, arguments: str, constants: dict[str, Any], t: Tile | int, arch: int, **types: str
) -> Job:
    """t: the tile of a product, or the number of warps."""
    options = {"num_warps": t.warps, "num_stages": t.stages} if isinstance(t, Tile) else {"num_warps": t}
    signature = {name: types.get(name, KINDS.get(name, "")) for name in arguments.split()}
    return Job(module, kernel, signature, {**constants, "PDL": True}, arch, options, ["C", "stride"])


def norm_linear(n: int, k: int, swiglu: bool, pending: int, arch: int) -> Job:
    """bf16 weights behind a norm."""
    t = tile("swiglu" if swiglu else "norm", n, k, 2)
    constants = {"N": n, "K": k, "P": pending, "SWIGLU": swiglu, "BN": t.BN, "BK": t.BK, "BM": TOKENS}
    out = "*bf16" if swiglu else "*fp32"
    arguments = "x pending norm weight out M eps"
    return make(LINEAR, "norm_linear_kernel", arguments, constants, t, arch, weight="*bf16", out=out)


def linear(kind: str, n: int, k: int, how: str, pending: int, arch: int) -> Job:
    """kind: "add", "norm" or "swiglu". how: INPUT of the kernel; all but "plain" with FP8 weights."""
    weight = "*bf16" if how == "plain" else "*fp8e4nv"
    t = tile(kind, n, k, 2 if how == "plain" else 1)
    constants = {
        "N": n, "K": k, "P": pending, "S": t.splits, "INPUT": how, "SWIGLU": kind == "swiglu", "ADD": kind == "add",
        "BN": t.BN, "BK": t.BK, "BM": TOKENS, "BQ": min(triton.next_power_of_2(k), 256),
    }  # fmt: skip
    x, out = "*fp8e4nv" if how == "scaled" else "*bf16", "*bf16" if kind == "swiglu" else "*fp32"
    arguments = "x x_scale input_scale weight weight_scale stream pending out M"
    return make(LINEAR, "linear_kernel", arguments, constants, t, arch, x=x, weight=weight, out=out)


def attention(sizes: Sizes, tree: bool, arch: int, **rule: Any) -> Job:
    """rule: the kernel's constants that differ from plain RoPE."""
    share = triton.next_power_of_2(sizes.heads // sizes.groups)
    constants = {
        "H": sizes.heads, "G": sizes.groups, "E": sizes.head_dim, "S": 1, "TILE": 1 if tree else ROWS // share,
        "SPLIT": SPLIT, "BLOCK": BLOCK, "TREE": tree, "ROPE": True, "NORM": "none", "CHUNK": False,
        "TEMPERATURE": False, **rule,
    }  # fmt: skip
    arguments = (
        "qkv keys values positions prefix_lens paths cos sin q_norm k_norm sums weights arrived out "
        "T C offset width stride scale eps chunk temperature temperature_floor"
    )
    job = make(ATTENTION, "attention_kernel", arguments, constants, 4, arch, out="*bf16")
    job.options = {**job.options, "num_stages": 2}
    return job


def add_norm(k: int, plain: bool, quantise: str, pending: int, arch: int) -> Job:
    """The norm before FP8 products and experts."""
    block = triton.next_power_of_2(k)
    constants = {"K": k, "P": pending, "PLAIN": plain, "QUANTISE": quantise, "BLOCK": block}
    arguments = "x pending norm plain quantised scales input_scale M eps"
    return make(NORM, "add_norm_kernel", arguments, constants, 8, arch)


def jobs(arch: int) -> list[Job]:
    """The products of a layer and the head, in bf16 and FP8; attention of chains and trees; the norm before FP8."""
    small, large = SMOLLM2, LLAMA_8B
    return [
        norm_linear((small.heads + 2 * small.groups) * small.head_dim, small.hidden, False, 2, arch),
        norm_linear((large.heads + 2 * large.groups) * large.head_dim, large.hidden, False, 0, arch),
        norm_linear(2 * large.inner, large.hidden, True, 0, arch),
        norm_linear(small.vocab, small.hidden, False, 0, arch),
        norm_linear(large.vocab, large.hidden, False, 4, arch),
        linear("add", small.hidden, small.inner, "plain", 2, arch),
        linear("add", large.hidden, large.inner, "plain", 0, arch),
        linear("norm", (large.heads + 2 * large.groups) * large.head_dim, large.hidden, "scaled", 0, arch),
        linear("swiglu", 2 * large.inner, large.hidden, "scaled", 0, arch),
        linear("add", small.hidden, small.inner, "dynamic", 2, arch),
        linear("add", large.hidden, large.heads * large.head_dim, "static", 0, arch),
        add_norm(large.hidden, True, "dynamic", 2, arch),
        attention(small, False, arch),
        attention(large, True, arch),
    ]


ALL = [
    *jobs(90),
    *jobs(100),
    attention(LLAMA_8B, False, 90, NORM="unit", CHUNK=True),
    attention(SMOLLM2, True, 90, ROPE=False, NORM="weighted", TEMPERATURE=True),
    norm_linear(SMOLLM2.vocab, SMOLLM2.hidden, False, 0, 103),
    attention(SMOLLM2, True, 103),
]


@pytest.fixture(scope="module")
def compiled() -> list[tuple[Job, CompiledInfo]]:
    """Everything, in one start of the compiler."""
    return list(zip(ALL, compile_kernels(ALL), strict=True))


def describe(job: Job, found: CompiledInfo) -> str:
    """For messages."""
    usage = f"{found.registers} registers, {found.shared} bytes shared, {found.spills} spilled"
    return f"sm_{job.arch} {job.kernel} {dict(job.constexprs)} {dict(job.options)}: {usage}"


Compiled = list[tuple[Job, CompiledInfo]]


def test_kernels_fit(compiled: Compiled) -> None:
    """In the registers of their threads and the shared memory of a multiprocessor, with nothing spilled."""
    for job, found in compiled:
        message = describe(job, found)
        assert f".target sm_{job.arch}" in found.ptx, message
        assert found.spills == 0, message
        assert 0 < found.registers <= min(255, 65536 // (32 * job.options["num_warps"])), message
        assert found.shared <= SHARED, message


def test_kernels_overlap_their_predecessor(compiled: Compiled) -> None:
    """Each lets its successor start, then waits, and loads nothing that others write in between; weights it may ask for."""
    for job, found in compiled:
        trigger, wait = (found.ptx.find(f"griddepcontrol.{what}") for what in ("launch_dependents", "wait"))
        assert 0 < trigger < wait, describe(job, found)
        early = found.ptx[trigger:wait]
        assert "st.global" not in early, describe(job, found)
        assert ("ld.global" in early) == (job.kernel == "add_norm_kernel"), describe(job, found)  # the norm's weight
        assert ("cp.async.bulk.prefetch.L2" in early) == ("linear" in job.kernel), describe(job, found)


def test_wide_tiles_use_the_matrix_unit_of_their_generation(compiled: Compiled) -> None:
    wide = [(job, found) for job, found in compiled if job.constexprs.get("BN", 0) >= 64]
    assert {job.arch for job, _ in wide} == {90, 100, 103}, "no tile of 64 rows to look at"
    for job, found in wide:
        assert ("wgmma.mma_async" if job.arch == 90 else "tcgen05.mma") in found.ptx, describe(job, found)
    for job, found in compiled:
        if job.kernel != "add_norm_kernel":
            assert any(name in found.ptx for name in ("wgmma.mma", "tcgen05.mma", "mma.sync")), describe(job, found)


def test_tables_splits_are_whole() -> None:
    """Every part of K is as long as the others and its rows begin at 16 bytes, as bulk requests to the L2 must."""
    for kind in ("norm", "swiglu", "add", "plain"):
        for n, k, width in product((16, 576, 5120, 28672), (64, 576, 1536, 4096, 5120, 14336), (1, 2, 4)):
            t = tile(kind, n, k, width)
            assert k % t.splits == 0, (kind, n, k, t)
            assert k // t.splits * width % 16 == 0, (kind, n, k, t)
            assert t.splits == 1 or kind in ("add", "plain"), (kind, n, k, t)
            assert t.BN % 16 == 0, (kind, n, k, t)
