"""The comparison of trainers on the toy: our side runs, a head in their format is measured alike, the tables are rendered."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from questions import write_questions
from rich.console import Console

from specdec.target.toy import ByteTokenizer, Toy
from specdec.train.corpus import Batch, Corpus
from specdec.train.eagle3 import make_head
from specdec.train.export import export
from specdec.train.features import Features
from specdec.train.generate import Recipe, write_corpus
from specdec.train.params import TrainingParams
from specdec.train.speculators import to_speculators
from specdec.train.turns import SelfText
from specdec.train.vocabulary import draft_vocabulary

trainers, parts = importlib.import_module("trainers"), importlib.import_module("_trainers")

SMALL = [
    "target=[target=toy]", "max_new_tokens=12", "ours=[kl]", "theirs=[kl_div/adamw]", "steps=4", "batch_size=4", "max_len=48",
    "draft_vocab_size=96", "depth=2", "chain=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of a toy that comes to an end: every tenth token stops it."""
    path, toy = tmp_path_factory.mktemp("trainers") / "text", Toy()
    toy.config = replace(toy.config, eos_token_ids=(ByteTokenizer.eos_token_id, *range(26)))
    recipe, source = Recipe(conversations=24, max_answer=24), SelfText(rounds=1, min_turn=1, max_turn=12)
    write_corpus(path, toy, source, 800, recipe, batch_size=24, console=Console(quiet=True))
    return path


@pytest.fixture(scope="module")
def plan(text: Path) -> Any:
    """What both trainers share, on the toy."""
    toy, corpus = Toy(), Corpus(text, heldout=0.2)
    vocabulary = draft_vocabulary(corpus.counts(toy.config.vocab_size), 96)
    params = TrainingParams(
        20, batch_size=4, max_len=48, learning_rate=1e-3, warmup=1, log_interval=20, checkpoint_interval=20
    )
    return parts.Plan(toy, corpus, *vocabulary, params, 2, {}, None)


def fresh(plan: Any, loss: str, optimizer: str, folder: Path) -> Any:
    """Stands for their training: a head that was not trained, in their format."""
    export(make_head(plan.target, plan.d2t, plan.t2d, 1, plan.depth), folder / "ours", "bfloat16", {})
    to_speculators(folder / "ours", folder / "0", "toy")
    return parts.Trained(folder / "0", [0.5, 2.0, 2.0, 2.0], [(1, 3.0), (4, 2.5)], 7, {"loss_fn": loss})


@pytest.fixture(scope="module")
def folder(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a head of either side on two prompts."""
    path = tmp_path_factory.mktemp("results")
    questions = write_questions(path / "two.jsonl", ["a b a b", "c d c"])
    places = f"text={text}", f"dataset.path={questions}", f"heads={path / 'heads'}", f"results={path}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers, "train_theirs", fresh)
        patch.setattr(trainers, "version", lambda: "1.2.3")
        trainers.main([*SMALL, *places])
    return path


def test_both_sides_are_measured_alike(folder: Path, text: Path) -> None:
    document = json.loads((folder / "trainers.json").read_text())
    ours, theirs = document["rows"]
    assert (ours["drafter"], theirs["drafter"]) == ("specdec kl", "speculators kl_div adamw")
    assert (ours["package"], theirs["package"]) == (None, "1.2.3")
    for row in (ours, theirs):
        assert len(row["requests"]) == 2
        assert all(request["draft_depth"][0] == 2 for request in row["requests"])
        assert len(row["heldout"]["accuracy"]) == 2
    assert [step for step, _ in ours["losses"]] == [1, 2, 3, 4]
    assert ours["step_seconds"]["count"] == theirs["step_seconds"]["count"] == 1  # the first three are left out
    written = (folder / "trainers.md").read_text()
    assert str(folder) not in written + json.dumps(document)  # names of folders, never where they lie
    assert str(text.parent) not in written
    assert "speculators 1.2.3" in written
    (folder / "trainers.md").unlink()
    trainers.main(["--render", f"results={folder}"])
    assert (folder / "trainers.md").read_text() == written


def test_times_of_a_cpu_are_ratios(folder: Path) -> None:
    document = json.loads((folder / "trainers.json").read_text())
    document["rows"][0]["step_seconds"]["median"] = 0.5
    text = trainers.render(document)
    line = next(line for line in text.splitlines() if line.startswith("| speculators") and "M |" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == ["0.00 M", "4.00", "3.000 to 2.500"]
    assert "step, ms" not in text
    document["setup"]["gpu"] = "some GPU"
    assert "| 2000.0 | 4.00 |" in trainers.render(document)


def test_a_head_is_worth_the_same_in_either_format(plan: Any, tmp_path: Path) -> None:
    made = parts.train_ours(plan, tmp_path / "a")
    assert len(made.seconds) == plan.params.steps
    before = export_fresh(plan, tmp_path / "fresh")
    found = parts.heldout(plan, made.folder)
    assert found["loss"] < parts.heldout(plan, before)["loss"]  # it learnt, and it is the trained head that is read
    to_speculators(made.folder, tmp_path / "theirs", "toy")
    assert parts.heldout(plan, tmp_path / "theirs")["loss"] == pytest.approx(found["loss"], rel=1e-3)  # norms rounded


def export_fresh(plan: Any, place: Path) -> Path:
    """The same head before its training."""
    export(make_head(plan.target, plan.d2t, plan.t2d, plan.params.seed, plan.depth), place, "bfloat16", {})
    return place


def test_all_see_the_same_batches(plan: Any) -> None:
    longer = replace(plan, params=replace(plan.params, steps=plan.corpus.steps(4, 48) + 2))
    seen = [batch.rows.tolist() for batch in longer.stream()]
    assert len(seen) == longer.params.steps
    again = [batch.rows.tolist() for epoch in (0, 1) for batch in longer.batches(epoch)]
    assert seen == again[: len(seen)]
    assert seen[-2:] != seen[:2]  # another epoch has another order


def test_the_targets_time_is_left_out(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(
        [0.0, 1.0, 6.0, 10.0, 20.0, 21.0]
    )  # a step from 0 to 10, of which 1 to 6 is the target's; one from 20 to 21
    monkeypatch.setattr(parts, "perf_counter", lambda: next(now))
    clock = parts.Clock(torch.device("cpu"))
    batches = clock.over([next(plan.stream())] * 2)
    features = clock.without(Features(plan.target, (0,)))
    batch: Batch = next(batches)
    assert len(features(batch)) == 2
    next(batches)
    assert next(batches, None) is None
    assert clock.seconds == [5.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ours=[kl_div]"], "ours=kl_div is no loss"),
        (["theirs=[kl_div]"], "theirs=kl_div must be LOSS/OPTIMIZER"),
        (["switches=[fc]"], "switches has fc"),
        (["setps=3"], "setps"),
        (["theirs=[]", "text=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_said(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        trainers.main([*SMALL, *arguments])


def test_a_missing_package_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "version", lambda: None)
    with pytest.raises(SystemExit, match="theirs needs the speculators package"):
        trainers.main(SMALL)
