"""Catch host reads in a decode step: fake tensors have no values, so whatever looks at one fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from specdec.decoding import SpeculativeDecoder
from specdec.decoding import decoder as loop
from specdec.drafter import Drafter
from specdec.structure import adaptive
from specdec.target.toy import Toy
from specdec.testing.errors import ConformanceError
from specdec.verifier import Verifier

READS = ("tolist", "numpy", "cpu", "__array__", "item", "__bool__", "__int__", "__float__", "__index__")


def check_no_sync(drafter: Drafter, verifier: Verifier, target: Any = None) -> None:
    """ConformanceError if a step with this pair reads a tensor on the host, or needs a shape that depends on data.

    Steps a throwaway decoder of batch 2; drafter and target are not to be used afterwards. The named reads on the CPU, the
    loop's `widest_row` and the adaptive chain's `any_row_drafts`, are exempt. Kernels called by address have no fake form, so
    the target is the torch runtime.
    """
    target = target or Toy(backend="torch")
    decoder = SpeculativeDecoder(target, drafter, verifier, batch_size=2)
    steps = decoder.stream([[1, 2, 3, 1, 2, 3, 1, 2], [5, 6, 5]], max_new_tokens=40, ignore_eos=True)
    for _ in range(6):  # two prefills, then steps with real values, so that lazy state exists
        next(steps)
    who = type(drafter).__name__ if drafter.graphable else type(verifier).__name__
    try:
        with _no_reads(), FakeTensorMode(allow_non_fake_inputs=True):
            decoder.step()
    except (DataDependentOutputException, DynamicOutputShapeException, HostReadError) as error:
        raise ConformanceError(
            f"a step with {who} reads a tensor on the host ({str(error).splitlines()[0]}): keep it on the device, or say "
            "graphable = False"
        ) from error


class HostReadError(RuntimeError):
    """A tensor was read on the host."""


@contextmanager
def _no_reads() -> Iterator[None]:
    """Every way of reading a tensor raises; the named reads give what every GPU step does: all nodes, all passes."""

    def refuse(name: str) -> Any:
        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            raise HostReadError(f"Tensor.{name}")

        return read

    patches = [patch.object(torch.Tensor, name, refuse(name)) for name in READS]
    patches.append(patch.object(loop, "widest_row", lambda tree: tree.tokens.shape[1]))
    patches.append(patch.object(adaptive, "any_row_drafts", lambda drafting: True))
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()
