"""The command line: what a run leaves, what a mistake says, and how interrupted runs and sweeps go on."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import tomllib
from pathlib import Path

import held
import pytest
import torch
from command import LEFT, QUICK, CommandLine, check_mistake, contents

HELD = ["debug=quick", "dataset.limit=3", "max_new_tokens=8", "ignore_eos=true", "drafter._target_=held.Held"]


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_folder_and_nothing_else(specdec: CommandLine) -> None:
    process = specdec.start(*QUICK)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert contents(specdec.folder) == ["runs"]
    (run,) = (specdec.folder / "runs").iterdir()
    assert contents(run) == LEFT
    assert (run / "results.png").stat().st_size > 10_000
    assert out.splitlines()[-1] == f"run folder: runs/{run.name}"
    assert "ngram" in out
    assert "speed-up" in out
    rows = specdec.rows(run / "trace.jsonl")
    assert [(r["drafter"], r["request"]) for r in rows] == [("none", 0), ("ngram", 0), ("none", 1), ("ngram", 1)]
    assert all(r["equal_to_plain"] for r in rows)
    assert json.loads((run / "environment.json").read_text())["command"].endswith(
        "debug=quick dataset.limit=2 max_new_tokens=8"
    )


@pytest.mark.parametrize("columns", [80, 120])
def test_the_output_fits_the_terminal(specdec: CommandLine, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = specdec(*QUICK, "drafters=[ngram,token_recycling]")
    assert max(len(line) for line in done.out.splitlines()) <= columns
    assert done.out.count("accept rate by position") == 1  # in the table, or over its own
    assert sum("table.md" in line for line in done.out.splitlines()) == 1  # in place of a legend
    (table,) = specdec.folder.glob("runs/*/table.md")
    assert "- **speed-up**: tok/s over that of no drafting" in table.read_text()


def test_one_value_holds_for_all_of_several_drafters(specdec: CommandLine) -> None:
    done = specdec(*QUICK, "drafters=[suffix,ngram]", "drafter.num_draft_tokens=2", "run_dir=r")
    assert done.code == 0, done.err
    rows = specdec.rows("r/trace.jsonl")
    assert {r["drafter"] for r in rows} == {"none", "suffix", "ngram"}
    assert max(nodes for r in rows for nodes in r["num_nodes"]) == 3
    check_mistake(specdec(*QUICK, "drafters=[suffix,ngram]", "drafter.max_ngram=2"), "drafter.max_ngram", "min_match")


# ---- help ------------------------------------------------------------------------------------------------------------


def test_help_is_worth_reading(specdec: CommandLine) -> None:
    done = specdec("--help")
    assert done.code == 0
    for line in (
        "drafter: eagle, eagle3, hybrid, hydra, layer_skip, lookahead, medusa, ngram, none, small_model, suffix, "
        "token_recycling",
        "structure: adaptive, chain, dynamic, paths, regular, sequoia",
        "target: huggingface, llama, maverick, smollm2, toy",
        "verifier: block, fly, kseq, relaxed_acceptance, rrs, speculative_sampling, static_ensemble, target_only, "
        "traversal, typical",
        "max_new_tokens: 128",
    ):
        assert line in done.out.splitlines()
    assert "$" not in re.sub(r"\$\{now:.*?\}", "", done.out)  # every placeholder is filled in
    assert max(len(line) for line in done.out.splitlines()) <= 125
    assert contents(specdec.folder) == []


def test_the_examples_of_help_compose(specdec: CommandLine) -> None:
    """Each is a command that Hydra takes, --config-dir and placeholders apart."""
    lines = re.findall(r"^  specdec (?!-m|--config-dir|run_dir)(\S.*?)(?:  .*)?$", specdec("--help").out, re.M)
    assert len(lines) >= 7
    for line in lines:
        done = specdec("--cfg", "job", *shlex.split(line))
        assert done.code == 0, (line, done.err)
    assert "- token_recycling" in specdec("--cfg", "job", "experiment=demo").out


def test_the_version_is_our_own(specdec: CommandLine) -> None:
    done = specdec("--version")
    packaged = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
    assert done.code == 0
    assert done.out.startswith(f"specdec {packaged}, torch {torch.__version__}, Hydra ")
    assert contents(specdec.folder) == []


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["drafter=wrong"], ["drafter=wrong does not exist; there are eagle, eagle3, hybrid, hydra, layer_skip"]),
        (["experiment=wrong"], ["experiment=wrong does not exist; there are demo"]),
        (["drafters=[ngram,wrong]"], ["'wrong'", "eagle3, hybrid, hydra, layer_skip"]),
        (["sampling.temprature=1"], ["sampling.temprature is not a key", "temperature, top_k, top_p"]),
        (["+foo=1"], ["foo is not a key of the config; it has sampling, max_new_tokens", "drafter", "run_dir"]),
        (["+structure=dynamic"], ["structure is not a key of the config"]),
        (["+drafter.typo=3"], ["unexpected keyword argument 'typo'"]),
        (["drafters=[ngram"], ["'drafters=[ngram' is not KEY=VALUE"]),
        (["dataset.tasks=[qa"], ["'dataset.tasks=[qa' is not KEY=VALUE: close every bracket and quote"]),
        (["trian"], ["'trian' is not KEY=VALUE: the one word alone is `train`"]),
        (["drafter=ngram,suffix"], ["add --multirun"]),
        (
            ["tracking.mode=offline"],
            ["tracking.mode is not a key of the config; tracking has no keys, as it is chosen"],
        ),
        (["structure=dynamic"], ["structure is no choice of this config; ", "structure@drafter.structure=NAME"]),
        (["structure=dynamic", "drafter=layer_skip"], ["but structure@drafter.structure is: use"]),
        (["structure@drafter.structure=dynamic"], ["drafter, as it is chosen, has no structure; leave structure out"]),
        (["batch_size=true"], ["batch_size=True must be a whole number of at least 1"]),
        (["seed=x"], ["seed='x' must be a whole number from 0 to 2147483647"]),
        (["seed=-1"], ["seed=-1 must be a whole number from 0"]),
        (["seed=2147483647", "passes=2"], ["seed=2147483647 must be a whole number from 0 to 2147483646"]),
        (["baseline=perhaps"], ["baseline='perhaps' must be true or false"]),
        (["sampling.temperature=hot"], ["sampling.temperature='hot' must be a number"]),
        (["drafter.num_draft_tokens=many"], ["drafter.num_draft_tokens='many' must be a whole number"]),
        (["drafter=suffix", "drafter.tree=no"], ["drafter.tree='no' must be true or false"]),
        (["dataset.limit=many"], ["dataset.limit='many' must be a whole number or null"]),
        (["dataset=jsonl"], ["dataset.path has no value: give it one"]),
        (["dataset.tasks=[wrong]"], ["no task 'wrong'", "summarization"]),
        (["tracking=wandb", "tracking.mode=cloud"], ["'cloud'", "offline"]),
        (["run_dir=/proc/nowhere"], ["/proc/nowhere"]),
        (
            ["drafters=[ngram,token_recycling]", "drafter.max_ngram=2"],
            ["drafter.max_ngram is not a key", "of token_recycling"],
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    specdec: CommandLine, overrides: list[str], words: list[str]
) -> None:
    check_mistake(specdec("debug=quick", *overrides), *words)
    assert not [path for path in specdec.folder.rglob("*") if path.is_file()]
    assert not list(specdec.folder.glob("runs/*"))


def test_a_typo_in_a_file_is_a_mistake_too(specdec: CommandLine) -> None:
    (specdec.folder / "mine/experiment").mkdir(parents=True)
    (specdec.folder / "mine/experiment/typo.yaml").write_text("# @package _global_\nmax_new_token: 5\n")
    check_mistake(
        specdec("--config-dir=mine", "debug=quick", "experiment=typo"),
        "max_new_token is not a key of the config", "max_new_tokens",
    )  # fmt: skip
    check_mistake(specdec("train", "target=toy", "tracking=none", "+steps=5"), "steps is not a key", "data, training")


def test_a_drafter_that_is_not_trained(specdec: CommandLine) -> None:
    words = "drafter=ngram is not trained; those that are: eagle, eagle3, hydra, medusa, small_model"
    check_mistake(specdec("train", "debug=quick", "drafter=ngram"), words)


def test_no_word_of_the_parser_reaches_the_user(specdec: CommandLine) -> None:
    for wrong in ("run", "a.b=[", "+drafter.a", "a='b", "drafters=[ngram"):
        done = specdec("debug=quick", wrong)
        check_mistake(done, "is not KEY=VALUE: ")
        assert not any(word in done.err for word in ("viable", "mismatched", "token recognition", "parsing", "Hydra"))


def test_a_key_of_the_constructor_may_be_added(specdec: CommandLine) -> None:
    assert specdec(*QUICK, "+target.vocab_size=300", "run_dir=r").code == 0


def test_a_fault_of_the_code_keeps_its_traceback(specdec: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only mistakes become sentences: a researcher needs to see where the own drafter breaks."""

    def broken(self: object, **_: object) -> None:
        raise ZeroDivisionError("in the drafter")

    monkeypatch.setattr("specdec.drafter.ngram.NGram.__init__", broken)
    with pytest.raises(ZeroDivisionError, match="in the drafter"):
        specdec(*QUICK)


