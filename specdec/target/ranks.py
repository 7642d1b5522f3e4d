"""Processes that share one model: found by torchrun's environment, summing what each computed, and led by rank 0.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Tensors on the CPU travel by gloo, on GPUs by NCCL.
"""

from __future__ import annotations

import atexit
import os
import time
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # its defaults keep the group they meet when imported, and so its threads, for good
from torch import Tensor

__all__ = ["TIMEOUT", "RankError", "Ranks", "join", "joined", "leave", "share", "wait_seconds"]

T = TypeVar("T")
TIMEOUT = "SPECDEC_TIMEOUT"  # environment variable: seconds that a rank waits for the others
_WAIT = 600.0
_GRACE = 1.0  # seconds in which ranks that failed at the same time find out about each other


class RankError(RuntimeError):
    """A rank lost the others; the message says which are missing and what to do."""


class Ranks:
    """This process among those that share a model."""

    def __init__(self, rank: int, world: int, store: Any) -> None:
        self.rank, self.world = rank, world
        self._store = store

    def gather(self, x: Tensor) -> Tensor:
        """The tensors that all ranks hand in, of one shape, in the order of ranks: [...] -> [world, ...]."""
        parts = x.new_empty(self.world, *x.shape)
        try:
            dist.all_gather(list(parts.unbind(0)), x.contiguous())
        except RuntimeError as error:
            raise self._lost(error) from error
        return parts

    def sum(self, partial: Tensor) -> Tensor:
        """Added one by one in the order of ranks, so that every rank has the same bits. f32 [...] -> f32 [...]."""
        first, *others = self.gather(partial).unbind(0)
        for part in others:
            first += part
        return first

    def share(self, value: T) -> T:
        """Rank 0's value, a plain object, on every rank."""
        box = [value]
        try:
            dist.broadcast_object_list(box, src=0)
        except RuntimeError as error:
            raise self._lost(error) from error
        return box[0]

    def place(self, device: torch.device) -> torch.device:
        """The device of this rank: of several GPUs its own. ValueError where there are too few."""
        if device.type != "cuda":
            return device
        local, count = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"rank {self.rank} needs a GPU of its own, and there are {count}: start {count} processes")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def reach(self, device: torch.device) -> bool:
        """Whether all ranks are on one machine, and every GPU can write the others' memory. Every rank must ask."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == self.world
        others = (other for other in range(self.world) if other != device.index)
        mine = here and all(torch.cuda.can_device_access_peer(device, other) for other in others)
        return bool(self.gather(torch.tensor(mine, device=device)).all())

    def memory(self, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Zeros, int64 [size], on this rank's GPU, that all ranks can write, and where every rank's lie, int64 [world]."""
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here is sent to all at once
        from torch.distributed import _symmetric_memory as symmetric

        mine: Tensor = symmetric.empty(size, dtype=torch.int64, device=device).zero_()
        where = symmetric.rendezvous(mine, dist.distributed_c10d._get_default_group()).buffer_ptrs
        everyone = torch.tensor(where, dtype=torch.int64, device=device)
        self.gather(mine[:1])  # zeros everywhere before anyone writes
        torch.cuda.synchronize(device)
        return mine, everyone

    def speaks(self) -> bool:
        """Whether this rank is the one that tells the user what failed: rank 0, or the first of those that fail alone."""
        if self.rank:
            time.sleep(_GRACE)
        try:
            return bool(self._store.add("specdec/said", 1) == 1)
        except dist.DistError:  # who kept the store is gone, and cannot speak
            return True

    def _lost(self, error: RuntimeError) -> RankError:
        """Ask who else is alive, and say who is not."""
        try:
            self._store.set(f"specdec/alive/{self.rank}", "")
            time.sleep(_GRACE)
            silent = [r for r in range(self.world) if not self._store.check([f"specdec/alive/{r}"])]
        except dist.DistError:
            silent = [0]  # keeps the store, where torchrun does not
        who = f"rank {', '.join(map(str, silent))}" if silent else "every rank"
        return RankError(
            f"{who} of {self.world} no longer answers (or is slower than {wait_seconds():g} s, which {TIMEOUT} sets): see "
            f"what it said, put that right and start all again ({str(error).partition('. ')[0]})"
        )


_ranks: Ranks | None = None


def join() -> Ranks | None:
    """Join the processes that the environment names, once; None where this one is alone.

    RankError when they do not come together within the timeout.
    """
    global _ranks
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if _ranks is not None or world == 1:
        return _ranks
    rank, wait = int(os.environ.get("RANK", "0")), timedelta(seconds=wait_seconds())
    try:
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=wait)
    except (ValueError, RuntimeError) as error:
        raise RankError(
            f"rank {rank} of {world} found no way to the others: start them with `torchrun --nproc-per-node {world} "
            f"-m specdec ...` ({str(error).splitlines()[0]})"
        ) from error
    _ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store())
    atexit.register(leave)  # a group whose threads meet the end of the process aborts it
    return _ranks


def joined() -> Ranks | None:
    """What `join` found, without joining."""
    return _ranks


def share(value: T) -> T:
    """Rank 0's value on every rank; alone, the value."""
    return value if _ranks is None else _ranks.share(value)


def leave() -> None:
    """Part from the others, and end the threads that spoke to them; nothing may be under way."""
    global _ranks
    if _ranks is not None:
        dist.destroy_process_group()
        _ranks = None


def wait_seconds() -> float:
    """How long a rank waits for the others: the timeout that is set."""
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text) if text else _WAIT
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{TIMEOUT}={text} is no number of seconds above 0: set one, or unset it for {_WAIT:g}")
    return seconds
