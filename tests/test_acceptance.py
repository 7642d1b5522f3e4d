"""The tables of acceptance lengths: measured on a tiny model, gone on with where they stopped, ordered as they should be."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from questions import write_questions

from specdec import composition
from specdec.drafter import Drafter
from specdec.testing.enumeration import enumerate_law
from specdec.testing.prefix_model import PrefixModel, Topology, depth_of, sampling_of
from specdec.verifier import Verifier

acceptance, report = importlib.import_module("acceptance"), importlib.import_module("_acceptance_report")

LAWS = {report.GREEDY: sampling_of(1, temperature=0.0), report.DRAWN: sampling_of(1)}
PAIRS = [pair for pair in report.ORDERED if pair[1][1] != pair[2][1]]  # of different verifiers
SHAPES: dict[str, Topology] = {  # what stands in for the structures, small enough to be enumerated
    report.CHAIN: (-1, 0, 1),
    report.LONG: (-1, 0, 1, 2),
    report.TREE: (-1, 0, 0, 1, 2),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drafters and plain decoding under both laws, on two prompts."""
    folder = tmp_path_factory.mktemp("acceptance")
    questions = write_questions(folder / "two.jsonl", ["a b a b", "c d c"])
    acceptance.main([
        f"dataset.path={questions}", "target=[target=toy]", "max_new_tokens=12", "methods=[none,ngram,lookahead]",
        f"results={folder}",
    ])  # fmt: skip
    return folder


@cache
def built(method: Any) -> tuple[Drafter, Verifier]:
    """A row's drafter and verifier; ValueError where they do not fit."""
    name, *settings = method.verifier
    cfg = composition.compose_config([*method.drafter, f"verifier={name}", *settings])
    verifier = composition.build(cfg.verifier, "verifier")
    return composition.build_methods({method.label: cfg.drafter}, verifier)[method.label], verifier


def row(
    drafter: str, accepted: list[list[int]], verifier: str = "target_only", nodes: int = 1, **more: Any
) -> dict[str, Any]:
    """A greedy row with a request of task "qa" for every list of accepted drafts; every step proposes `nodes`."""
    requests = [
        {
            "task": "qa", "pass": 0, "num_nodes": [nodes + 1] * len(steps), "draft_depth": steps, "num_accepted": steps,
            "num_emitted": [count + 1 for count in steps], **more,
        }
        for steps in accepted
    ]  # fmt: skip
    return {
        "section": report.GREEDY, "drafter": drafter, "verifier": verifier, "nodes": nodes, "requests": requests,
        "lossless": verifier == "target_only",
    }  # fmt: skip


# ---- the run ---------------------------------------------------------------------------------------------------------


def test_every_method_is_measured_under_both_laws(results: Path) -> None:
    document = json.loads((results / "acceptance.json").read_text())
    found = {(row["section"], row["drafter"]): len(row["requests"]) for row in document["rows"]}
    names = ("none", "ngram", "lookahead")
    assert found == {(law, name): count for law, count in (("T = 0", 2), ("T = 1", 4)) for name in names}
    scored = {row["drafter"] for row in document["rows"] if "logprobs" in row["requests"][0]}
    assert scored == {"none"}
    text = (results / "acceptance.md").read_text()
    assert text.count("| ngram | target_only |") == text.count("| lookahead | target_only |") == 2
    assert "| none |" not in text
    assert str(results) not in text + (results / "acceptance.json").read_text()


def test_every_method_can_be_built_and_has_a_row_of_its_own() -> None:
    for law, methods in acceptance.METHODS.items():
        names = [(method.label, method.rule) for method in methods]
        assert len(set(names)) == len(names), law
        for method in methods:
            built(method)


def test_names_of_the_order_are_those_of_the_tables() -> None:
    names = {law: {(method.label, method.rule) for method in methods} for law, methods in acceptance.METHODS.items()}
    for law, more, less in report.ORDERED:
        assert {more, less} <= names[law]


# ---- the tables ------------------------------------------------------------------------------------------------------


def test_all_passes_of_a_prompt_are_one_request() -> None:
    twice = row("ngram", [[1], [0], [1], [0]])
    for number, request in enumerate(twice["requests"]):
        request["pass"] = number // 2
    found = report.sums(report.frame([twice], report.GREEDY))
    assert found.loc[("ngram", "target_only", "qa")].to_dict("index") == {
        0: {"tokens": 4, "drafts": 2, "steps": 2},
        1: {"tokens": 2, "drafts": 2, "steps": 2},
    }


def test_a_step_that_was_cut_short_is_left_out() -> None:
    short = row("ngram", [[2, 3]], nodes=3)
    short["requests"][0]["num_emitted"][1] = 1
    assert report.sums(report.frame([short], report.GREEDY)).to_dict("list") == {
        "tokens": [3],
        "drafts": [3],
        "steps": [1],
    }


