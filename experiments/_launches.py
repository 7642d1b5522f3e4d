"""What a model's forward launches on a GPU, noted on a machine without one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from _cross_compile import Job
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

from specdec.kernels.gpu import attention, exchange, heads, moe, norm, ops
from specdec.kernels.gpu.exchange import Mailbox
from specdec.kernels.gpu.parallel import ParallelOps
from specdec.kernels.gpu.table import SMALL_BLOCK
from specdec.nn import DecoderModel, KVCache, ModelConfig, Shard
from specdec.types import ModelInputs

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Noting:
    """Stands in for a kernel and notes how it is launched."""

    def __init__(self, kernel: Any, arch: int, jobs: list[Job]) -> None:
        self.function, self.arch, self.jobs = kernel.fn, arch, jobs

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, **options: Any) -> None:
        parameters = inspect.signature(self.function).parameters
        names = list(parameters)
        signature = {name: type_of(value) for name, value in zip(names, arguments, strict=False)}
        constants = {name: options.pop(name, parameters[name].default) for name in names[len(arguments) :]}
        job = Job(self.function.__module__, self.function.__name__, signature, constants, self.arch, options)
        if job not in self.jobs:
            self.jobs.append(job)


def type_of(value: Any) -> Any:
    """Triton's name for the type of an argument; of a tuple those of its elements."""
    if isinstance(value, tuple):
        return [type_of(element) for element in value]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
    return TYPES[value.dtype] if isinstance(value, Tensor) else "i32" if isinstance(value, int) else "fp32"


@contextmanager
def noted(arch: int) -> Iterator[list[Job]]:
    """Nothing is launched meanwhile."""
    jobs: list[Job] = []
    with ExitStack() as patches:
        for module in (ops, heads, attention, moe, norm, exchange):
            for name, kernel in vars(module).copy().items():
                if name.endswith("_kernel"):
                    patches.enter_context(patch.object(module, name, Noting(kernel, arch, jobs)))
        yield jobs


def launches(
    config: ModelConfig,
    arch: int,
    quantized: bool = False,
    static: bool = False,
    tree: bool = False,
    shard: Shard | None = None,
    together: bool = False,
) -> list[Job]:
    """Everything that one forward of two rows launches. static: FP8 inputs have a scale in the checkpoint.

    together: with the other ranks of the shard, through their memory; else it is measured by itself.
    """
    nowhere = torch.device("meta")
    operations = _with_others(config, shard, nowhere) if together and shard else ops.Ops(nowhere)
    if arch >= 90:
        operations.pdl, operations.options = True, {"launch_pdl": True}
    else:
        operations.block = SMALL_BLOCK
    with noted(arch) as jobs, nowhere:
        model = DecoderModel(config, torch.bfloat16, quantized, shard)
        for module in model.modules():
            if hasattr(module, "input_scale"):  # its value decides
                module.input_scale = nn.Parameter(torch.full((), float(static), device="cpu"), requires_grad=False)
        model.pack(operations)
        positions = torch.zeros(2, 5, dtype=torch.int32)
        paths = torch.zeros(2, 5, 4, dtype=torch.int32) if tree else None
        inputs = ModelInputs(positions.long(), positions, positions[:, 0], paths)
        x, _ = model(inputs, KVCache(config, 2, 1024, torch.bfloat16, nowhere, ranks=model.shard.world))
        model.logits(x)
        operations.flush(x)
    return jobs


def _with_others(config: ModelConfig, shard: Shard, nowhere: torch.device) -> ParallelOps:
    def allocate(letters: int) -> tuple[Tensor, Tensor]:
        return (torch.zeros(size, dtype=torch.int64, device=nowhere) for size in (letters, shard.world))  # type: ignore[return-value]

    mailbox = Mailbox.open(shard.rank, shard.world, ops.TOKENS_EXACT, config.hidden_size, True, allocate)
    return ParallelOps(nowhere, lambda parts: torch.stack([parts] * shard.world), mailbox)
