"""Noise is uniform and independent, warped laws are the textbook's, and what is chosen follows them exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from specdec.sampling import (
    STREAM_ACCEPT,
    STREAM_DRAFT,
    STREAM_RESIDUAL,
    STREAM_TOKEN,
    argmax,
    choose,
    gumbel,
    sample,
    uniform,
    warp,
)
from specdec.types import Sampling

STREAMS = (STREAM_TOKEN, STREAM_ACCEPT, STREAM_RESIDUAL, STREAM_DRAFT)
DRAWS = 20_000
ALARM = 1e-6  # p-value below which a test fails
Noise = Callable[[Tensor, Tensor, int, Tensor], Tensor]


def rows(settings_: list[tuple[float, int, float]], mode: str = "warped") -> Sampling:
    """One row for every (temperature, top-k, top-p); the seed is the row's number."""
    temperature, top_k, top_p = zip(*settings_, strict=True)
    count = len(settings_)
    return Sampling(
        torch.tensor(temperature), torch.tensor(top_k).int(), torch.tensor(top_p), torch.arange(count),
        torch.zeros(count).int(), mode,  # type: ignore[arg-type]
    )  # fmt: skip


def many(count: int, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    """`count` rows of one setting."""
    mode = "greedy" if temperature == 0 else "warped" if top_k or top_p < 1 else "sampled"
    return replace(rows([(temperature, top_k, top_p)], mode), seed=torch.arange(count) * 7919 + 3,
                   temperature=torch.full((count,), temperature), top_k=torch.full((count,), top_k).int(),
                   top_p=torch.full((count,), top_p), position=torch.zeros(count).int())  # fmt: skip


# ---- noise -----------------------------------------------------------------------------------------------------------


def line(axis: str, noise: Noise, start: int = 0) -> Tensor:
    """DRAWS values along one argument, the others fixed."""
    at = {"seed": torch.tensor(11), "position": torch.tensor(23), "index": torch.tensor(2)}
    at[axis] = torch.arange(start, start + DRAWS)
    return noise(at["seed"], at["position"], STREAM_TOKEN, at["index"])


def p_uniform(values: Tensor) -> float:
    """p-value of Kolmogorov-Smirnov against the uniform law."""
    return float(stats.kstest(values.numpy(), "uniform").pvalue)


def p_independent(a: Tensor, b: Tensor, cells: int = 8) -> float:
    """p-value of chi-square of the pairs over a grid: uniform and independent."""
    joint = torch.bincount((a * cells).long() * cells + (b * cells).long(), minlength=cells**2)
    return float(stats.chisquare(joint.numpy()).pvalue)


@pytest.mark.parametrize("axis", ["seed", "position", "index"])
@pytest.mark.parametrize("start", [0, 2**20, 2**31 - DRAWS // 2])
def test_noise_is_uniform_along_each_argument(axis: str, start: int) -> None:
    values = line(axis, uniform, start)
    assert values.dtype == torch.float32
    assert ((values > 0) & (values < 1)).all()
    assert p_uniform(values) > ALARM
    assert abs(float(values.mean()) - 0.5) < 6 * (1 / 12 / DRAWS) ** 0.5
    assert p_independent(values[:-1], values[1:]) > ALARM  # neighbours


@pytest.mark.parametrize("axis", ["seed", "position"])
def test_indices_at_one_place_are_independent(axis: str) -> None:
    """Indices 0 to 3 of many places: the coins of a small tree, the first tokens of a vocabulary."""
    along = torch.arange(DRAWS)[:, None]
    fixed = torch.tensor(5)
    seed, position = (along, fixed) if axis == "seed" else (fixed, along)
    values = uniform(seed, position, STREAM_ACCEPT, torch.arange(4))
    for i in range(4):
        assert p_uniform(values[:, i]) > ALARM
    for i, j in itertools.combinations(range(4), 2):
        assert p_independent(values[:, i], values[:, j]) > ALARM


def test_streams_positions_and_seeds_are_independent() -> None:
    seed, index = torch.arange(DRAWS), torch.tensor(0)
    by_stream = [uniform(seed, torch.tensor(7), stream, index) for stream in STREAMS]
    by_position = [uniform(seed, torch.tensor(position), STREAM_TOKEN, index) for position in (0, 1, 2, 3, 4, 2**20)]
    high = [uniform(seed + (word << 32), torch.tensor(7), STREAM_TOKEN, index) for word in range(3)]
    for family in (by_stream, by_position, high):
        for a, b in itertools.combinations(family, 2):
            assert p_independent(a, b) > ALARM
    crossed = uniform(seed, torch.tensor(7), STREAM_ACCEPT, index + 1)  # stream and index at once
    assert p_independent(by_stream[0], crossed) > ALARM


def shared_index(seed: Tensor, position: Tensor, stream: int, index: Tensor) -> Tensor:
    """Forgets the index."""
    return uniform(seed, position, stream, torch.zeros_like(index)).expand(
        torch.broadcast_shapes(seed.shape, index.shape)
    )


def lattice(seed: Tensor, position: Tensor, stream: int, index: Tensor) -> Tensor:
    """Multiples of the golden ratio: as even as can be, and a line through every pair."""
    return ((seed + position + index).double() * 0.6180339887498949 % 1).float()


def clumped(seed: Tensor, position: Tensor, stream: int, index: Tensor) -> Tensor:
    """Uniform but for the top three percent."""
    return uniform(seed, position, stream, index) * 0.97


def test_bad_noise_is_caught() -> None:
    """Control: the two tests above fail on noise with a planted fault."""
    seed, position, index = torch.arange(DRAWS)[:, None], torch.tensor(5), torch.arange(4)
    for noise in (shared_index, lattice):
        values = noise(seed, position, STREAM_ACCEPT, index)
        assert p_uniform(values[:, 0]) > ALARM  # each alone looks well
        assert p_independent(values[:, 0], values[:, 1]) < ALARM
    assert p_uniform(line("seed", clumped)) < ALARM


@given(
    seed=st.integers(0, 2**63 - 1), position=st.integers(0, 2**31 - 1), stream=st.sampled_from(STREAMS),
    index=st.integers(0, 2**20),
)  # fmt: skip
def test_equal_arguments_give_equal_noise(seed: int, position: int, stream: int, index: int) -> None:
    """Alone or among others, as int32 or int64: nothing but the values counts."""
    alone = uniform(torch.tensor(seed), torch.tensor(position), stream, torch.tensor(index))
    seeds = torch.tensor([0, seed, 3])[:, None]
    among = uniform(seeds, torch.tensor([[position, 4]]).int(), stream, torch.tensor(index).int())
    assert among.shape == (3, 2)
    assert among[1, 0] == alone
    assert 0 < float(alone) < 1


def test_gumbel_noise_has_its_law() -> None:
    noise = gumbel(torch.tensor([9]), torch.arange(2000), STREAM_TOKEN, 16)
    assert noise.shape == (2000, 16)
    assert noise.isfinite().all()
    values = noise.flatten().double()
    count = len(values)
    assert abs(float(values.mean()) - float(np.euler_gamma)) < 6 * (np.pi**2 / 6 / count) ** 0.5
    assert abs(float(values.var()) / (np.pi**2 / 6) - 1) < 6 * (4.4 / count) ** 0.5
    assert stats.kstest(values.numpy(), "gumbel_r").pvalue > ALARM
    for i, j in itertools.combinations(range(4), 2):
        assert stats.spearmanr(noise[:, i], noise[:, j]).pvalue > ALARM
    assert torch.equal(noise[:5], gumbel(torch.tensor([9]), torch.arange(5), STREAM_TOKEN, 16))


# ---- warping ---------------------------------------------------------------------------------------------------------


def textbook(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Law of one row in float64, token by token: sort, keep the k best, keep until the mass reaches top_p, rescale."""
    best = max(range(len(logits)), key=lambda i: (logits[i], -i))
    if temperature == 0:
        return [float(i == best) for i in range(len(logits))]
    weight = np.exp((np.array(logits) - max(logits)) / temperature)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    total, mass, kept = sum(weight[i] for i in order), 0.0, []
    for i in order:
        if top_p < 1 and kept and mass >= top_p:
            break
        kept.append(i)
        mass += weight[i] / total
    rest = sum(weight[i] for i in kept)
    return [float(weight[i] / rest) if i in kept else 0.0 for i in range(len(logits))]


SETTINGS = st.tuples(
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([0, 1, 2, 3, 50]),
    st.sampled_from([1.0, 0.93, 0.71, 0.37, 1e-6]),
)


@settings(max_examples=200)
@given(settings_=st.lists(SETTINGS, min_size=1, max_size=4), data=st.data())
def test_warping_is_the_textbooks(settings_: list[tuple[float, int, float]], data: st.DataObject) -> None:
    """Rows of different settings in one batch; whole-number logits, so that ties are common."""
    logits = data.draw(st.lists(st.integers(-4, 4), min_size=5, max_size=5))
    sampling = rows(settings_)
    batch = torch.tensor(logits).float().expand(len(settings_), 2, 5)
    law = warp(batch, sampling).softmax(-1)
    for row, setting in enumerate(settings_):
        expected = torch.tensor(textbook([float(x) for x in logits], *setting))
        torch.testing.assert_close(law[row], expected.expand(2, 5))
        assert torch.equal(law[row] > 0, (expected > 0).expand(2, 5))


@pytest.mark.parametrize("mode", ["sampled", "warped"])
def test_what_is_off_changes_nothing(mode: str) -> None:
    logits = torch.randn(3, 2, 50)
    sampling = rows([(0.7, 0, 1.0), (1.0, 0, 1.0), (1.9, 0, 1.0)], mode)
    assert torch.equal(warp(logits, sampling), logits / sampling.temperature[:, None, None])


def test_greedy_rows_keep_their_argmax_in_every_mode() -> None:
    logits = torch.tensor([[[1.0, 3.0, 3.0, 2.0]]])
    for mode in ("greedy", "sampled", "warped"):
        warped = warp(logits, rows([(0.0, 2, 0.5)], mode))
        assert warped.softmax(-1).tolist() == [[[0.0, 1.0, 0.0, 0.0]]]
    assert warp(logits.bfloat16(), rows([(1.0, 0, 1.0)])).dtype == torch.float32


# ---- choosing --------------------------------------------------------------------------------------------------------


@given(size=st.sampled_from([1, 3, 63, 64, 65, 128, 192, 640]), seed=st.integers(0, 2**31), spread=st.integers(1, 40))
def test_argmax_takes_the_first_of_equals(size: int, seed: int, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, spread, (2, 3, size), generator=generator).float()
    found = argmax(logits)
    assert found.dtype == torch.int64
    expected = [[max(range(size), key=lambda i: (row[i], -i)) for row in part] for part in logits.tolist()]
    assert found.tolist() == expected


@pytest.mark.parametrize("size", [5, 128])
def test_argmax_of_excluded_tokens(size: int) -> None:
    logits = torch.full((1, size), -torch.inf)
    assert argmax(logits).tolist() == [0]
    logits[0, size - 1] = -1e30
    assert argmax(logits).tolist() == [size - 1]


def p_law(tokens: Tensor, law: Tensor) -> float:
    """p-value of chi-square of the tokens against their law; 0 where an impossible one occurred."""
    seen = torch.bincount(tokens.flatten(), minlength=len(law)).double()
    if (seen[law == 0] > 0).any():
        return 0.0
    possible = law > 0
    return float(stats.chisquare(seen[possible].numpy(), (law[possible] * seen.sum()).numpy()).pvalue)


LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.4, -0.2, 2.0])


@pytest.mark.parametrize("setting", [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 4, 1.0), (1.0, 0, 0.8), (0.8, 5, 0.9)])
def test_chosen_tokens_follow_the_warped_law(setting: tuple[float, int, float]) -> None:
    sampling = many(DRAWS, *setting)
    law = torch.tensor(textbook(LOGITS.tolist(), *setting), dtype=torch.float64)
    position = torch.tensor([[4, 5]]).int().expand(DRAWS, 2)
    tokens = choose(LOGITS.expand(DRAWS, 2, -1), sampling, position)
    assert tokens.shape == (DRAWS, 2)
    assert p_law(tokens[:, 0], law) > ALARM
    assert p_law(tokens[:, 1], law) > ALARM
    pair = tokens[:, 0] * len(law) + tokens[:, 1]  # neighbours are independent
    assert p_law(pair, (law[:, None] * law).flatten()) > ALARM


@pytest.mark.parametrize("fault", [(1.1, 0, 1.0), (1.0, 6, 1.0), (1.0, 0, 0.97)])
def test_a_law_that_is_slightly_off_is_caught(fault: tuple[float, int, float]) -> None:
    """Control: chi-square of this size tells temperature 1 from 1.1."""
    tokens = choose(LOGITS.expand(DRAWS, 1, -1), many(DRAWS, 1.0), torch.zeros(DRAWS, 1).int())
    assert p_law(tokens, torch.tensor(textbook(LOGITS.tolist(), *fault), dtype=torch.float64)) < ALARM


def test_a_choice_depends_on_seed_and_position_alone() -> None:
    """Whatever shares the batch or the tree, a position gets the same token; greedy rows get their argmax."""
    logits = torch.randn(40, 3, 130, generator=torch.Generator().manual_seed(0))
    sampling = rows([(0.0, 0, 1.0) if row % 4 == 0 else (1.3, 20, 0.9) for row in range(40)])
    position = torch.tensor([[3, 4, 5]]).int().expand(40, 3)
    tokens = choose(logits, sampling, position)
    assert torch.equal(tokens[::4], argmax(logits[::4]))
    assert not torch.equal(tokens, argmax(logits))
    few = torch.tensor([7, 2, 30])
    part = rows([(1.3, 20, 0.9)] * 3)
    part.seed = sampling.seed[few]
    again = choose(logits[few][:, [2, 0]], part, position[few][:, [2, 0]])
    assert torch.equal(again, tokens[few][:, [2, 0]])
    moved = choose(logits, replace(sampling, seed=sampling.seed + 1000), position)
    assert not torch.equal(moved[1:4], tokens[1:4])


def test_samples_of_explicit_laws() -> None:
    """Laws need not be normalised; what has no mass is never drawn."""
    probs = torch.tensor([0.0, 0.2, 0.0, 1.4, 0.4])
    sampling = many(DRAWS, 1.0)
    tokens = sample(probs.expand(DRAWS, 5), sampling, torch.full((DRAWS,), 9).int(), STREAM_RESIDUAL)
    assert p_law(tokens, probs.double() / probs.double().sum()) > ALARM
    assert p_law(tokens, torch.tensor([0.0, 0.1, 0.0, 0.65, 0.25], dtype=torch.float64)) < ALARM
