"""Registers, shared memory and instructions of every kernel of Maverick's forward, compiled for GPUs that need not be there.

python experiments/compiled_kernels.py     writes results/compiled_kernels.json and .md
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import triton
from _bench import session, table
from _cross_compile import Job, compile_kernels
from _launches import launches

from specdec.nn import ModelConfig, Shard
from specdec.target.presets import read_preset

RESULTS = Path(__file__).parent / "results"
ARCHITECTURES = {90: "Hopper (H200)", 100: "Blackwell (B200)", 103: "Blackwell Ultra (B300)"}
INSTRUCTIONS = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma.sync"}
SHOWN = ("N", "K", "BN", "BK", "S", "INPUT", "USE", "ROPE", "TREE", "CHUNK", "QUANTISE")


def maverick_jobs(arch: int) -> list[Job]:
    """What rank 0 of 8 launches in a forward, chain and tree, by scales of inputs that are given and that are found, by itself
    and with the others.

    Four layers hold every kind of layer that 48 do.
    """
    config = ModelConfig.from_huggingface({**read_preset("maverick"), "num_hidden_layers": 4})
    jobs: list[Job] = []
    for static, tree in product((True, False), (False, True)):
        options = {"quantized": True, "static": static, "tree": tree, "shard": Shard(0, 8)}
        found = launches(config, arch, **options) + launches(config, arch, **options, together=True)
        jobs += [job for job in found if job not in jobs]
    return jobs


def measured(arch: int) -> list[dict[str, Any]]:
    """A row for each launch configuration."""
    jobs = maverick_jobs(arch)
    return [
        {
            "arch": arch,
            "kernel": job.kernel.removesuffix("_kernel"),
            "constants": {name: job.constexprs[name] for name in SHOWN if name in job.constexprs},
            "warps": job.options.get("num_warps", 4),
            "registers": found.registers,
            "shared": found.shared,
            "spills": found.spills,
            "matrix": [name for words, name in INSTRUCTIONS.items() if words in found.ptx],
            "dependent_launch": "griddepcontrol.wait" in found.ptx,
            "descriptors": "cp.async.bulk.tensor" in found.ptx,
        }
        for job, found in zip(jobs, compile_kernels(jobs), strict=True)
    ]


def render(result: dict[str, Any]) -> str:
    """The tables."""
    versions = result["session"]["versions"]
    text = [
        "# Maverick's kernels as compiled\n",
        "One rank of 8, FP8 weights: every launch configuration of a forward, from the table that the runtime uses. Compiled "
        "for Blackwell, run on Hopper.\n",
        f"`{result['session']['command']}`, torch {versions['torch']}, triton {result['triton']}\n",
    ]
    for arch, name in ARCHITECTURES.items():
        rows = [row for row in result["rows"] if row["arch"] == arch]
        text.append(f"## sm_{arch}, {name}\n")
        headers = [
            "kernel",
            "constants",
            "warps",
            "registers",
            "shared, bytes",
            "spilled, bytes",
            "matrix unit",
            "descriptors",
        ]
        cells = [
            [
                row["kernel"], ", ".join(f"{k}={v}" for k, v in row["constants"].items()), row["warps"], row["registers"],
                row["shared"], row["spills"], " ".join(row["matrix"]) or "–", "yes" if row["descriptors"] else "–",
            ]
            for row in rows
        ]  # fmt: skip
        text.append(table(headers, cells))
    return "\n".join(text)


def main(arguments: Sequence[str] = ()) -> None:
    """Compile and write."""
    rows = [row for arch in ARCHITECTURES for row in measured(arch)]
    result = {
        "session": session("experiments/compiled_kernels.py", arguments),
        "triton": triton.__version__,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compiled_kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "compiled_kernels.md").write_text(render(result))


if __name__ == "__main__":
    main()
