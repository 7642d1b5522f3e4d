"""One rank's operations on its GPU: partial sums are exchanged, and added where the stream is read next.

What products over split inputs give is gathered from all ranks and stays pending. The kernel that reads the stream next adds
the parts in the order of ranks while it normalises and rounds: so ranks agree to the last bit, and an all-reduce costs one
exchange and no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.kernels.gpu.ops import BURST, TOKENS_EXACT, Ops
from specdec.kernels.gpu.weights import shape, vendor_product
from specdec.kernels.reference import Weight


class ParallelOps(Ops):
    """`Ops` for one rank of several."""

    def __init__(self, device: torch.device, gather: Callable[[Tensor], Tensor]) -> None:
        """gather: the tensors [...] of all ranks in their order, [world, ...]."""
        super().__init__(device)
        self.gather = gather

    def add_linear(self, residual: Tensor, x: Tensor, weight: Weight, norm: Tensor | None = None) -> None:
        """residual f32 [M, N] += the sum over the ranks of x [M, K] @ weight.T; all of it stays pending."""
        self.ready = None
        self.flush(residual)
        (n, k), m = shape(weight), len(x)
        if m > TOKENS_EXACT:
            self.leave(residual, vendor_product(x, weight)[None])
            return
        burst = isinstance(weight, Tensor) and k <= BURST
        t = self.tile("burst" if burst else "add", weight)
        parts = torch.empty((t.splits, m, n), device=x.device)
        if isinstance(weight, Tensor) and burst:
            self._burst(x, None, weight, 0.0, "store", (parts,))
        else:
            self._linear(x, None, weight, t, "store", (parts,))
        self.leave(residual, parts)

    def leave(self, x: Tensor, parts: Tensor) -> None:
        """Everyone's partial sums: f32 [P, M, K] -> [world * P, M, K]."""
        super().leave(x, self.gather(parts).flatten(0, 1))
