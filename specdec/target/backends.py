"""Device, kernels and cache dtype of a target, by the names that its config gives them."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from specdec.kernels import reference
from specdec.nn import ModelConfig
from specdec.target.ranks import Ranks, wait_seconds

if TYPE_CHECKING:
    from specdec.kernels.gpu.exchange import Mailbox

__all__ = ["DTYPES", "choose_backend", "choose_device", "choose_kv_dtype", "open_mailbox", "operations"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(device: str) -> torch.device:
    """auto (the GPU where there is one), cpu, cuda, or cuda:N; ValueError for others, and for a GPU that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"target.device={device} is unknown; choose auto, cpu, cuda or cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"target.device={device}, but torch {torch.__version__} finds no GPU: use target.device=cpu")
    chosen = torch.device(device)
    if (chosen.index or 0) >= max(1, torch.cuda.device_count()):
        raise ValueError(
            f"target.device={device}, but torch finds {torch.cuda.device_count()} GPUs, the first being cuda:0"
        )
    return chosen


def choose_backend(
    backend: str, device: torch.device, config: ModelConfig, special: bool = False, shared: bool = False
) -> str:
    """ "auto" is native where model and device allow it, torch elsewhere; asking for native must be possible.

    special: FP8, or one rank's part. shared: several processes add up what they compute.
    """
    if backend not in ("auto", "native", "torch"):
        raise ValueError(f"target.backend={backend} is unknown; choose auto, native or torch")
    alone = shared and device.type == "cpu"
    misfit = "computes in one process on the CPU" if alone else _misfit(device, config, special)
    if backend == "native" and misfit:
        raise ValueError(f"target.backend=native {misfit}: use target.backend=torch")
    return "torch" if backend == "torch" or misfit else "native"


def choose_kv_dtype(kv_dtype: str, dtype: torch.dtype, backend: str, device: torch.device) -> torch.dtype:
    """The cache's: the model's own, or e4m3 without scales, which the GPU's kernels alone read."""
    if kv_dtype not in ("auto", "fp8"):
        raise ValueError(f"target.kv_dtype={kv_dtype} is unknown; choose auto or fp8")
    if kv_dtype == "auto":
        return dtype
    if backend != "native" or device.type != "cuda":
        raise ValueError(
            f"target.kv_dtype=fp8 needs the kernels of a GPU, and this target has backend {backend} on {device.type}: use auto"
        )
    return reference.FP8


def _misfit(device: torch.device, config: ModelConfig, special: bool) -> str:
    """What the kernels need and do not find, or nothing."""
    share = config.num_heads // config.num_kv_heads
    if device.type == "cpu":
        sizes = config.head_dim, config.hidden_size, config.intermediate_size
        if sizes[0] % 32 or sizes[1] % 16 or sizes[2] % 16:
            return f"needs head_dim a multiple of 32, hidden and intermediate sizes of 16 on the CPU; got {sizes}"
        if not config.plain:
            return f"computes plain Llama layers on the CPU, not {config.model_type}"
        if special:
            return "computes whole models on the CPU, and not in FP8"
        return ""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs a GPU of compute capability 8.0 or later; got {torch.cuda.get_device_capability(device)}"
    if config.head_dim not in (32, 64, 128, 256) or share > 16:
        return (
            f"needs head_dim 32, 64, 128 or 256 and at most 16 query heads a KV head; got {config.head_dim} and {share}"
        )
    return ""


def open_mailbox(
    exchange: str, backend: str, device: torch.device, ranks: Ranks | None, config: ModelConfig, dtype: torch.dtype
) -> Mailbox | None:
    """What ranks on GPUs add up through: "direct", "auto" where their GPUs reach one another, or "nccl", which is None."""
    if exchange not in ("auto", "direct", "nccl"):
        raise ValueError(f"target.exchange={exchange} is unknown; choose auto, direct or nccl")
    kernels = ranks is not None and backend == "native" and device.type == "cuda"
    if ranks is not None and kernels and exchange != "nccl" and ranks.reach(device):
        from specdec.kernels.gpu.exchange import Mailbox
        from specdec.kernels.gpu.ops import TOKENS_EXACT

        memory, sizes = partial(ranks.memory, device=device), (TOKENS_EXACT, config.hidden_size)
        mailbox = Mailbox.open(ranks.rank, ranks.world, *sizes, dtype == torch.bfloat16, memory)
        mailbox.patience = int(min(wait_seconds() * 1e6, 2**31 - 1))  # a look takes about a microsecond
        return mailbox
    if exchange == "direct":
        why = "GPUs of one machine that can write each other's memory" if kernels else "several ranks on GPUs"
        raise ValueError(f"target.exchange=direct needs {why}: use auto")
    return None


def operations(backend: str, device: torch.device, ranks: Ranks | None = None, mailbox: Mailbox | None = None) -> Any:
    """What computes behind a backend's name; compiled kernels are imported only when asked for."""
    if backend == "torch":
        return reference if ranks is None else reference.Parallel(ranks.sum)
    if device.type == "cuda":
        from specdec.kernels.gpu.ops import Ops
        from specdec.kernels.gpu.parallel import ParallelOps

        return Ops(device) if ranks is None else ParallelOps(device, ranks.gather, mailbox)
    from specdec.kernels.cpu import ops

    return ops
