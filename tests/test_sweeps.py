"""Sweeps: their cells, the table they end with, and their frame in Python."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from command import LEFT, QUICK, CommandLine, contents
from questions import write_questions

from specdec import analysis, metrics, sweep
from specdec.cli import LONGEST_NAME, cell_name
from specdec.tracking.wandb import WandbTracker

TWO = ["-m", *QUICK, "drafter.num_draft_tokens=1,2"]


# ---- cells -----------------------------------------------------------------------------------------------------------


def test_a_finished_cell_is_not_run_again(specdec: CommandLine) -> None:
    assert specdec(*TWO).code == 0
    assert contents(specdec.folder) == ["runs"]
    names = [f"dataset.limit=2,debug=quick,drafter.num_draft_tokens={n},max_new_tokens=8" for n in (1, 2)]
    left = ["cells.jsonl", *names, "multirun.yaml", "results.csv", "table.md"]
    assert contents(specdec.folder / "runs/sweep") == left
    cells = [specdec.folder / "runs/sweep" / name for name in names]
    assert [contents(cell) for cell in cells] == [LEFT, LEFT]

    def state() -> list[tuple[str, int, bytes]]:
        return [(p.name, p.stat().st_mtime_ns, p.read_bytes()) for cell in cells for p in sorted(cell.iterdir())]

    before = state()
    again = specdec(*TWO)
    assert again.code == 0
    assert again.out.count("is done already") == 2
    assert state() == before
    wider = specdec("-m", *QUICK, "drafter.num_draft_tokens=1,2,3")
    assert wider.out.count("is done already") == 2
    assert len(list((specdec.folder / "runs/sweep").glob("*/DONE"))) == 3
    assert state() == before


def test_a_sweep_groups_its_wandb_runs(specdec: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str | None, str]] = []

    def record(self: WandbTracker, folder: Path, group: str | None) -> Path:
        seen.append((group, folder.name))
        return folder / "wandb"

    monkeypatch.setattr(WandbTracker, "_record", record)
    command = [*QUICK, "tracking=wandb", "tracking.mode=offline"]
    assert "W&B: one/wandb" in specdec(*command, "run_dir=one").out
    cells = ["-m", *command, "drafter.num_draft_tokens=1,2", "sweep_dir=runs/lengths"]
    assert specdec(*cells).code == 0
    assert specdec("-m", *command, "seed=1", "tracking.group=mine").code == 0
    names = [f"dataset.limit=2,debug=quick,drafter.num_draft_tokens={n},max_new_tokens=8" for n in (1, 2)]
    last = "dataset.limit=2,debug=quick,max_new_tokens=8,seed=1"  # tracking is no part of a cell's name
    assert seen == [(None, "one"), ("lengths", names[0]), ("lengths", names[1]), ("mine", last)]


def test_cells_have_names_a_file_system_takes() -> None:
    assert cell_name("a=1,b=2") == "a=1,b=2"
    assert cell_name("") == "default"
    assert "/" not in cell_name("dataset.path=/some/where.jsonl")
    long = [cell_name("dataset.path=" + "x" * 300 + end) for end in ("1", "2", "1")]
    assert long[0] != long[1]
    assert long[0] == long[2]
    assert len(long[0]) <= LONGEST_NAME + 13


def test_cells_side_by_side_report_no_speed(specdec: CommandLine) -> None:
    """Hydra's joblib launcher: drafters= composes inside the workers, and what they share is no measure of time."""
    options = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = specdec.start("-m", *options, *QUICK, "drafters=[suffix,ngram],[suffix]")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    traces = sorted(specdec.folder.glob("runs/sweep/*/trace.jsonl"))
    assert len(traces) == 2
    for trace in traces:
        summary = metrics.summary(metrics.load_trace(trace))
        assert summary[["tokens_per_second", "speedup"]].isna().all(axis=None)
        assert summary["tau"].notna().all()
        assert "speed-up" in out
    table = (specdec.folder / "runs/sweep/table.md").read_text()
    assert "| [suffix,ngram] | suffix |" in table
    assert "| [suffix] | suffix |" in table
    assert "fastest" not in table
    assert specdec("-m", *QUICK, "drafters=[suffix,ngram],[suffix]").out.count("is done already") == 2


