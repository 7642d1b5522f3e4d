"""The static KV cache of one model.

Shapes: B rows, G KV heads (of this rank), S slots, E head size, D tree depth. Slot i of a row holds position i once committed;
the nodes of a draft tree lie behind the committed ones, in node order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.nn.config import ModelConfig


class KVCache:
    """Keys and values of all layers. Rolling back is not advancing the lengths.

    values [layers, B, G, S, E]. keys alike, or in blocks of `key_block` slots [layers, B, G, S/block, E, block] for kernels
    that want them so.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        key_block: int = 1,
        ranks: int = 1,
    ) -> None:
        assert slots % key_block == 0
        outer, size = (config.num_layers, batch_size, config.num_kv_heads // ranks), config.head_dim
        self.key_block = key_block
        inner = (slots, size) if key_block == 1 else (slots // key_block, size, key_block)
        self.keys = torch.zeros((*outer, *inner), dtype=dtype, device=device)
        self.values = torch.zeros((*outer, slots, size), dtype=dtype, device=device)

    @property
    def slots(self) -> int:
        return self.values.shape[3]

    def row(self, index: int) -> KVCache:
        """The same memory, one row of it."""
        view = object.__new__(KVCache)
        view.key_block = self.key_block
        view.keys, view.values = self.keys[:, index : index + 1], self.values[:, index : index + 1]
        return view

    def like(self, batch_size: int, slots: int) -> KVCache:
        """An empty one of other rows and slots."""
        assert self.key_block == 1
        other = object.__new__(KVCache)
        other.key_block = 1
        layers, _, groups, _, size = self.values.shape
        other.keys, other.values = (
            x.new_zeros(layers, batch_size, groups, slots, size) for x in (self.keys, self.values)
        )
        return other

    def put(self, rows: list[int], other: KVCache) -> None:
        """Copy the rows of another cache into these rows, as many slots as it has."""
        index = torch.tensor(rows, device=self.values.device)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            _bits(mine)[:, index, :, : other.slots] = _bits(theirs)

    def keep_path(self, lengths: Tensor, path: Tensor, num_accepted: Tensor) -> None:
        """Move the nodes of an accepted path behind the prefix, in order. lengths [B], path int32 [B, D+1].

        Targets of nodes that were not accepted get what they hold already, so nothing depends on their number.
        """
        batch, steps = path.shape
        step = torch.arange(steps, device=path.device)
        node = torch.where(step <= num_accepted[:, None], path, step.to(path.dtype))
        start = lengths[:, None]
        source, target = (start + node).long(), (start + step).long()
        rows = torch.arange(batch, device=path.device)[:, None]
        keys, values = _bits(self.keys), _bits(self.values)
        values[:, rows, :, target] = values[:, rows, :, source]
        if self.key_block == 1:
            keys[:, rows, :, target] = keys[:, rows, :, source]
            return
        block = self.key_block
        moved = keys[:, rows, :, source // block, :, source % block]
        keys[:, rows, :, target // block, :, target % block] = moved


def _bits(x: Tensor) -> Tensor:
    """The same memory in a dtype that indexing knows, which e4m3 is not."""
    return x.view(torch.uint8) if x.element_size() == 1 else x
