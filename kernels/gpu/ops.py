"""The runtime's operations on Triton kernels: same names and meaning as `kernels.reference`.

Up to TOKENS_EXACT tokens a forward, results do not depend on their number; longer ones (prefill) go to the vendor's products.
The residual stream may lack the partial sums of the last product; whoever reads it elsewhere calls `flush` first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.gpu import long
from specdec.kernels.gpu.attention import attention
from specdec.kernels.gpu.heads import compute_dtype as heads_dtype
from specdec.kernels.gpu.heads import places, rotate
from specdec.kernels.gpu.linear import TOKENS, burst_kernel, linear_kernel
from specdec.kernels.gpu.moe import moe, pack_experts
from specdec.kernels.gpu.norm import Ready, add_kernel, add_norm_kernel, embed
from specdec.kernels.gpu.table import BLOCK, SMALL_BLOCK, Tile, tile
from specdec.kernels.gpu.weights import (
    data,
    descriptor,
    interleave,
    pair_heads,
    row_scale,
    shape,
    static_scale,
)
from specdec.kernels.reference import FP8, AttentionRule, Experts, Fp8Weight, Weight
from specdec.types import ModelInputs

TOKENS_EXACT = 256
TOKENS_ROUTED = 64  # of one mixture: every token has its own programs
NO_HEADS = (0, 1, 2, False)  # query heads, KV heads, head size, rotary embedding
BURST = 2048  # inputs up to which a program loads its weights in one go


class Ops:
    """One model's operations on one GPU: workspaces, and what the residual stream still lacks."""

    KEY_BLOCK = 1
    Replay = reference.Replay  # CUDA graphs record launches, a whole step at a time

    def __init__(self, device: torch.device) -> None:
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self.options: dict[str, Any] = {"launch_pdl": True} if hopper else {}
        self.pdl = hopper
        self.block = BLOCK if hopper or device.type != "cuda" else SMALL_BLOCK
        self.device = device
        self.pending: tuple[Tensor, Tensor] | None = None  # a stream, and what it lacks: f32 [P, M, K]
        self.ready: Ready | None = None
        self.largest: tuple[Tensor, ...] = ()  # activations, and their largest magnitudes by token f32 [M, parts]

    def pack(self, weight: Weight, swiglu: bool = False) -> Weight:
        """Weights [N, K]; gate and up rows alternate, so that a program holds pairs."""
        return interleave(weight) if swiglu else weight

    def pack_heads(self, weight: Weight, size: int) -> Weight:
        """Weights of heads of `size` channels: the two rows that the rotary embedding turns stand together."""
        return pair_heads(weight, size)

    def pack_experts(self, experts: Experts) -> Experts:
        """A mixture whose weights are packed."""
        return pack_experts(experts)

    def embed(self, tokens: Tensor, table: Tensor, norm: Tensor) -> Tensor:
        """Rows of the table [V, K] as the stream f32 [M, K]; tokens int64 [M]. norm: what the stream meets first."""
        self.ready = embed(tokens, table, norm, self.launch())
        return self.ready.stream

    # ---- the stream --------------------------------------------------------------------------------------------------

    def flush(self, x: Tensor) -> None:
        """Add what is pending to the stream x f32 [M, K]."""
        (pending, parts), size = self.pending_parts(x), x.numel()
        if parts:
            add_kernel[(triton.cdiv(size, 1024),)](x, pending, size, size, P=parts, BLOCK=1024, **self.launch())
        self.pending = None

    def tile(self, kind: str, weight: Weight) -> Tile:
        """How a product of this kind is cut, on this GPU's generation."""
        return tile(kind, *data(weight).shape[-2:], data(weight).element_size(), self.block)

    def launch(self, t: Tile | None = None) -> dict[str, Any]:
        """What every kernel of the chain is launched with."""
        options = {**self.options, "PDL": self.pdl, "enable_fp_fusion": False}
        return options if t is None else {**options, "num_warps": t.warps, "num_stages": t.stages}

    def pending_parts(self, x: Tensor) -> tuple[Tensor, int]:
        """Partial sums that this stream still lacks and their number; those of a stream given up are forgotten."""
        if self.pending is None or self.pending[0] is not x:
            return x, 0
        return self.pending[1], self.pending[1].shape[0]

    def norm_parts(self, x: Tensor) -> int:
        """In how many parts `add_norm` leaves the squares of a token of x."""
        return 1

    # ---- products ----------------------------------------------------------------------------------------------------

    def norm_linear(self, x: Tensor, norm: Tensor | None, eps: float, weight: Weight) -> Tensor:
        """RMSNorm, then a product: f32 [M, K] -> f32 [M, N]. x and norm as the reference's `normed` takes them."""
        if x.shape[-2] > TOKENS_EXACT:
            return long.product(weight, *self._inputs(x, norm, eps, weight))
        out = torch.empty((x.shape[-2], shape(weight)[0]), device=x.device)
        self._norm_product(x, norm, eps, weight, "store", (out,))
        return out

    def norm_swiglu(self, x: Tensor, norm: Tensor, eps: float, weight: Weight, into: Weight | None = None) -> Tensor:
        """RMSNorm, gate and up products, silu(gate) * up: f32 [M, K] -> [M, N/2], in e4m3 for an `into` of static scale."""
        dtype = reference.compute_dtype(weight)
        if len(x) > TOKENS_EXACT:
            return long.swiglu(long.product(weight, *self._inputs(x, norm, eps, weight)), dtype)
        scale, (n, _), m = static_scale(into), shape(weight), len(x)
        out = torch.empty((m, n // 2), dtype=dtype if scale is None else FP8, device=x.device)
        largest = out
        if isinstance(weight, Fp8Weight) and scale is None:
            largest = torch.empty((m, triton.cdiv(n, self.tile("norm", weight).BN)), device=x.device)
            self.largest = out, largest
        self._norm_product(x, norm, eps, weight, "swiglu", (out, largest, largest if scale is None else scale))
        return out

    def norm_attention(
        self, x: Tensor, norm: Tensor | None, eps: float, weight: Weight, keys: Tensor, values: Tensor, inputs: ModelInputs,
        cos: Tensor, sin: Tensor, rule: AttentionRule, into: Weight | None = None,
    ) -> Tensor:  # fmt: skip
        """RMSNorm, the QKV product, rotary embedding, KV append, attention: f32 [M, K] -> [M, H*E]; cache [B, G, S, E].

        The result is in e4m3 for a product `into` that has a static input scale.
        """
        (n, k), m, groups, size = shape(weight), x.shape[-2], keys.shape[1], keys.shape[3]
        heads = n // size - 2 * groups
        queries = torch.empty((m, heads * size), dtype=heads_dtype(keys), device=x.device)
        where = places(queries, keys, values, inputs, cos, sin, rule)
        burst = isinstance(weight, Tensor) and k <= BURST
        if m > TOKENS_EXACT or (burst and (rule.q_norm is not None or (rule.unit_norm and rule.rope))):
            rotate(self, self.norm_linear(x, norm, eps, weight), where, rule, heads, groups)
        elif burst:
            self._norm_product(x, norm, eps, weight, "heads", where, (heads, groups, size, rule.rope))
        else:
            parts = torch.empty((self.tile("qkv", weight).splits, m, n), device=x.device)
            self._norm_product(x, norm, eps, weight, "store", (parts,), kind="qkv")
            rotate(self, parts, where, rule, heads, groups)
        exact, rounded = m <= TOKENS_EXACT, isinstance(weight, Fp8Weight)
        if not exact and long.is_plain(queries, inputs, rule.chunk):
            return long.attention(queries, keys, values, inputs)
        scale = static_scale(into) if exact else None
        largest = torch.empty((m, heads), device=x.device) if rounded and exact and scale is None else None
        out = attention(self, queries, keys, values, inputs, rule.chunk, largest, scale)
        if largest is not None:
            self.largest = out, largest
        return out

    def add_linear(self, residual: Tensor, x: Tensor, weight: Weight, norm: Tensor | None = None) -> None:
        """residual f32 [M, N] += x [M, K] @ weight.T; some of it may stay pending. norm: what the stream meets next."""
        self.ready = None
        if len(x) > TOKENS_EXACT:
            self.flush(residual)
            self.leave(residual, long.product(weight, x)[None])
            return
        (n, k), m = shape(weight), len(x)
        if isinstance(weight, Tensor) and k <= BURST:
            self.flush(residual)
            if norm is None:
                self._burst(x, None, weight, 0.0, "add", (residual,))
                return
            value = torch.empty((m, n), dtype=weight.dtype, device=x.device)
            squares = torch.empty((m, triton.cdiv(n, self.tile("burst", weight).BN)), device=x.device)
            self._burst(x, None, weight, 0.0, "ready", (residual, value, norm, squares))
            self.ready = Ready(residual, norm, value, squares)
            return
        pending, count = self.pending_parts(residual)
        t = self.tile("add", weight)
        out = torch.empty((t.splits, m, n), device=x.device) if t.splits > 1 else residual
        self._linear(x, None, weight, t, "add", (residual, pending, out), count=count)
        self.pending = None
        if t.splits > 1:
            self.leave(residual, out)

    def leave(self, x: Tensor, parts: Tensor) -> None:
        """Partial sums f32 [P, M, K] of the stream x, for whoever reads it next."""
        self.pending = x, parts

    def _norm_product(
        self, x: Tensor, norm: Tensor | None, eps: float, weight: Weight, use: str, extra: tuple[Any, ...],
        heads: tuple[int, int, int, bool] = NO_HEADS, kind: str = "norm",
    ) -> None:  # fmt: skip
        k, dtype = shape(weight)[1], reference.compute_dtype(weight)
        burst = weight if isinstance(weight, Tensor) and k <= BURST else None
        if burst is not None and norm is not None and norm.dim() == 1:
            ready = self.ready
            if ready is None or ready.stream is not x or ready.norm is not norm:
                ready = self.ready = self._prepared(x, norm, eps, dtype)
            self._burst(ready.value, ready.squares, burst, eps, use, extra, heads)
            return
        h, scale = self._inputs(x, norm, eps, weight)
        if burst is not None:
            self._burst(h, scale, burst, eps, use, extra, heads)
        else:
            self._linear(h, scale, weight, self.tile(kind, weight), use, extra)

    def _inputs(self, x: Tensor, norm: Tensor | None, eps: float, weight: Weight) -> tuple[Tensor, Tensor | None]:
        """The normalised stream as a product takes it; for FP8 weights in e4m3, with its scales."""
        if norm is None:
            return x.to(reference.compute_dtype(weight)), None
        if isinstance(weight, Fp8Weight):
            assert norm.dim() == 1, "a token has one scale"
            _, h, scale = self._normed(x, norm, eps, weight.input_scale)
            return h, scale
        h = self._normed(x, norm, eps, None, plain=reference.compute_dtype(weight), quantise=False)[0]
        return h.view(-1, shape(weight)[1]), None

    def _prepared(self, x: Tensor, norm: Tensor, eps: float, dtype: torch.dtype) -> Ready:
        ready = Ready(x, norm, torch.empty_like(x, dtype=dtype), x.new_empty((len(x), self.norm_parts(x))))
        self.add_norm(x, norm, eps, ready.value, ready.squares, x, x, x, "raw", "no")
        return ready

    def _normed(
        self, x: Tensor, norm: Tensor, eps: float, input_scale: Tensor | None,
        plain: torch.dtype | None = None, quantise: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The normalised stream in a `plain` dtype and, to `quantise`, as e4m3 with its scales; nothing stays pending."""
        h = torch.empty(x.shape if plain is not None else (1,), dtype=plain or torch.bfloat16, device=x.device)
        quantised = torch.empty(x.shape if quantise else (1,), dtype=FP8, device=x.device)
        scale = torch.empty(len(x), device=x.device)
        rounded = "no" if not quantise else "dynamic" if input_scale is None else "static"
        static, mode = scale if input_scale is None else input_scale, "no" if plain is None else "normed"
        self.add_norm(x, norm, eps, h, x, quantised, scale, static, mode, rounded)
        return h, quantised, scale

    def add_norm(
        self, x: Tensor, norm: Tensor, eps: float, plain: Tensor, squares: Tensor, quantised: Tensor, scale: Tensor,
        input_scale: Tensor, mode: str, quantise: str,
    ) -> None:  # fmt: skip
        """The stream whole again, and normalised and rounded into what is given: see `add_norm_kernel`."""
        (m, k), (pending, count) = x.shape[-2:], self.pending_parts(x)
        parts = x.numel() // (m * k)
        add_norm_kernel[(m * parts,)](
            x, pending, norm, plain, squares, quantised, scale, input_scale, m, eps,
            K=k, P=count, PLAIN=mode, QUANTISE=quantise, BLOCK=triton.next_power_of_2(k), PARTS=parts,
            num_warps=8 if k > 1024 else 4, **self.launch(),
        )  # fmt: skip
        self.pending = None

    def _burst(
        self, x: Tensor, squares: Tensor | None, weight: Tensor, eps: float, use: str, extra: tuple[Any, ...],
        heads: tuple[int, int, int, bool] = NO_HEADS,
    ) -> None:  # fmt: skip
        (n, k), m = weight.shape, len(x)
        t = self.tile("burst", weight)
        assert use != "heads" or heads[2] % t.BN == 0, "a program's rows are of one head"
        first = max(1 << (k.bit_length() - 1), 16 * t.warps)
        rest = 0 if k <= first else max(triton.next_power_of_2(k - first), 16 * t.warps)
        burst_kernel[(triton.cdiv(n, t.BN), triton.cdiv(m, TOKENS))](
            x, x if squares is None else squares, weight, extra, m, eps,
            N=n, K=k, PARTS=0 if squares is None else squares.shape[1], USE=use,
            H=heads[0], G=heads[1], E=heads[2], ROPE=heads[3],
            BN=t.BN, K0=first, K1=rest, WAYS=t.warps, BM=TOKENS, **self.launch(t),
        )  # fmt: skip

    def _linear(
        self, x: Tensor, scale: Tensor | None, weight: Weight, t: Tile, use: str, extra: tuple[Any, ...], count: int = 0
    ) -> None:
        """x [M, K]: of FP8 weights e4m3 with its scales f32 [M], or with the static one, or yet to be rounded."""
        (n, k), m = shape(weight), len(x)
        mode, parts = "plain", 1
        if isinstance(weight, Fp8Weight):
            mode = "scaled" if scale is not None else "dynamic" if weight.input_scale is None else "static"
        if mode == "static":
            scale = static_scale(weight)
            if x.dtype != FP8:  # nobody told its producer
                x = reference.quantize(x, scale)[0]
        if mode == "dynamic":
            known = len(self.largest) == 2 and self.largest[0] is x
            scale = self.largest[1] if known else x.abs().amax(-1, keepdim=True).float()
            parts = scale.shape[1]
        whole = t.splits == 1 or k // t.splits % t.BK == 0
        matrix = descriptor(data(weight), t.BN, t.BK) if whole else None
        inputs = x if matrix is None or mode == "dynamic" else descriptor(x, TOKENS, t.BK)
        linear_kernel[(triton.cdiv(n, t.BN), t.splits, triton.cdiv(m, TOKENS))](
            x if inputs is None else inputs, x if scale is None else scale, data(weight) if matrix is None else matrix,
            row_scale(weight), extra, m, LARGEST=parts,
            N=n, K=k, P=count, S=t.splits, INPUT=mode, USE=use, TMA=matrix is not None,
            BN=t.BN, BK=t.BK, BM=TOKENS, **self.launch(t),
        )  # fmt: skip

    def add_moe(self, x: Tensor, norm: Tensor, eps: float, experts: Experts) -> None:
        """x f32 [M, H] += the mixture of experts of RMSNorm(x); it stays pending."""
        self.ready = None
        if len(x) > TOKENS_ROUTED:
            self.flush(x)
        for part in [x] if len(x) <= TOKENS_ROUTED else x.split(TOKENS_ROUTED):
            moe(self, part, norm, eps, experts)
            if part is not x:
                self.flush(part)