# ---- the table -------------------------------------------------------------------------------------------------------


def markdown(folder: Path) -> list[list[str]]:
    """The cells of table.md, without its rule."""
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_sweep_ends_with_one_table(specdec: CommandLine) -> None:
    """A row per cell, of what the cell itself measured; again the same when every cell is done already."""
    command = [*TWO, "sampling.temperature=0,0.5"]
    done = specdec(*command)
    assert (done.code, done.err) == (0, "")
    folder = specdec.folder / "runs/sweep"
    header, *rows = markdown(folder)
    assert header == ["num_draft_tokens", "temperature", "drafter", "accept length", "tok/s", "speed-up", "equal", ""]
    assert [row[:3] for row in rows] == [[n, t, "ngram"] for n in "12" for t in ("0.0", "0.5")]
    results = pd.read_csv(folder / "results.csv")
    assert results.columns[:5].tolist() == ["run", "num_draft_tokens", "temperature", "drafter", "verifier"]
    assert results["drafter"].tolist() == ["none", "ngram"] * 4
    (cell,) = folder.glob("*num_draft_tokens=2,*temperature=0")
    measured = json.loads((cell / "metrics.json").read_text())["summary"]
    (own,) = (row for row in measured if (row["drafter"], row["task"]) == ("ngram", "all"))
    (ours,) = results.query("drafter == 'ngram' and num_draft_tokens == 2 and temperature == 0").to_dict("records")
    numbers = ("tau", "speedup", "tokens_per_second")
    assert [ours[name] for name in numbers] == pytest.approx([own[name] for name in numbers])
    assert rows[2][3] == f"{own['tau']:.2f}"
    assert rows[2][5] == f"{own['speedup']:.2f}"  # two requests give no interval
    drafted = results[results["drafter"] == "ngram"].reset_index()
    assert [row[-1] for row in rows].index("fastest") == drafted["speedup"].idxmax()
    assert [row[-1] for row in rows].count("fastest") == 1
    assert sum(line.rstrip().endswith(" fastest") for line in done.out.splitlines()) == 1
    for text in (done.out, (folder / "table.md").read_text()):
        assert sweep.DOUBT in " ".join(text.split())
    assert done.out.splitlines()[-1] == "sweep: runs/sweep/table.md, runs/sweep/results.csv"
    assert max(len(line) for line in done.out.splitlines() if "runs/" not in line) <= 80
    before = [(folder / name).read_bytes() for name in ("table.md", "results.csv")]
    again = specdec(*command)
    assert again.out.count("is done already") == 4
    assert [(folder / name).read_bytes() for name in ("table.md", "results.csv")] == before


def test_the_best_is_beyond_doubt() -> None:
    """Its interval lies above 1 and above every other lossless one's; where one is missing, nothing is beyond doubt."""

    def marks(*rows: tuple[float, float, float], **columns: object) -> list[str]:
        table = pd.DataFrame(rows, columns=["speedup_low", "speedup", "speedup_high"]).assign(
            lossless=True, drafter="d"
        )
        return sweep._marks(table.assign(**columns), "none")

    first, second, near, slow = (1.8, 2.0, 2.2), (1.1, 1.4, 1.7), (1.5, 1.7, 1.9), (0.8, 0.9, 1.0)
    assert marks(second, first) == ["", "best"]
    assert marks(first, near) == ["fastest", ""]
    assert marks(first, (math.nan, 1.4, math.nan)) == ["fastest", ""]
    assert marks((math.nan, 2.0, math.nan), second) == ["fastest", ""]
    assert marks(slow, (0.7, 0.8, 0.85)) == ["fastest", ""]  # than the other, not than plain decoding
    assert marks(first, near, lossless=[True, False]) == ["best", ""]
    assert marks(first, second, lossless=False) == marks(first, second, drafter="none") == ["", ""]
    assert marks(first) == [""]