def test_a_difference_is_of_pairs() -> None:
    """One method accepts one token more in every step: the difference is 1, without doubt."""
    index = pd.MultiIndex.from_product(
        [["a", "b"], ["v"], ["chat", "qa"], range(5)], names=["drafter", "verifier", "task", "request"]
    )
    sums = pd.DataFrame({"tokens": 0, "drafts": 4, "steps": 4}, index=index)
    sums.loc["a", "tokens"], sums.loc["b", "tokens"] = [4, 8, 12, 16, 20] * 2, [0, 4, 8, 12, 16] * 2
    tokens, drafts = report.resampled(sums, [("a", "v"), ("b", "v")])
    assert report.with_interval(tokens[:, 0] - tokens[:, 1]) == pytest.approx((1, 1, 1))
    assert np.all(drafts == 1)
    mean, low, high = report.with_interval(tokens[:, 0])
    assert low < mean < high


def test_an_adaptive_chain_is_held_against_fixed_ones_of_as_many_drafts() -> None:
    """It drafts 1.5 a step and accepts 0.8; chains of 1 and 2 accept 0.5 and 0.9, so 0.7 with as many drafts."""
    adaptive = row(f"{report.ADAPTIVE}path 0.5", [[1, 1, 0, 1, 1, 1, 0, 1, 1, 1]] * 2, nodes=7)
    for request in adaptive["requests"]:
        request["num_nodes"] = [2, 3] * 5
    rows = [
        row(f"{report.FIXED}2", [[2, 0, 1, 1, 2, 0, 1, 1, 1, 0]] * 2, nodes=2),
        adaptive,
        row(f"{report.FIXED}1", [[1, 0]] * 2),
    ]
    text = report._adaptive(rows)
    assert f"| {report.ADAPTIVE}path 0.5 | 1.50 | 1.80 | 1.70 | +0.100 [+0.100, +0.100] |" in text
    assert text.index("chain of 1") < text.index("chain of 2") < text.index("adaptive path")
    assert "| 1.80 | – | – |" in report._adaptive(rows[:2])  # one chain of 2 drafts says nothing of 1.5
    assert not report._adaptive(rows[1:2])


def test_a_lossy_text_is_scored_beside_the_plain_one() -> None:
    rows = [
        row("none", [[0, 0]] * 6, logprobs=[-1.0, -1.0, -1.0]),
        row("eagle3", [[1]] * 6, "typical", logprobs=[-2.0, -1.0]),
        row("eagle3", [[1]] * 6),
    ]
    text = report._lossy(rows)
    assert "| T = 0 | none | 1.000 [1.000, 1.000] | – |" in text
    assert "| T = 0 | eagle3, typical | 1.500 [1.500, 1.500] | +0.500 [+0.500, +0.500] |" in text
    assert not report._lossy(rows[:1])  # nothing lossy
    assert not report._lossy(rows[1:])  # nothing to compare with


@pytest.mark.parametrize(("gain", "holds"), [([1, 1], "yes"), ([-1, -1], "no"), ([1, -1], "within the interval")])
def test_a_pair_is_said_to_hold_where_its_interval_lets_it(gain: list[int], holds: str) -> None:
    _, more, less = report.ORDERED[0]
    rows = [row(more[0], [[1 + number] * 4 for number in gain]), row(less[0], [[1] * 4] * 2)]
    assert report._theory(rows).rstrip().endswith(f"| {holds} |")
    assert not report._theory(rows[:1])


# ---- the order -------------------------------------------------------------------------------------------------------


def exact(law: str, name: tuple[str, str], shape: Topology, seed: int) -> float:
    """The acceptance length of a row's verifier on a random model of three tokens, by enumeration."""
    verifier = next(built(method)[1] for method in acceptance.METHODS[law] if (method.label, method.rule) == name)
    model = PrefixModel.random(3, depth_of(shape) + 1, seed)
    return enumerate_law(verifier, model, shape, LAWS[law], verifier.law)[1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("law", "more", "less"), PAIRS)
def test_theory_orders_verifiers_as_the_tables_say(
    law: str, more: tuple[str, str], less: tuple[str, str], seed: int
) -> None:
    assert exact(law, more, SHAPES[more[0]], seed) >= exact(law, less, SHAPES[less[0]], seed) - 1e-6


def test_a_tree_with_more_behind_its_first_child_is_not_ordered() -> None:
    """rrs takes the first sibling more often than kseq: what holds for regular trees does not for this one."""
    kseq, rrs = (exact(report.DRAWN, (report.TREE, rule), (-1, 0, 0, 1, 1), 1) for rule in ("kseq", "rrs"))
    assert kseq < rrs - 0.01
