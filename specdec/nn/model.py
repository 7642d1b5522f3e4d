"""The decoder stack: embedding, layers, final norm, head.

Layer id i names the residual stream after layer i, 0-based; "hidden" is the stream after the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels import reference
from specdec.nn.cache import KVCache
from specdec.nn.config import ModelConfig
from specdec.nn.layers import DecoderLayer, Norm, Projection, weight
from specdec.nn.rope import rope_tables
from specdec.types import ModelInputs


class _Embedding(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight(config.vocab_size, config.hidden_size, dtype=dtype)


class _Stack(nn.Module):
    """What checkpoints keep under `model.`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = _Embedding(config, dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, dtype) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden_size)


class DecoderModel(nn.Module):
    """A Llama-family decoder over a static cache. Load the parameters, then `pack` once, then call."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.model = _Stack(config, dtype)
        self.cos = self.sin = torch.empty(0)
        if not config.tie_word_embeddings:
            self.lm_head = Projection(config.vocab_size, config.hidden_size, dtype)

    def pack(self, ops: Any) -> None:
        """Give the weights to a backend (`kernels.reference`, `kernels.cpu.ops`)."""
        self.ops = ops
        self.replay = ops.Replay()
        self.embedding = self.model.embed_tokens.weight.data
        head = self.embedding if self.config.tie_word_embeddings else self.lm_head.weight.data
        self.head = ops.pack(head)
        self.layers: list[DecoderLayer] = list(self.model.layers)  # type: ignore[arg-type]
        for layer in self.layers:
            layer.pack(ops)
        self.norm = self.model.norm.weight.data
        self.set_positions(256)
        if not self.config.tie_word_embeddings:
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
        x = self.embedding[inputs.tokens.reshape(-1)].float()
        count = len(self.layers) if layers is None else layers
        tapped: dict[int | str, Tensor] = {}
        start = 0
        for stop in [*(i + 1 for i in sorted(t for t in taps if isinstance(t, int))), count]:
            if stop > start:
                x = self._run(start, stop, x, inputs, cache)
            if stop - 1 in taps:
                tapped[stop - 1] = x.to(self.dtype, copy=True)  # the stream goes on in place
            start = stop
        if "hidden" in taps:
            tapped["hidden"] = reference.rms_norm(x, self.norm, self.config.rms_norm_eps).to(self.dtype)
        features = torch.cat([tapped[tap] for tap in taps], -1) if taps else None
        return x, features

    def _run(self, start: int, stop: int, x: Tensor, inputs: ModelInputs, cache: KVCache) -> Tensor:
        """Layers start to stop - 1, as one stretch that a backend may record."""

        def stretch(x: Tensor, inputs: ModelInputs) -> None:
            for i in range(start, stop):
                self.layers[i](x, inputs, cache.keys[i], cache.values[i], self.cos, self.sin)

        key = (start, stop, cache.keys.data_ptr(), cache.keys.shape, self.cos.shape[0])
        result: Tensor = self.replay(key, stretch, x, inputs)
        return result

    def logits(self, x: Tensor) -> Tensor:
        """Residual stream f32 [M, hidden] -> logits f32 [M, V]."""
        result: Tensor = self.ops.norm_linear(x, self.norm, self.config.rms_norm_eps, self.head)
        return result