def test_a_folder_of_another_config_is_refused(specdec: CommandLine) -> None:
    assert specdec(*QUICK, "run_dir=r").code == 0
    check_mistake(specdec(*QUICK, "run_dir=r", "seed=1"), "r was started with another config: config.seed: 0 -> 1")
    assert "r is done already" in specdec(*QUICK, "run_dir=r", "tracking=none").out


# ---- interruptions ---------------------------------------------------------------------------------------------------


def interrupt(specdec: CommandLine, how: signal.Signals, *arguments: str) -> tuple[subprocess.Popen[str], str, Path]:
    """Half-way, in the fourth of six requests. What follows in the test is not held."""
    process = specdec.start(*arguments)
    try:
        specdec.wait_for(process, held.HERE)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    (specdec.folder / held.GO).touch()
    (trace,) = specdec.folder.glob("**/trace.jsonl")
    return process, err, trace


def check_whole(specdec: CommandLine, trace: Path, before: list[dict[str, object]]) -> None:
    rows = specdec.rows(trace)
    assert rows[: len(before)] == before
    keys = [(row["drafter"], row["request"]) for row in rows]
    assert sorted(keys) == sorted((name, request) for name in ("none", "ngram") for request in range(3))
    assert all(row["equal_to_plain"] for row in rows)
    assert (trace.parent / "DONE").exists()


