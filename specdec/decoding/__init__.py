"""The loop, its bookkeeping on the device, and the trace it leaves."""

from specdec.decoding.decoder import SpeculativeDecoder
from specdec.decoding.params import SamplingParams, check_pair, check_seed, check_whole
from specdec.decoding.self_test import self_test
from specdec.decoding.trace import Chunk, GenerationResult, RequestTrace, Trace

__all__ = [
    "Chunk",
    "GenerationResult",
    "RequestTrace",
    "SamplingParams",
    "SpeculativeDecoder",
    "Trace",
    "check_pair",
    "check_seed",
    "check_whole",
    "self_test",
]