def test_a_busy_machine_is_told_beside_the_speeds(specdec: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Other programs kept 40% of the processors busy"
    for busy, times in ((0.4, 3), (0.0, 0)):  # after each cell, and after the table
        monkeypatch.setattr("specdec.tracking.run_folder.busy_share", lambda busy=busy: busy)
        done = specdec(*TWO, f"sweep_dir=busy{busy}")
        assert " ".join(done.out.split()).count(said) == times
        assert (said in (specdec.folder / f"busy{busy}/table.md").read_text()) == bool(times)


def test_a_folder_of_two_sweeps_shows_the_last_one(specdec: CommandLine) -> None:
    assert specdec(*TWO).code == 0
    assert specdec("-m", *QUICK, "seed=1,0").code == 0
    header, *rows = markdown(specdec.folder / "runs/sweep")
    assert header[:2] == ["seed", "drafter"]
    assert [row[0] for row in rows] == ["1", "0"]  # as the command has them
    assert specdec(*TWO).code == 0
    assert [row[0] for row in markdown(specdec.folder / "runs/sweep")[1:]] == ["1", "2"]


def test_a_cell_that_fails_stops_neither_the_others_nor_the_table(specdec: CommandLine) -> None:
    done = specdec("-m", *QUICK, "drafter=token_recycling,ngram", "verifier=block")
    assert done.code == 2
    assert "drafter=token_recycling,max_new_tokens=8,verifier=block: block judges chains only" in done.err
    assert "Traceback" not in done.err
    (finished,) = specdec.folder.glob("runs/sweep/*/DONE")
    assert "drafter=ngram" in finished.parent.name
    assert "1 of 2 cells are not done: drafter=token_recycling." in done.out.splitlines()
    assert done.err.splitlines()[-1].startswith("specdec: a cell of the sweep failed, see above")
    folder = specdec.folder / "runs/sweep"
    assert [row[0] for row in markdown(folder)] == ["drafter", "ngram"]
    assert "1 of 2 cells are not done: drafter=token_recycling." in (folder / "table.md").read_text()
    with pytest.warns(UserWarning, match="not done are left out: drafter=token_recycling"):
        assert analysis.load_sweep(folder)["run"].unique().tolist() == ["drafter=ngram"]


def test_a_sweep_without_a_finished_cell_has_no_table(specdec: CommandLine) -> None:
    assert specdec(*TWO).code == 0
    done = specdec("-m", *QUICK, "drafter=token_recycling", "verifier=block,speculative_sampling")
    assert done.code == 2
    assert "2 of 2 cells are not done: verifier=block, verifier=speculative_sampling." in done.out
    folder = specdec.folder / "runs/sweep"
    assert not (folder / "table.md").exists()
    assert not (folder / "results.csv").exists()
    with pytest.warns(UserWarning, match="not done"), pytest.raises(ValueError, match="none of 2 cells is done"):
        analysis.load_sweep(folder)


def test_drafter_and_verifier_stand_in_the_label(specdec: CommandLine) -> None:
    """A lossy rule is marked and never the best; a sweep of one cell has nothing to compare."""
    done = specdec("-m", *QUICK, "verifier=typical,target_only", "drafters=[ngram],[suffix]", "logprobs=true")
    header, *rows = markdown(specdec.folder / "runs/sweep")
    assert header[:2] == ["drafters", "drafter"]
    labels = [f"{name} + {rule}" for rule in ("typical", "target_only") for name in ("ngram", "suffix")]
    assert [row[1] for row in rows] == [f"{label} (lossy)" if "typical" in label else label for label in labels]
    assert [row[-1] for row in rows[:2]] == ["", ""]
    assert "fastest" in (rows[2][-1], rows[3][-1])
    assert header[-3:-1] == ["nll", "nll excess"]
    for row in rows:  # too wide for 80 columns, and whole
        assert re.search(rf"{row[2]} +{row[3]} ", done.out)
        assert row[-2] in done.out
    assert specdec("-m", *QUICK, "sweep_dir=one").code == 0
    header, *rows = markdown(specdec.folder / "one")
    assert [header[0], *rows[0][::7]] == ["drafter", "ngram"]
    assert rows[0][-1] == ""


def test_a_single_run_is_no_sweep(specdec: CommandLine) -> None:
    assert specdec(*TWO, "drafter=wrong").code == 2  # begun, and without a cell
    done = specdec(*QUICK, "run_dir=r")
    assert done.out.splitlines()[-1] == "run folder: r"
    assert not list(specdec.folder.rglob(analysis.CELLS))


def test_a_sweep_in_python(specdec: CommandLine) -> None:
    assert specdec(*TWO, "drafter.structure=null", "drafter=layer_skip", "drafter.exit_layer=1", "seed=0,1").code == 0
    folder = specdec.folder / "runs/sweep"
    frame = analysis.load_sweep(folder)
    assert frame["run"].unique().tolist() == [f"num_draft_tokens={n} seed={s}" for n in (1, 2) for s in (0, 1)]
    assert frame.groupby("num_draft_tokens")["draft_depth"].agg(lambda depths: max(map(max, depths))).tolist() == [1, 2]
    table = analysis.summary(frame[frame["task"] == "chat"])
    assert table.columns[:5].tolist() == ["run", "num_draft_tokens", "seed", "drafter", "verifier"]
    assert table.query("task == 'all' and drafter == 'layer_skip'")["num_draft_tokens"].tolist() == [1, 1, 2, 2]
    assert "num_draft_tokens" not in analysis.summary(analysis.load(next(folder.glob("*/"))))
    with pytest.raises(ValueError, match=r"cells\.jsonl does not exist: name the folder of a sweep"):
        analysis.load_sweep(specdec.folder)


def test_names_are_as_short_as_they_may_be() -> None:
    assert analysis._short_names(
        ["sampling.temperature", "drafter.first.max_ngram", "drafter.second.max_ngram", "data.tokens",
         "structure@drafter.structure", "seed", "drafter"]
    ) == {
        "sampling.temperature": "temperature",
        "drafter.first.max_ngram": "drafter.first.max_ngram",  # two of them
        "drafter.second.max_ngram": "drafter.second.max_ngram",
        "data.tokens": "data.tokens",  # a trace has tokens of its own
        "structure@drafter.structure": "structure",
        "seed": "seed",
        "drafter": "drafter",
    }  # fmt: skip


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_sweep_of_trainings_has_a_table_too(specdec: CommandLine) -> None:
    """With debug=quick, which trains on the toy target; what is asked is a file's, so that the text takes no time."""
    write_questions(specdec.folder / "questions.jsonl", (f"What is {i}?" for i in range(16)), ("a",))
    options = [
        "train", "-m", "debug=quick", "drafter=medusa", "dataset@data.prompts=jsonl", "data.prompts.path=questions.jsonl",
        "data.folder=text", "data.tokens=200", "data.answers.conversations=16", "dataset.limit=1", "max_new_tokens=4",
    ]  # fmt: skip
    done = specdec(*options, "training.steps=1,2")
    assert done.code == 0, done.err
    header, *rows = markdown(specdec.folder / "runs/train/sweep")
    assert [row[:2] for row in [header, *rows]] == [["steps", "drafter"], ["1", "medusa"], ["2", "medusa"]]
    frame = analysis.load_sweep(specdec.folder / "runs/train/sweep")
    assert frame.groupby("drafter")["steps"].unique().map(list).to_dict() == {"none": [1, 2], "medusa": [1, 2]}
