"""The static KV cache of one model.

Shapes: B rows, G KV heads, S slots, E head size, D tree depth. Slot i of a row holds position i once committed; the nodes of
a draft tree lie behind the committed ones, in node order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.nn.config import ModelConfig


class KVCache:
    """Keys and values of all layers, each [layers, B, G, S, E]. Rolling back is not advancing the lengths."""

    def __init__(self, config: ModelConfig, batch_size: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, slots, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def slots(self) -> int:
        return self.keys.shape[3]

    def row(self, index: int) -> KVCache:
        """The same memory, one row of it."""
        view = object.__new__(KVCache)
        view.keys, view.values = self.keys[:, index : index + 1], self.values[:, index : index + 1]
        return view

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
        for store in (self.keys, self.values):
            store[:, rows, :, target] = store[:, rows, :, source]
