"""Tensor parallelism by heads, feed-forward channels and vocabulary (1909.08053): who holds which part.

Query, key, value, gate, up and head weights are split by rows, o and down by columns, so that a layer sums over ranks twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdec.nn.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank of a tensor-parallel group."""

    rank: int = 0
    world: int = 1

    def check(self, config: ModelConfig) -> None:
        """ValueError for a rank outside the group, or a size that the ranks cannot share evenly."""
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is not one of {self.world} ranks: count them from 0")
        sizes = {
            "query heads": config.num_heads,
            "KV heads": config.num_kv_heads,
            "feed-forward channels": config.intermediate_size,
            "dense feed-forward channels": config.mlp_size,
            "vocabulary entries": config.vocab_size,
        }
        for name, size in sizes.items():
            if size % self.world:
                raise ValueError(f"{self.world} ranks cannot share {size} {name} evenly: choose a divisor of {size}")

    def part(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's slice of a whole tensor, a view."""
        size = tensor.shape[dim] // self.world
        return tensor.narrow(dim, self.rank * size, size)
