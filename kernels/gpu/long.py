"""Forwards too long to be exact: the vendor's products and attention, and what lies between them in as few passes as it takes.

M tokens, K channels; B rows, T tokens of a row, H query heads, G KV heads, E head size, C cache slots. Bits depend on M.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from specdec.kernels.reference import Fp8Weight, Weight, quantize
from specdec.types import ModelInputs

BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # cuDNN's plans anew for every length


def product(weight: Weight, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [M, K] @ weight.T in f32. With FP8 weights x is rounded to e4m3 first, unless it is so already by scale f32 [M]."""
    if isinstance(weight, Fp8Weight):
        rounded, scale = quantize(x, weight.input_scale) if scale is None else (x, scale)
        matrix, row_scale = weight.data.t(), weight.scale[None]
        return torch._scaled_mm(rounded, matrix, scale[:, None], row_scale, out_dtype=torch.bfloat16).float()
    if x.dtype == torch.float32 or x.device.type == "cpu":
        return F.linear(x, weight).float()
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


@triton.jit
def swiglu_kernel(y, out, size, BLOCK: tl.constexpr):
    """silu(gate) * up of pairs f32 [size, 2] that lie side by side: out [size]."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    both = pair[:, None] * 2 + tl.arange(0, 2)[None, :]
    gate, up = tl.split(tl.load(y + both, (pair < size)[:, None], other=0.0))
    tl.store(out + pair, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), pair < size)


def swiglu(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Products f32 [M, 2I] of rows in which gate and up alternate -> [M, I]."""
    out = torch.empty(len(y), y.shape[1] // 2, dtype=dtype, device=y.device)
    swiglu_kernel[(triton.cdiv(out.numel(), 1024),)](y, out, out.numel(), BLOCK=1024)
    return out


def is_plain(q: Tensor, inputs: ModelInputs, chunk: int) -> bool:
    """Whether `attention` takes this: half precision, no tree, and nothing to be seen but this forward's own tokens."""
    begin, tokens = inputs.begin, inputs.tokens.shape[1]
    plain = q.dtype != torch.float32 and inputs.paths is None and inputs.offset == 0
    return plain and begin is not None and (begin % chunk == 0 and tokens <= chunk if chunk else begin == 0)


def attention(q: Tensor, keys: Tensor, values: Tensor, inputs: ModelInputs) -> Tensor:
    """Rotated, scaled queries [M, H*E] over the cache [B, G, C, E], which holds this forward's keys already -> [M, H*E]."""
    (batch, tokens), begin = inputs.tokens.shape, inputs.begin
    assert begin is not None
    heads = q.view(batch, tokens, -1, keys.shape[3]).transpose(1, 2)
    k, v = (x[:, :, begin : begin + tokens].to(q.dtype) for x in (keys, values))
    with sdpa_kernel(BACKENDS):
        out = F.scaled_dot_product_attention(heads, k, v, is_causal=True, scale=1.0, enable_gqa=True)
    return out.transpose(1, 2).reshape(q.shape)
