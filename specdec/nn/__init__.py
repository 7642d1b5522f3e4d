"""Layers, KV cache, the decoder stack of Llama, Qwen3 and Llama 4, and draft heads. Parameter names are the checkpoints'."""

from specdec.nn.cache import KVCache
from specdec.nn.config import ModelConfig
from specdec.nn.eagle import EagleConfig, EagleModel
from specdec.nn.model import DecoderModel
from specdec.nn.parallel import Shard

__all__ = ["DecoderModel", "EagleConfig", "EagleModel", "KVCache", "ModelConfig", "Shard"]
