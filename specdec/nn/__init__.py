"""Layers, KV cache and the decoder stack of the Llama family. Parameter names are Hugging Face's, so loading is by name."""

from specdec.nn.cache import KVCache
from specdec.nn.config import ModelConfig
from specdec.nn.model import DecoderModel

__all__ = ["DecoderModel", "KVCache", "ModelConfig"]
