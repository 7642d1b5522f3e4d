"""The table of acceptance lengths: it is measured on a tiny model, goes on where it stopped, and orders as it should."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pandas as pd
import pytest
from questions import write_questions

acceptance = importlib.import_module("acceptance")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drafters under both laws, on two prompts."""
    folder = tmp_path_factory.mktemp("acceptance")
    questions = write_questions(folder / "two.jsonl", ["a b a b", "c d c"])
    arguments = [
        f"dataset.path={questions}", "target=[target=toy]", "max_new_tokens=12", "methods=[ngram,suffix]",
        f"results={folder}",
    ]  # fmt: skip
    acceptance.main(arguments)
    return folder


def test_every_method_is_measured_under_both_laws(results: Path) -> None:
    document = json.loads((results / "acceptance.json").read_text())
    found = {(row["section"], row["drafter"]): len(row["requests"]) for row in document["rows"]}
    assert found == {("T = 0", "ngram"): 2, ("T = 0", "suffix"): 2, ("T = 1", "ngram"): 4, ("T = 1", "suffix"): 4}
    text = (results / "acceptance.md").read_text()
    assert text.count("| ngram | target_only |") == 2
    assert str(results) not in text + (results / "acceptance.json").read_text()


def test_names_of_the_order_are_those_of_the_tables() -> None:
    labels = {
        method.label for method in (*acceptance.OTHERS, *acceptance.CHAINS, *acceptance.TREES, *acceptance.SAMPLED)
    }
    assert {label for _, more, less in acceptance.ORDERED for label, _ in (more, less)} <= labels


def test_a_difference_is_of_pairs() -> None:
    """One method accepts one token more in every step: the difference is 1, without doubt."""
    index = pd.MultiIndex.from_product(
        [["a", "b"], ["v"], ["chat", "qa"], range(5)], names=["drafter", "verifier", "task", "request"]
    )
    sums = pd.DataFrame({"tokens": 0, "steps": 4}, index=index)
    sums.loc["a", "tokens"], sums.loc["b", "tokens"] = 12, 8
    assert acceptance.difference(sums, ("a", "v"), ("b", "v")) == pytest.approx((1, 1, 1))
    sums.loc[("b", "v", "qa"), "tokens"] = [8, 8, 8, 20, 20]
    mean, low, high = acceptance.difference(sums, ("a", "v"), ("b", "v"))
    assert low < mean < high
