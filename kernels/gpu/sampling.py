"""Choosing a token by Gumbel-max in one pass over the logits; the noise is made where it is used and never stored.

The uniform noise is `specdec.sampling.uniform` to the bit; the logarithms are the device's, last bits may differ from torch's.

Shapes: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.gpu.steps import combine, pack

_BLOCK = 2048  # logits of one program: hashing, not memory, sets the time


@triton.jit
def _mix(x):
    """Bijective mixer on uint32 ("lowbias32", Wellons 2018)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def hash_bits(seed, position, index, STREAM: tl.constexpr):
    """32 random bits for every index, uint32. seed int64, position and index int32."""
    key = _mix(seed.to(tl.uint32) ^ _mix((seed >> 32).to(tl.uint32) + (STREAM + 1)))
    key = _mix(key ^ _mix(position.to(tl.uint32) * 4 + STREAM))
    return _mix(_mix(index.to(tl.uint32) + key) ^ key)


@triton.jit
def uniform(bits):
    """(bits + 1/2) / 2^32 rounded to f32, below 1. The odd integer and its scale by a power of two are exact."""
    return tl.minimum((bits.to(tl.int64) * 2 + 1).to(tl.float32) * (1 / (1 << 33)), 1 - 1 / (1 << 24))


@triton.jit
def gumbel(u):
    """-log(-log(1 - u)), finest where u is small and the noise large.

    log(w) * u / (1 - w) with w = 1 - u rounded cancels the rounding of w (Kahan; Goldberg 1991, theorem 4).
    """
    w = 1 - u
    exponential = tl.where(w == 1, u, -tl.log(w) * tl.div_rn(u, tl.where(w == 1, 1.0, 1 - w)))
    return -tl.log(exponential)


@triton.jit
def choose_kernel(
    logits, temperature, seed, position, row_stride, node_stride, keys, vocab, nodes_per_row,
    STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * N, parts). Key of the best of BLOCK tokens, without noise at temperature 0. keys int64 [B * N, parts]."""
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, node = item // nodes_per_row, item % nodes_per_row
    index = part * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(logits + item * vocab + index, mask=index < vocab, other=float("-inf"))
    heat = tl.load(temperature + row)
    if heat > 0:
        place = tl.load(position + row * row_stride + node * node_stride)
        noise = gumbel(uniform(hash_bits(tl.load(seed + row), place, index, STREAM)))
        score = tl.div_rn(score, heat) + noise
    tl.store(keys + item * tl.num_programs(1) + part, tl.max(pack(score, index), 0))


def choose(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """A token per prediction: argmax(logits / temperature + Gumbel noise), plain argmax where the temperature is 0.

    logits f32 [B, N, V], contiguous; temperature f32 and seed int64 [B], position int32 [B, N]. -> int64 [B, N].
    """
    batch, nodes, vocab = logits.shape
    block = min(triton.next_power_of_2(vocab), _BLOCK)
    out = torch.empty(batch, nodes, dtype=torch.int64, device=logits.device)
    keys = out.new_empty(batch * nodes, triton.cdiv(vocab, block))
    choose_kernel[tuple(keys.shape)](
        logits, temperature.contiguous(), seed.contiguous(), position, *position.stride(), keys, vocab, nodes,
        STREAM=stream, BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return combine(keys, out)
