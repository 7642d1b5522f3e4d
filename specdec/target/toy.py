"""A tiny seeded target for tests and examples: the real runtime on random weights, with a byte tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.reference import FP8, quantize
from specdec.nn import DecoderModel, ModelConfig
from specdec.target.backends import DTYPES
from specdec.target.llama import Llama

FAMILIES = ("llama", "qwen3", "llama4")


class Toy(Llama):
    """Random decoder of a few thousand parameters. Its text means nothing; its loop is the real one.

    family: "llama", "qwen3" or "llama4" (like Maverick: experts in every second layer, no RoPE in every fourth), whose torch
    backend "auto" takes where the compiled one computes Llama alone. num_layers: 2, of Llama 4 4.
    """

    def __init__(
        self,
        seed: int = 0,
        vocab_size: int = 260,
        hidden_size: int = 64,
        num_layers: int | None = None,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        dtype: str = "float32",
        device: str = "auto",
        backend: str = "auto",
        prefill_chunk: int = 32,
        sharpness: float = 3.0,
        family: str = "llama",
    ) -> None:
        if family not in FAMILIES:
            raise ValueError(f"target.family={family} is unknown; choose one of {', '.join(FAMILIES)}")
        config = ModelConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_layers=num_layers or (4 if family == "llama4" else 2),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=32,
            max_positions=4096,
            eos_token_ids=(ByteTokenizer.eos_token_id,),
        )
        if family == "qwen3":
            config = replace(config, model_type="qwen3", qk_norm="weighted")
        elif family == "llama4":
            config = as_llama4(config)
        tensors = random_tensors(config, seed, sharpness, DTYPES.get(dtype, torch.float32))
        self._build(config, tensors, dtype, device, backend, prefill_chunk, None)
        self.tokenizer = ByteTokenizer() if vocab_size >= ByteTokenizer.vocab_size else None


def as_llama4(config: ModelConfig) -> ModelConfig:
    """The same sizes in Maverick's pattern, with borders so near that a short text crosses them."""
    return replace(
        config,
        model_type="llama4_text",
        interleaved_rope=True,
        nope_layers=tuple(range(3, config.num_layers, 4)),
        attention_chunk=16,
        temperature_scale=0.1,
        temperature_floor=8,
        num_experts=4,
        moe_layers=tuple(range(1, config.num_layers, 2)),
        dense_intermediate_size=2 * config.intermediate_size,
    )


def random_tensors(
    config: ModelConfig,
    seed: int,
    sharpness: float = 1.0,
    dtype: torch.dtype = torch.float32,
    quantized: bool = False,
) -> list[tuple[str, Tensor]]:
    """Seeded weights for every parameter of a config, by checkpoint name; `sharpness` scales the logits' spread.

    quantized: the same weights, in FP8 with a scale a row where the model wants that.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = DecoderModel(config, dtype, quantized)
    tensors = []
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            continue
        if parameter.dim() == 1:
            value = torch.ones(parameter.shape)
        else:
            spread = sharpness if name == "lm_head.weight" else 1.0
            value = torch.randn(parameter.shape, generator=generator) * spread * parameter.shape[-1] ** -0.5
        if parameter.dtype == FP8:
            value, scale = quantize(value)
            tensors += [(f"{name}_scale", scale), (name.removesuffix("weight") + "input_scale", torch.zeros(()))]
        tensors.append((name, value))
    return tensors


class ByteTokenizer:
    """One token a byte, and four markers. Has what the framework asks of a transformers tokenizer."""

    bos_token_id, eos_token_id, user_id, assistant_id = 256, 257, 258, 259
    vocab_size = 260
    chat_template = "<bos>{user|assistant}text..."
    _MARKERS = ("<bos>", "<eos>", "<user>", "<assistant>")

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """UTF-8 bytes, markers recognised."""
        ids: list[int] = []
        while text:
            marker = next((m for m in self._MARKERS if text.startswith(m)), None)
            piece = marker or text[0]
            ids += [256 + self._MARKERS.index(marker)] if marker else list(piece.encode())
            text = text[len(piece) :]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of the ids; broken UTF-8 becomes U+FFFD."""
        result, raw = "", b""
        for i in ids:
            if i < 256:
                raw += bytes([i])
            elif not skip_special_tokens:
                result, raw = result + raw.decode(errors="replace") + self._MARKERS[i - 256], b""
        return result + raw.decode(errors="replace")

    def apply_chat_template(self, chat: Sequence[dict[str, Any]], tokenize: bool = False, **options: Any) -> str:
        """<bos>, then each message behind its role's marker; the assistant's marker last."""
        return "<bos>" + "".join(f"<{m['role']}>{m['content']}" for m in chat) + "<assistant>"

    def get_vocab(self) -> dict[str, int]:
        """Every token's name."""
        return {f"<0x{i:02X}>": i for i in range(256)} | {m: 256 + i for i, m in enumerate(self._MARKERS)}
