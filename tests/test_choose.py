"""The compiled choice of a token against its definition: argmax(logits / temperature + Gumbel noise)."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.kernels.cpu import sampling as compiled
from specdec.sampling import argmax, choose, gumbel, warp
from specdec.types import Sampling


def sampling_of(temperature: list[float], seed: int) -> Sampling:
    seeds = seed + torch.arange(len(temperature)) * (1 << 40)
    zeros = torch.zeros(len(temperature))
    return Sampling(torch.tensor(temperature), zeros.int(), zeros + 1, seeds, zeros.int(), "sampled")


def defined(logits: Tensor, sampling: Sampling, position: Tensor) -> Tensor:
    """Scores f32 [B, N, V] whose largest is the choice."""
    noise = gumbel(sampling.seed[:, None], position, 0, logits.shape[-1])
    return warp(logits, sampling) + torch.where(sampling.temperature > 0, 1.0, 0.0)[:, None, None] * noise


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 700), st.integers(-(2**62), 2**62), st.floats(0.05, 30), st.booleans())
@example(49152, 3, 3.0, False)
@example(16, 0, 0.0, True)
def test_the_choice_is_the_best_score(size: int, seed: int, spread: float, excluded: bool) -> None:
    sampling = sampling_of([0.0, 0.02, 0.7, 5.0], seed)
    logits = spread * torch.randn(4, 3, size, generator=torch.Generator().manual_seed(abs(seed) % 2**31))
    if excluded:
        logits[..., size // 2 + 1 :] = -torch.inf
    position = (seed % 5000 + torch.arange(12, dtype=torch.int32)).view(4, 3)
    scores, chosen = defined(logits, sampling, position), choose(logits, sampling, position)
    reached = scores.gather(-1, chosen[..., None]).squeeze(-1)
    assert bool((reached >= scores.amax(-1) - 1e-5 * (1 + scores.amax(-1).abs())).all())
    assert int((chosen != argmax(scores)).sum()) <= 1  # where two scores differ by the last bit of a logarithm


def test_views_and_many_rows() -> None:
    """Positions that are expanded, and more predictions than one thread takes."""
    sampling = sampling_of([1.0] * 5, 9)
    logits = torch.randn(5, 2, 300)
    position = torch.arange(5, dtype=torch.int32)[:, None].expand(-1, 2)
    assert torch.equal(choose(logits, sampling, position), argmax(defined(logits, sampling, position)))


def test_the_bound_is_above_every_noise_and_near_it() -> None:
    """A bound that were too low would lose tokens without a sign; one that is far too high would cost the gain."""
    count = 1 << 14
    seed, position = torch.tensor([77]), torch.tensor([[5]], dtype=torch.int32)
    noise = gumbel(seed[:, None], position, 0, count)[0, 0]
    flat = torch.zeros(1, 1, count)
    sampling = Sampling(torch.ones(1), torch.zeros(1).int(), torch.ones(1), seed, torch.zeros(1).int(), "sampled")
    for winner in (0, 1, 255, 256, 5000, count - 1):  # lifted just above the best of all others
        logits = flat.clone()
        others = noise.clone()
        others[winner] = -torch.inf
        logits[0, 0, winner] = others.max() - noise[winner] + 1e-3
        assert int(choose(logits, sampling, position)) == winner
        logits[0, 0, winner] -= 2e-3
        assert int(choose(logits, sampling, position)) == int(others.argmax())


def test_it_is_the_compiled_form_that_ran(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    calls = []
    whole = compiled.choose
    monkeypatch.setattr(compiled, "choose", lambda *args: calls.append(1) or whole(*args))  # type: ignore[func-returns-value]
    choose(torch.randn(1, 1, 64), sampling_of([0.5], 1), torch.zeros(1, 1, dtype=torch.int32))
    assert calls == [1]
