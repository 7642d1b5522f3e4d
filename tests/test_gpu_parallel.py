"""Two ranks on the GPU's kernels: the same bits on both, and what one rank gives. Without a GPU in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.gpu import ops as gpu_ops
from specdec.kernels.gpu.parallel import ParallelOps
from specdec.kernels.reference import Experts, Fp8Weight, Weight

DEVICE, EPS = torch.device("cuda" if torch.cuda.is_available() else "cpu"), 1e-5
HIDDEN, INNER, TOKENS = 48, 64, 5
KINDS = {
    "float32": 1e-5,
    "bfloat16": 2e-2,
    "dynamic": 6e-2,
    "static": 6e-2,
}  # largest error, as a share of the largest value
if DEVICE.type == "cpu":
    interpreter.install()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def weight(kind: str, *shape: int, seed: int = 0) -> Weight:
    value = randn(*shape, seed=seed) * shape[-1] ** -0.5
    if kind in ("float32", "bfloat16"):
        return value.to(getattr(torch, kind))
    rows, scale = reference.quantize(value)
    return Fp8Weight(rows, scale, torch.tensor(0.02, device=DEVICE) if kind == "static" else None)


def half(whole: Weight, rank: int, dim: int) -> Weight:
    """A rank's part, by rows (-2) or inputs (-1)."""
    if isinstance(whole, Tensor):
        return whole.chunk(2, dim)[rank].contiguous()
    scale = whole.scale.chunk(2, -1)[rank].contiguous() if dim == -2 else whole.scale
    rows = whole.data.view(torch.uint8).chunk(2, dim)[rank].contiguous().view(reference.FP8)
    return Fp8Weight(rows, scale, whole.input_scale)


def exchanged(work: Callable[[ParallelOps, int], Tensor], calls: int) -> list[Tensor]:
    """What both ranks make of it. A rank's n-th exchange needs the other's n-th, which may depend on those before."""
    sent: list[list[Tensor | None]] = [[None] * calls for _ in range(2)]
    results = []
    for _ in range(calls + 1):  # every round one more exchange is right
        results = []
        for rank in range(2):
            number = iter(range(calls))

            def gather(parts: Tensor, rank: int = rank, number: object = number) -> Tensor:
                at = next(number)  # type: ignore[call-overload]
                sent[rank][at] = parts.clone()
                both = [x if x is not None else torch.zeros_like(parts) for x in (sent[0][at], sent[1][at])]
                return torch.stack(both)

            results.append(work(ParallelOps(DEVICE, gather), rank))
    return results


@pytest.mark.parametrize("burst", [True, False], ids=["burst", "turns"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_of_split_inputs(kind: str, burst: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays pending, is added once, and the next product sees it."""
    monkeypatch.setattr("specdec.kernels.gpu.parallel.BURST", 2048 if burst else 0)
    monkeypatch.setattr(gpu_ops, "BURST", 2048 if burst else 0)
    down, head, norm = weight(kind, HIDDEN, INNER), weight("float32", 24, HIDDEN, seed=1), randn(HIDDEN, seed=2).abs()
    stream, x = randn(TOKENS, HIDDEN, seed=3), randn(TOKENS, INNER, seed=4).to(reference.compute_dtype(down))

    def work(ops: ParallelOps, rank: int) -> Tensor:
        out = stream.clone()
        ops.add_linear(out, x.chunk(2, -1)[rank].contiguous(), half(down, rank, -1), norm)
        logits = ops.norm_linear(out, norm, EPS, head)
        assert ops.pending is None
        return torch.cat([out, logits], -1)

    wanted = stream + reference.linear(x, down)
    wanted = torch.cat([wanted, reference.norm_linear(wanted, norm, EPS, head)], -1)
    first, second = exchanged(work, 1)
    assert torch.equal(first, second)
    assert ((first - wanted).abs().amax() / wanted.abs().amax()).item() < KINDS[kind]


@pytest.mark.parametrize("tokens", [3, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_of_split_experts(kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every expert each rank has half the channels; tokens beyond one launch, here of 4, come in pieces."""
    monkeypatch.setattr(gpu_ops, "TOKENS_ROUTED", 4)
    names = ("gate", "up", "shared_gate", "shared_up")
    rows = {
        name: weight(kind, *((3,) if "shared" not in name else ()), INNER, HIDDEN, seed=i)
        for i, name in enumerate(names)
    }
    downs = {"down": weight(kind, 3, HIDDEN, INNER, seed=5), "shared_down": weight(kind, HIDDEN, INNER, seed=6)}
    router, norm, stream = randn(3, HIDDEN, seed=7), randn(HIDDEN, seed=8).abs(), randn(tokens, HIDDEN, seed=9)
    router = router.to(reference.compute_dtype(downs["down"]))

    def experts(part: Callable[[Weight, int], Weight]) -> Experts:
        gate_up, shared = (
            reference.stack([part(rows[f"{p}gate"], -2), part(rows[f"{p}up"], -2)]) for p in ("", "shared_")
        )
        return Experts(router, gate_up, part(downs["down"], -1), shared, part(downs["shared_down"], -1))

    def work(ops: ParallelOps, rank: int) -> Tensor:
        mine, out = experts(lambda whole, dim: half(whole, rank, dim)), stream.clone()
        mine.gate_up, mine.shared_gate_up = (ops.pack(x, swiglu=True) for x in (mine.gate_up, mine.shared_gate_up))
        ops.add_moe(out, norm, EPS, ops.pack_experts(mine))
        ops.flush(out)
        return out

    wanted = stream + reference.moe(stream, norm, EPS, experts(lambda whole, _: whole))
    first, second = exchanged(work, -(-tokens // gpu_ops.TOKENS_ROUTED))
    assert torch.equal(first, second)
    assert ((first - wanted).abs().amax() / wanted.abs().amax()).item() < KINDS[kind]


def test_a_rank_that_keeps_its_part_is_caught() -> None:
    """Negative control: parts that are not exchanged give each rank a stream of its own."""
    down, x, streams = weight("float32", HIDDEN, INNER), randn(TOKENS, INNER, seed=4), []
    for rank in range(2):
        ops, out = ParallelOps(DEVICE, lambda parts: parts[None]), torch.zeros(TOKENS, HIDDEN, device=DEVICE)
        ops.add_linear(out, x.chunk(2, -1)[rank].contiguous(), half(down, rank, -1))
        ops.flush(out)
        streams.append(out)
    assert not torch.equal(*streams)
