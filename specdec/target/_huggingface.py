"""Inside a transformers model: a cache with slots of its own for every row, and hooks that tap layers.

Shapes: B rows, b rows of this forward, T their tokens, D tree depth, G KV heads, S slots, W slots in use, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["SlotCache", "Taps"]


@dataclass(slots=True)
class _Aim:
    """Where a forward writes its K/V and how much of the cache it sees; one object shared by all layers."""

    rows: slice
    index: Tensor  # int64 [B, T]  slot of every token, in its row
    slots: int


class SlotLayer(DynamicLayer):  # type: ignore[misc]
    """K/V of one layer, [B, G, S, E]: slot i of a row holds position i, drafts lie behind the prefix."""

    def __init__(self, batch_size: int, slots: int, aim: _Aim) -> None:
        super().__init__()
        self.room = batch_size, slots
        self.aim = aim

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Zeros, once a first forward shows the shapes (K and V may differ)."""
        batch, slots = self.room
        shapes = ((batch, states.shape[1], slots, states.shape[3]) for states in (key_states, value_states))
        self.keys, self.values = (key_states.new_zeros(shape) for shape in shapes)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write K/V [b, G, T, E] of this forward's rows; returns what these rows hold by then, [b, G, W, E]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        index = self.aim.index[:, None, :, None]
        held = self.keys[self.aim.rows], self.values[self.aim.rows]
        for store, states in zip(held, (key_states, value_states), strict=True):
            store.scatter_(2, index.expand_as(states), states)
        return held[0][:, :, : self.aim.slots], held[1][:, :, : self.aim.slots]


class SlotCache(Cache):  # type: ignore[misc]
    """A cache of transformers in which every row has slots of its own; rolling back is not advancing the lengths."""

    def __init__(self, num_layers: int, batch_size: int, slots: int) -> None:
        self._aim = _Aim(slice(None), torch.empty(0), 0)
        super().__init__(layers=[SlotLayer(batch_size, slots, self._aim) for _ in range(num_layers)])

    def aim(self, rows: slice, index: Tensor, slots: int) -> None:
        """Set what the next forward writes and sees."""
        self._aim.rows, self._aim.index, self._aim.slots = rows, index, slots

    def keep_path(self, lengths: Tensor, path: Tensor, num_accepted: Tensor) -> None:
        """Move an accepted path's nodes behind the prefix, in order. lengths [B], path int32 [B, D+1].

        Slots of steps that were not accepted get what they hold already.
        """
        batch, steps = path.shape
        step = torch.arange(steps, dtype=path.dtype, device=path.device)
        node = torch.where(step <= num_accepted[:, None], path, step)
        source, target = ((lengths[:, None] + slot).long() for slot in (node, step))
        rows = torch.arange(batch, device=path.device)[:, None]
        for layer in self.layers:
            for store in (layer.keys, layer.values):
                store[rows, :, target] = store[rows, :, source]


class Taps:
    """Reads layers through forward hooks, so that id i is what block i returns and "hidden" what the stack returns.

    transformers' own `hidden_states` count differently: entry i + 1 is layer i's, and the last one has been normed.
    """

    def __init__(self, model: Any, num_layers: int) -> None:
        self._stack: nn.Module = model.base_model
        lists = (module for module in self._stack.modules() if isinstance(module, nn.ModuleList))
        self._blocks = next((blocks for blocks in lists if len(blocks) == num_layers), None)
        self._handles: list[Any] = []
        self._order: tuple[int | str, ...] = ()
        self._kept: dict[int | str, Tensor] = {}

    def choose(self, features: Sequence[int | str]) -> None:
        """Tap these layers from now on; ValueError for one that is not there."""
        layers = range(0 if self._blocks is None else len(self._blocks))
        for handle in self._handles:
            handle.remove()
        self._order, self._handles = tuple(features), []
        for tap in self._order:
            if tap != "hidden" and tap not in layers:
                raise ValueError(
                    f'features tap layer {tap!r}; the target has layers 0 to {len(layers) - 1} and "hidden"'
                )
            module = self._stack if tap == "hidden" or self._blocks is None else self._blocks[int(tap)]
            self._handles.append(module.register_forward_hook(self._keeper(tap)))

    def _keeper(self, tap: int | str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._kept[tap] = output if isinstance(output, Tensor) else output[0]

        return keep

    def collect(self) -> Tensor | None:
        """The tapped layers of the last forward, [b, T, taps * hidden], in the order they were asked for."""
        return torch.cat([self._kept.pop(tap) for tap in self._order], -1) if self._order else None
