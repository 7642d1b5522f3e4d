"""Short prompts on a GPU as CUDA graphs: the host takes longer to launch a forward's kernels than the device to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.nn import KVCache
from specdec.types import ModelInputs

__all__ = ["WIDTHS", "PromptGraphs"]

WIDTHS = 32, 64, 128, 256  # tokens of a forward, up to what is exact: there padding leaves the bits of a prompt alone

Read = tuple[Tensor, Tensor | None]  # the stream f32 [T, H] and what was tapped [T, F*H]


@dataclass(slots=True)
class _Graph:
    tokens: Tensor  # int64 [1, width], what the next replay reads
    replay: Callable[[], Read]


class PromptGraphs:
    """Reads one prompt in one forward, padded to the next of WIDTHS, by a graph for each width and set of tapped layers.

    cache: one row of 256 slots, whose keys and values are the last prompt's.
    """

    __slots__ = (
        "_graphs",
        "_pool",
        "_tables",
        "cache",
        "model",
    )  # so that a step's graph takes none of it for its own state

    def __init__(self, model: Any, cache: KVCache) -> None:
        """cache: the target's, to make one alike."""
        self.model, self.cache = model, cache.like(1, WIDTHS[-1])
        self._tables = model.cos, model.sin  # what the graphs read, though the model may have longer ones by now
        self._graphs: dict[tuple[int, tuple[int | str, ...]], _Graph] = {}
        self._pool: Any = None

    def read(self, tokens: Tensor, features: Sequence[int | str]) -> Read:
        """Stream f32 [T, H] and features [T, F*H] of tokens int64 [1, T], T <= 256; they hold until the next prompt."""
        length = tokens.shape[1]
        width = next(width for width in WIDTHS if length <= width)
        key = width, tuple(features)
        if key not in self._graphs:
            self._graphs[key] = self._record(width, tuple(features))
        graph = self._graphs[key]
        graph.tokens[:, :length] = tokens
        x, tapped = graph.replay()
        return x[:length], None if tapped is None else tapped[:length]

    def _record(self, width: int, features: tuple[int | str, ...]) -> _Graph:
        """A forward of so many tokens as a graph; on the CPU the forward itself."""
        device = self.cache.values.device
        tokens = torch.zeros(1, width, dtype=torch.int64, device=device)
        positions = torch.arange(width, dtype=torch.int32, device=device)[None]
        prefix = torch.zeros(1, dtype=torch.int32, device=device)

        def forward() -> Read:
            x, tapped = self.model(ModelInputs(tokens, positions, prefix), self.cache, features)
            self.model.ops.flush(x)
            return x, tapped

        if device.type != "cuda":
            return _Graph(tokens, forward)
        forward()  # compiles what compiles
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = forward()

        def replay() -> Read:
            graph.replay()
            return result

        return _Graph(tokens, replay)
