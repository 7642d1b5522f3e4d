"""The decoder stack: embedding, layers, final norm, head.

Layer id i names the residual stream after layer i, 0-based; "hidden" is the stream after the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels import reference
from specdec.nn.cache import KVCache
from specdec.nn.config import ModelConfig
from specdec.nn.layers import DecoderLayer, Linears, Norm, weight
from specdec.nn.parallel import Shard
from specdec.nn.rope import rope_tables
from specdec.types import ModelInputs


class _Embedding(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight(config.vocab_size, config.hidden_size, dtype=dtype)


class _Stack(nn.Module):
    """What checkpoints keep under `model.`."""

    def __init__(self, config: ModelConfig, linears: Linears) -> None:
        super().__init__()
        self.embed_tokens = _Embedding(config, linears.dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, i, linears) for i in range(config.num_layers))
        self.norm = Norm(config.hidden_size)


class DecoderModel(nn.Module):
    """A decoder over a static cache. Load the parameters, then `pack` once, then call.

    quantized: the layers' linears are FP8, all but the router. Of several ranks each holds its shard and the whole embedding,
    and computes the logits of its rows of the vocabulary.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, quantized: bool = False, shard: Shard | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.shard = shard or Shard()
        self.shard.check(config)
        self.model = _Stack(config, Linears(dtype, quantized, self.shard))
        self.cos = self.sin = torch.empty(0)
        if not config.tie_word_embeddings:
            self.lm_head = Linears(dtype, shard=self.shard).rows(config.vocab_size, config.hidden_size)

    def pack(self, ops: Any) -> None:
        """Give the weights to a backend (`kernels.reference` or its `Parallel`, `kernels.cpu.ops`)."""
        self.ops = ops
        self.replay = ops.Replay()
        self.embedding = self.model.embed_tokens.weight.data
        tied = self.config.tie_word_embeddings
        self.head = ops.pack(self.shard.part(self.embedding, 0) if tied else self.lm_head.weight.data)
        self.layers: list[DecoderLayer] = list(self.model.layers)  # type: ignore[arg-type]
        for layer in self.layers:
            layer.pack(ops)
        self.norm = self.model.norm.weight.data
        for layer, following in pairwise(self.layers):
            layer.next_norm = following.norms[0]  # the final norm reads the stream: prefill picks rows of it
        self.set_positions(256)
        if not tied:
            del self.lm_head

    def set_positions(self, positions: int) -> None:
        """Make the rotary tables cover that many positions."""
        if self.cos.shape[0] < positions:
            self.cos, self.sin = rope_tables(self.config, positions, self.embedding.device)

    def forward(
        self, inputs: ModelInputs, cache: KVCache, taps: Sequence[int | str] = (), layers: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the tokens [B, T] over the cache: residual stream f32 [M, hidden] and tapped features [M, taps * hidden].

        `layers`: only the first so many (an early exit).
        """
        x = self.ops.embed(inputs.tokens.reshape(-1), self.embedding, self.layers[0].norms[0])
        count = len(self.layers) if layers is None else layers
        tapped: dict[int | str, Tensor] = {}
        start = 0
        for stop in [*(i + 1 for i in sorted(t for t in taps if isinstance(t, int))), count]:
            if stop > start:
                x = self._run(start, stop, x, inputs, cache)
            if stop - 1 in taps:
                self.ops.flush(x)
                tapped[stop - 1] = x.to(self.dtype, copy=True)  # the stream goes on in place
            start = stop
        if "hidden" in taps:
            self.ops.flush(x)
            tapped["hidden"] = reference.rms_norm(x, self.norm, self.config.rms_norm_eps).to(self.dtype)
        features = torch.cat([tapped[tap] for tap in taps], -1) if taps else None
        return x, features

    def _run(self, start: int, stop: int, x: Tensor, inputs: ModelInputs, cache: KVCache) -> Tensor:
        """Layers start to stop - 1, as one stretch that a backend may record."""

        def stretch(x: Tensor, inputs: ModelInputs) -> Tensor:
            for i in range(start, stop):
                self.layers[i](x, inputs, cache.keys[i], cache.values[i], self.cos, self.sin)
            return x

        key = (start, stop, cache.keys.data_ptr(), cache.keys.shape, self.cos.shape[0])
        result: Tensor = self.replay(key, stretch, x, inputs)
        return result

    def logits(self, x: Tensor) -> Tensor:
        """Residual stream f32 [M, hidden] -> logits f32 [M, V / ranks]."""
        result: Tensor = self.ops.norm_linear(x, self.norm, self.config.rms_norm_eps, self.head)
        return result
