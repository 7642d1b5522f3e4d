"""`drafters`: several drafters, and several settings of one, in one interleaved run, each under a label of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import QUICK, CommandLine, check_mistake
from hydra import initialize_config_module
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from synthetic_trace import row, write_trace

from specdec import analysis
from specdec.composition import compose_config, drafter_configs
from specdec.tracking import wandb

THREE = 'drafters=[ngram,"ngram  num_draft_tokens=2",{short: "suffix num_draft_tokens=1"}]'
LABELS = ["none", "ngram", "ngram num_draft_tokens=2", "short"]


@pytest.fixture
def hydra() -> Iterator[None]:
    """What `drafter_configs` finds in a run of the command line."""
    with initialize_config_module("specdec.conf", version_base="1.3"):
        yield


def configs(*overrides: str, chosen: str = "ngram") -> dict[str, Any]:
    found = drafter_configs(compose_config(overrides), chosen, overrides)
    return {label: OmegaConf.to_container(node) for label, node in found.items()}


def test_settings_of_one_drafter_are_compared_in_one_run(specdec: CommandLine) -> None:
    """Each in turns on the same prompts, under its label, within its own number of drafts."""
    command = [*QUICK, THREE, "drafter.num_draft_tokens=4", "run_dir=r"]
    done = specdec(*command)
    assert done.code == 0, done.err
    rows = specdec.rows("r/trace.jsonl")
    assert [one["drafter"] for one in rows] == [*LABELS, *LABELS]
    widest = {label: max(max(one["num_nodes"]) for one in rows if one["drafter"] == label) for label in LABELS}
    assert widest["none"] == 1
    assert 3 < widest["ngram"] <= 5  # drafter.KEY holds for all that do not say otherwise
    assert widest["ngram num_draft_tokens=2"] == 3
    assert widest["short"] == 2
    assert "| ngram num_draft_tokens=2 | all |" in (specdec.folder / "r/table.md").read_text()
    assert "short" in done.out
    recorded = OmegaConf.load(specdec.folder / "r/config.yaml").config.drafter
    assert {label: recorded[label].get("num_draft_tokens") for label in LABELS} == dict(
        zip(LABELS, (None, 4, 2, 1), strict=True)
    )
    (specdec.folder / "r/results.png").unlink()  # an empty one, of this fixture
    assert "ngram num_draft_tokens=2/all/tau" in wandb._content(specdec.folder / "r")

    trace = specdec.folder / "r/trace.jsonl"
    trace.write_text("".join(trace.read_text().splitlines(True)[:6]))
    (specdec.folder / "r/DONE").unlink()
    assert specdec(*command).code == 0
    again = specdec.rows("r/trace.jsonl")
    assert again[:6] == rows[:6]
    assert [one["drafter"] for one in again] == [*LABELS, *LABELS]
    check_mistake(specdec(*[*command[:-2], "run_dir=r"]), "drafter.ngram.num_draft_tokens: 4 -> 5")


def test_an_experiment_file_spells_them_the_same(specdec: CommandLine) -> None:
    (specdec.folder / "mine/experiment").mkdir(parents=True)
    (specdec.folder / "mine/experiment/lengths.yaml").write_text(
        "# @package _global_\n"
        "drafters:\n  - ngram\n  - ngram num_draft_tokens=2\n  - short: suffix num_draft_tokens=1\n"
        "drafter:\n  max_ngram: 2\n"
    )
    assert specdec("--config-dir=mine", *QUICK, "experiment=lengths", "run_dir=r").code == 0
    assert [one["drafter"] for one in specdec.rows("r/trace.jsonl")] == [*LABELS, *LABELS]
    recorded = OmegaConf.load(specdec.folder / "r/config.yaml").config.drafter
    assert [recorded[label].max_ngram for label in LABELS[1:3]] == [2, 2]  # of the drafter chosen, whatever its label


@pytest.mark.usefixtures("hydra")
def test_nested_settings_are_those_of_the_command_line() -> None:
    """`drafter.` may stand before a key or not; groups, additions and lists are as they are elsewhere."""
    for prefix in ("", "drafter."):
        entries = [
            f"layer_skip structure@{prefix}structure=dynamic {prefix}structure.depth=3",
            f"layer_skip {prefix}structure=[2,1]",
            f"small_model target@{prefix}model=toy +{prefix}model.vocab_size=300 {prefix}checkpoint=a@b",
            f"hybrid drafter@{prefix}first=suffix {prefix}first.num_draft_tokens=3",
        ]
        found = configs(f"drafters={entries}", "baseline=false")
        assert list(found) == entries
        dynamic, listed, small, hybrid = found.values()
        assert dynamic["structure"]["_target_"] == "specdec.structure.dynamic.Dynamic"
        assert dynamic["structure"]["depth"] == 3
        assert listed["structure"] == [2, 1]
        assert (small["model"]["_target_"], small["model"]["vocab_size"]) == ("specdec.target.toy.Toy", 300)
        assert small["checkpoint"] == "a@b"
        assert (hybrid["first"]["_target_"], hybrid["first"]["num_draft_tokens"]) == (
            "specdec.drafter.suffix.Suffix",
            3,
        )


@pytest.mark.usefixtures("hydra")
def test_the_baseline_is_added_once() -> None:
    assert list(configs('drafters=["ngram num_draft_tokens=2"]')) == ["none", "ngram num_draft_tokens=2"]
    assert list(configs("drafters=[ngram,none]")) == ["ngram", "none"]
    assert list(configs("drafters=[{plain: none}]", "drafter.num_draft_tokens=2")) == ["none", "plain"]  # noise
    assert list(configs("drafters=ngram", "baseline=false")) == ["ngram"]
    assert list(configs()) == ["none", "ngram"]


@pytest.mark.parametrize(
    ("drafters", "words"),
    [
        ('["ngram num_drafts=2"]', ["drafter.num_drafts is not a key", "max_ngram", "of ngram num_drafts=2"]),
        ('[suffix,"ngram min_match=2"]', ["drafter.min_match is not a key", "of ngram min_match=2"]),
        ('["wrong num_draft_tokens=2"]', ["drafters names 'wrong'", "there are eagle, eagle3, hybrid"]),
        (
            '["layer_skip structure@structure=wrong"]',
            ["structure=wrong does not exist", "chain, dynamic", "layer_skip"],
        ),
        ("[ngram,ngram]", ["drafters has 'ngram' twice", "{NAME: 'ngram'}"]),
        ('[{a: ngram},{a: "suffix tree=true"}]', ["drafters has 'a' twice ('ngram' and 'suffix tree=true')"]),
        ('["ngram max_ngram=2","ngram  max_ngram=2"]', ["drafters has 'ngram max_ngram=2' twice"]),
        ("[{none: ngram}]", ["drafters calls 'ngram' none, the name of plain decoding"]),
        ("[ngram num_draft_tokens=2]", ["is not KEY=VALUE", 'drafters=[ngram,"ngram num_draft_tokens=8"]']),
        ('["ngram num_draft_tokens=0"]', ["num_draft_tokens=0"]),
    ],
)
def test_a_mistake_is_one_sentence(specdec: CommandLine, drafters: str, words: list[str]) -> None:
    check_mistake(specdec(*QUICK, f"drafters={drafters}"), *words)
    assert not list(specdec.folder.glob("runs/*"))


def test_a_long_label_leaves_room_for_the_picture(tmp_path: Path) -> None:
    """On lines of their own; on one line it left the axes nothing, and matplotlib warned."""
    label = "layer_skip exit_layer=1 structure@structure=dynamic structure.depth=3"
    frame = analysis.load(write_trace(tmp_path, [row(name, 0, [1, 0], 2) for name in ("none", label)]))
    for figure in (analysis.plot_speedup(analysis.summary(frame)), analysis.plot_breakdown(frame)):
        assert isinstance(figure, Figure)
        figure.draw_without_rendering()
        axes = figure.axes[0]
        texts = [*axes.get_yticklabels(), *axes.get_legend().get_texts()]
        assert max(len(line) for text in texts for line in text.get_text().splitlines()) <= 28
    assert label.split() == " ".join(axes.get_yticklabels()[1].get_text().split()).split()
