"""One rank's operations on its GPU: what the ranks' products leave is exchanged, and added where the stream is read next.

Partial sums over split inputs stay pending. Up to TOKENS_EXACT tokens the kernel that normalises next exchanges them through
the ranks' memories (see exchange.py), so that a sum over ranks costs no kernel of its own. Longer forwards, and ranks that
cannot write each other's memory, gather them first. Either way all ranks add the same in the same order, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.kernels.gpu import long
from specdec.kernels.gpu.exchange import Mailbox
from specdec.kernels.gpu.ops import BURST, TOKENS_EXACT, Ops
from specdec.kernels.gpu.weights import shape
from specdec.kernels.reference import Weight


class ParallelOps(Ops):
    """`Ops` for one rank of several."""

    def __init__(
        self, device: torch.device, gather: Callable[[Tensor], Tensor], mailbox: Mailbox | None = None
    ) -> None:
        """gather: the tensors [...] of all ranks in their order, [world, ...]. Without a mailbox all is gathered."""
        super().__init__(device)
        self.gather, self.mailbox = gather, mailbox
        self.mine: tuple[Tensor, Tensor] | None = None  # a stream, and this rank's f32 [P, M, K] of what it lacks

    def add_linear(self, residual: Tensor, x: Tensor, weight: Weight, norm: Tensor | None = None) -> None:
        """residual f32 [M, N] += the sum over the ranks of x [M, K] @ weight.T; all of it stays pending."""
        self.ready = None
        self.flush(residual)
        (n, k), m = shape(weight), len(x)
        if m > TOKENS_EXACT:
            self.leave(residual, long.product(weight, x)[None])
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
        """This rank's partial sums f32 [P, M, K], to be added to the stream x with everyone's."""
        if self.mailbox is not None and len(x) <= self.mailbox.tokens:
            self.mine, self.pending = (x, parts), None
        else:
            super().leave(x, self.gather(parts).flatten(0, 1))

    def norm_parts(self, x: Tensor) -> int:
        """In how many parts `add_norm` leaves the squares of a token of x."""
        return 1 if self.mailbox is None or self._exchanged(x) is None else self.mailbox.programs

    def add_norm(
        self, x: Tensor, norm: Tensor, eps: float, plain: Tensor, squares: Tensor, quantised: Tensor, scale: Tensor,
        input_scale: Tensor, mode: str, quantise: str,
    ) -> None:  # fmt: skip
        """As on one GPU, behind the exchange if one is due."""
        parts, self.mine = self._exchanged(x), None
        if parts is None or self.mailbox is None:
            super().add_norm(x, norm, eps, plain, squares, quantised, scale, input_scale, mode, quantise)
            return
        results = plain, squares, quantised, scale, input_scale
        self.mailbox.add_norm(x, parts, norm, eps, *results, mode, quantise, self.launch())

    def flush(self, x: Tensor) -> None:
        """Add what is pending to the stream x f32 [M, K], for whoever reads it without a norm."""
        if self._exchanged(x) is not None:
            self.add_norm(x, x, 0.0, x, x, x, x, x, "no", "no")
        else:
            super().flush(x)

    def _exchanged(self, x: Tensor) -> Tensor | None:
        """What this rank owes the stream x; what it owed a stream that was given up is forgotten, by all alike."""
        return self.mine[1] if self.mine is not None and self.mine[0] is x else None
