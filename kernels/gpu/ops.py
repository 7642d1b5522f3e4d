"""The runtime's operations on Triton kernels: same names and meaning as `kernels.reference`.

Up to TOKENS_EXACT tokens a forward, results do not depend on their number. Longer forwards (prefill) are matrix-bound and go
to the vendor's products. The residual stream may be behind by the partial sums of the last product; whoever reads it
elsewhere calls `flush` first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.gpu.attention import ROWS, attention_kernel
from specdec.kernels.gpu.linear import TOKENS, linear_kernel, norm_linear_kernel
from specdec.kernels.gpu.norm import add_kernel, add_norm_kernel
from specdec.kernels.gpu.table import Tile, tile
from specdec.kernels.reference import AttentionRule, Fp8Weight, Weight
from specdec.types import ModelInputs

TOKENS_EXACT = 64
SPLIT, BLOCK = 128, 64  # positions an attention program sees, and takes at a time


class Ops:
    """One model's operations on one GPU: workspaces, and what the residual stream still lacks."""

    KEY_BLOCK = 1

    def __init__(self, device: torch.device) -> None:
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self.options: dict[str, Any] = {"launch_pdl": True} if hopper else {}
        self.pdl = hopper
        self.device = device
        self.pending: tuple[Tensor, Tensor] | None = None  # a stream, and what it lacks: f32 [P, M, K]
        self.arrived = torch.zeros(1 << 16, dtype=torch.int32, device=device)

    def pack(self, weight: Weight, swiglu: bool = False) -> Weight:
        """Weights [N, K]; gate and up rows alternate, so that a program holds pairs."""
        if not swiglu:
            return weight
        if isinstance(weight, Fp8Weight):
            scale = _alternate(weight.scale)
            return Fp8Weight(
                _alternate(weight.data.view(torch.uint8)).view(weight.data.dtype), scale, weight.input_scale
            )
        return _alternate(weight)

    # ---- the stream --------------------------------------------------------------------------------------------------

    def flush(self, x: Tensor) -> None:
        """Add what is pending to the stream x f32 [M, K]."""
        pending, parts = self._pending(x)
        if parts:
            size = x.numel()
            add_kernel[(triton.cdiv(size, 1024),)](x, pending, size, size, P=parts, BLOCK=1024, **self._launch())
        self.pending = None

    def _launch(self, t: Tile | None = None) -> dict[str, Any]:
        options = {**self.options, "PDL": self.pdl, "enable_fp_fusion": False}
        return options if t is None else {**options, "num_warps": t.warps, "num_stages": t.stages}

    def _pending(self, x: Tensor) -> tuple[Tensor, int]:
        """Partial sums that this stream still lacks and their number; those of a stream given up are forgotten."""
        if self.pending is None or self.pending[0] is not x:
            return x, 0
        return self.pending[1], self.pending[1].shape[0]

    # ---- products ----------------------------------------------------------------------------------------------------

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Weight) -> Tensor:
        """RMSNorm, then a product: f32 [M, K] -> f32 [M, N]."""
        if len(x) > TOKENS_EXACT:
            return self._long(x, norm, eps, weight)
        return self._norm_product(x, norm, eps, weight, swiglu=False)

    def norm_swiglu(self, x: Tensor, norm: Tensor, eps: float, weight: Weight) -> Tensor:
        """RMSNorm, gate and up products, silu(gate) * up: f32 [M, K] -> compute dtype [M, N/2]."""
        if len(x) > TOKENS_EXACT:
            gate, up = self._long(x, norm, eps, weight).unflatten(-1, (-1, 2)).unbind(-1)
            return (F.silu(gate) * up).to(reference.compute_dtype(weight))
        return self._norm_product(x, norm, eps, weight, swiglu=True)

    def add_linear(self, residual: Tensor, x: Tensor, weight: Weight) -> None:
        """residual f32 [M, N] += x [M, K] @ weight.T; some of it may stay pending."""
        if len(x) > TOKENS_EXACT:
            self.flush(residual)
            residual += _product(x, weight)
            return
        (n, k), (pending, count) = _shape(weight), self._pending(residual)
        t = tile("add", n, k, _data(weight).element_size())
        out = torch.empty((t.splits, len(x), n), device=x.device) if t.splits > 1 else residual
        self._linear(x, None, weight, residual, pending, out, count, t, swiglu=False, add=True)
        self.pending = (residual, out) if t.splits > 1 else None

    def _norm_product(self, x: Tensor, norm: Tensor, eps: float, weight: Weight, swiglu: bool) -> Tensor:
        (n, k), m = _shape(weight), len(x)
        kind, width = ("swiglu", n // 2) if swiglu else ("norm", n)
        dtype = reference.compute_dtype(weight) if swiglu else torch.float32
        out = torch.empty((m, width), dtype=dtype, device=x.device)
        t = tile(kind, n, k, _data(weight).element_size())
        if isinstance(weight, Fp8Weight):
            _, h, scale = self._normed(x, norm, eps, weight.input_scale)
            self._linear(h, scale, weight, x, x, out, 0, t, swiglu=swiglu, add=False)
            return out
        pending, count = self._pending(x)
        norm_linear_kernel[(triton.cdiv(n, t.BN), triton.cdiv(m, TOKENS))](
            x, pending, norm, weight, out, m, eps,
            N=n, K=k, P=count, SWIGLU=swiglu, BN=t.BN, BK=t.BK, BM=TOKENS, **self._launch(t),
        )  # fmt: skip
        return out

    def _normed(
        self, x: Tensor, norm: Tensor, eps: float, input_scale: Tensor | None, plain: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised stream as bf16 (if `plain`) and as e4m3 with its scales; nothing is pending afterwards."""
        (m, k), (pending, count) = x.shape, self._pending(x)
        h = torch.empty((m, k) if plain else (1,), dtype=torch.bfloat16, device=x.device)
        quantised = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.empty(m, device=x.device)
        mode = "dynamic" if input_scale is None else "static"
        add_norm_kernel[(m,)](
            x, pending, norm, h, quantised, scale, scale if input_scale is None else input_scale, m, eps,
            K=k, P=count, PLAIN=plain, QUANTISE=mode, BLOCK=triton.next_power_of_2(k), num_warps=8, **self._launch(),
        )  # fmt: skip
        self.pending = None
        return h, quantised, scale

    def _linear(
        self, x: Tensor, scale: Tensor | None, weight: Weight, stream: Tensor, pending: Tensor, out: Tensor,
        count: int, t: Tile, swiglu: bool, add: bool,
    ) -> None:  # fmt: skip
        (n, k), m = _shape(weight), len(x)
        data, weight_scale, input_scale, mode = _data(weight), x, x, "plain"
        if isinstance(weight, Fp8Weight):
            weight_scale = weight.scale
            input_scale = x if weight.input_scale is None else weight.input_scale
            mode = "scaled" if scale is not None else "dynamic" if weight.input_scale is None else "static"
        linear_kernel[(triton.cdiv(n, t.BN), t.splits, triton.cdiv(m, TOKENS))](
            x, x if scale is None else scale, input_scale, data, weight_scale, stream, pending, out, m,
            N=n, K=k, P=count, S=t.splits, INPUT=mode, SWIGLU=swiglu, ADD=add,
            BN=t.BN, BK=t.BK, BM=TOKENS, BQ=min(triton.next_power_of_2(k), 256), **self._launch(t),
        )  # fmt: skip

    def _long(self, x: Tensor, norm: Tensor, eps: float, weight: Weight) -> Tensor:
        self.flush(x)
        return _product(reference.rms_norm(x, norm, eps).to(reference.compute_dtype(weight)), weight)

    # ---- attention ---------------------------------------------------------------------------------------------------

    def attention(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        inputs: ModelInputs,
        cos: Tensor,
        sin: Tensor,
        rule: AttentionRule,
    ) -> Tensor:
        """Rotary embedding, KV append and attention: qkv f32 [M, (H+2G)*E] -> [M, H*E]; cache [B, G, S, E]."""
        batch, tokens = inputs.tokens.shape
        _, groups, slots, size = keys.shape
        heads = qkv.shape[-1] // size - 2 * groups
        tree = inputs.paths is not None
        per_program = 1 if tree else max(1, ROWS // triton.next_power_of_2(heads // groups))
        grid = triton.cdiv(slots, SPLIT), groups, batch * triton.cdiv(tokens, per_program)
        assert grid[1] * grid[2] <= len(self.arrived), "more groups of splits than counters"
        programs = grid[0] * grid[1] * grid[2]
        sums = torch.empty((programs, ROWS, size), device=qkv.device)
        weights = torch.empty((programs, 2, ROWS), device=qkv.device)
        dtype = keys.dtype if keys.dtype.itemsize > 1 else torch.bfloat16
        out = torch.empty((batch * tokens, heads * size), dtype=dtype, device=qkv.device)
        norm = "unit" if rule.unit_norm and rule.rope else "none" if rule.q_norm is None else "weighted"
        paths = inputs.paths.contiguous() if inputs.paths is not None else inputs.prefix_lens
        attention_kernel[grid](
            qkv, keys, values, inputs.positions.contiguous(), inputs.prefix_lens, paths, cos, sin,
            cos if rule.q_norm is None else rule.q_norm, cos if rule.k_norm is None else rule.k_norm,
            sums, weights, self.arrived, out,
            tokens, slots, inputs.offset, paths.shape[-1], batch * tokens * qkv.shape[-1], size**-0.5, rule.eps,
            rule.chunk, rule.temperature_scale, rule.temperature_floor,
            H=heads, G=groups, E=size, S=1 if qkv.dim() == 2 else qkv.shape[0], TILE=per_program,
            SPLIT=SPLIT, BLOCK=BLOCK, TREE=tree, ROPE=rule.rope, NORM=norm,
            CHUNK=rule.chunk > 0, TEMPERATURE=rule.temperature_scale > 0, num_stages=2, **self._launch(),
        )  # fmt: skip
        return out

    def Replay(self) -> Replay:  # noqa: N802
        """Launches are recorded by CUDA graphs, a whole step at a time."""
        return Replay()


class Replay:
    """Runs a stretch as it is."""

    def __call__(
        self, key: Hashable, stretch: Callable[[Tensor, ModelInputs], None], x: Tensor, inputs: ModelInputs
    ) -> Tensor:
        stretch(x, inputs)
        return x


def _alternate(rows: Tensor) -> Tensor:
    """[gate; up] -> gate 0, up 0, gate 1, ... along the first dimension."""
    return torch.stack(rows.chunk(2, 0), 1).flatten(0, 1).contiguous()


def _data(weight: Weight) -> Tensor:
    return weight.data if isinstance(weight, Fp8Weight) else weight


def _shape(weight: Weight) -> tuple[int, int]:
    n, k = _data(weight).shape
    return n, k


def _product(x: Tensor, weight: Weight) -> Tensor:
    """x [M, K] @ weight.T in f32 for many tokens."""
    if not isinstance(weight, Fp8Weight):
        return F.linear(x, weight).float()
    data, scale = reference.quantize(x, weight.input_scale)
    return torch._scaled_mm(data, weight.data.t(), scale[:, None], weight.scale[None], out_dtype=torch.bfloat16).float()
