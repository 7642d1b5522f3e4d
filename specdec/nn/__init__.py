"""Layers, KV cache and the decoder stack of Llama, Qwen3 and Llama 4. Parameter names follow Hugging Face's."""

from specdec.nn.cache import KVCache
from specdec.nn.config import ModelConfig
from specdec.nn.model import DecoderModel
from specdec.nn.parallel import Shard

__all__ = ["DecoderModel", "KVCache", "ModelConfig", "Shard"]