def test_ctrl_c_says_how_to_go_on(specdec: CommandLine) -> None:
    process, err, trace = interrupt(specdec, signal.SIGINT, *HELD)
    folder = trace.parent.relative_to(specdec.folder)
    before = specdec.rows(trace)
    assert len(before) == held.ROWS
    assert process.returncode == 130
    assert err.splitlines() == [
        f"specdec: interrupted; what was finished is kept. To go on: the same command with run_dir={folder}"
    ]
    assert not (trace.parent / "DONE").exists()
    assert specdec(*HELD, f"run_dir={folder}").code == 0
    check_whole(specdec, trace, before)


def test_a_killed_sweep_goes_on(specdec: CommandLine) -> None:
    command = ["-m", *HELD, "drafter.num_draft_tokens=1,2"]
    _, _, trace = interrupt(specdec, signal.SIGKILL, *command)
    before = specdec.rows(trace)
    assert len(before) == held.ROWS
    assert specdec(*command).code == 0
    check_whole(specdec, trace, before)
    assert len(list(specdec.folder.glob("runs/sweep/*/DONE"))) == 2


def test_ctrl_c_stops_a_whole_sweep(specdec: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("specdec.experiment.Experiment._decode", stop)
    done = specdec("-m", *QUICK, "drafter.num_draft_tokens=1,2")
    assert done.code == 130
    assert done.err == "specdec: interrupted; what was finished is kept. To go on: the same command\n"
    assert len(list(specdec.folder.glob("runs/sweep/*/config.yaml"))) == 1
