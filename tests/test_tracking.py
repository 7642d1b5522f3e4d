"""A run survives kills, full disks, other configs and W&B outages; what is derived can be derived again."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb
from command import QUICK, CommandLine, check_mistake
from hydra.utils import instantiate
from omegaconf import OmegaConf
from synthetic_trace import row, rows

from specdec import metrics
from specdec.data import Prompts
from specdec.target.toy import Toy
from specdec.tracking import NoTracking, run_folder
from specdec.tracking import wandb as copy
from specdec.tracking.environment import busy_note, busy_share, command, environment, git_state
from specdec.tracking.run_folder import RunError, RunFolder, derive
from specdec.tracking.wandb import WandbTracker, has_api_key

CONF = Path(__file__).parents[1] / "conf" / "tracking"
CONFIG = {"drafter": {"num_draft_tokens": 4}, "seed": 0, "tracking": {"mode": "auto"}}
DERIVED = ["metrics.json", "table.md", "results.png", "trace.parquet"]


def finished_run(folder: Path) -> Path:
    with RunFolder(folder, CONFIG, ["/opt/bin/specdec", "seed=0"]) as run:
        for one in rows(2, 15):
            run.append(one)
        run.finish()
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "run")


def test_config_and_environment_are_there_before_the_first_row(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "run", CONFIG, ["/opt/bin/specdec", "note=two words"]) as run:
        assert OmegaConf.load(run.path / "config.yaml") == CONFIG
        facts = json.loads((run.path / "environment.json").read_text())
        assert facts["command"] == "specdec 'note=two words'"
        assert facts["versions"]["torch"]
        assert run.finished() == set()
        assert not (run.path / "DONE").exists()


def test_interpolations_are_resolved(tmp_path: Path) -> None:
    config = OmegaConf.create({"seed": 3, "again": "${seed}"})
    with RunFolder(tmp_path, config, []):
        assert "again: 3" in (tmp_path / "config.yaml").read_text()
    with RunFolder(tmp_path, {"seed": 3, "again": 3}, []):
        pass


def test_everything_derived_can_be_derived_again(run: Path) -> None:
    assert (run / "DONE").exists()
    before = {name: (run / name).read_bytes() for name in ("metrics.json", "table.md")}
    for name in DERIVED:
        (run / name).unlink()
    summary = derive(run)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert (run / "results.png").stat().st_size > 10_000
    result = json.loads((run / "metrics.json").read_text())
    assert len(result["summary"]) == len(summary)
    assert result["environment"]["command"] == "specdec seed=0"
    assert len(pd.read_parquet(run / "trace.parquet")) == len(metrics.load_trace(run))
    assert "| ngram | code |" in (run / "table.md").read_text()
    assert not list(run.glob("*.part"))


@pytest.mark.filterwarnings("ignore:.*goes on with other values")
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A process is killed with -9 while it writes; the next one repairs the cut line and skips what is there."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from synthetic_trace import row\n"
        "from specdec.tracking.run_folder import RunFolder\n"
        "run = RunFolder(sys.argv[1], {'seed': 0}, [])\n"
        "for request in range(10**6): run.append(row('d', request, [1] * 50, 1))\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    environ = {**os.environ, "PYTHONPATH": str(Path(run_folder.__file__).parents[2])}
    process = subprocess.Popen(arguments, env=environ)
    trace = tmp_path / "trace.jsonl"
    deadline = time.monotonic() + 60
    while not (trace.exists() and trace.stat().st_size > 20_000):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(RunError, match="in use"):
        RunFolder(tmp_path, {"seed": 0}, [])
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = metrics.read_rows(trace)[0]
    with trace.open("ab") as file:
        file.write(b'{"drafter": "d", "requ')
    with RunFolder(tmp_path, {"seed": 0}, []) as run:
        assert run.finished() == {("d", "target_only", request, 0, 0) for request in range(len(whole))}
        run.append(row("d", len(whole), [1], 1))
        with pytest.raises(ValueError, match="already"):
            run.append(row("d", 0, [1], 1))
    assert metrics.load_trace(tmp_path)["request"].tolist() == list(range(len(whole) + 1))
    assert len(json.loads((tmp_path / "environment.json").read_text())["resumed"]) == 1


def test_another_config_is_refused_by_name(run: Path) -> None:
    other = {"drafter": {"num_draft_tokens": 8}, "seed": 0, "extra": 1, "tracking": {"mode": "offline"}}
    with pytest.raises(RunError, match=r"drafter\.num_draft_tokens: 4 -> 8; extra: None -> 1") as caught:
        RunFolder(run, other, [])
    assert "tracking" not in str(caught.value)
    assert OmegaConf.load(run / "config.yaml") == CONFIG
    with RunFolder(run, {**CONFIG, "tracking": {"mode": "offline"}}, []) as again:
        assert len(again.finished()) == 18


def test_a_changed_machine_is_noted(run: Path) -> None:
    (run / "DONE").unlink()  # a run that is done is not gone on with
    facts = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**facts, "cpu": "another"}))
    with pytest.warns(UserWarning, match="other values of cpu"), RunFolder(run, CONFIG, []):
        pass
    noted = json.loads((run / "environment.json").read_text())["resumed"][0]["changed"]
    assert noted["cpu"] == ["another", facts["cpu"]]


def test_a_full_disk_loses_nothing_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(tmp_path, CONFIG, []) as run:
        run.append(row("d", 0, [1], 1))

        def half(line: bytes) -> None:
            os.write(run._trace.fileno(), line[: len(line) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(run, "_write", half)
            with pytest.raises(RunError, match="disk is full; 1 finished rows are kept") as caught:
                run.append(row("d", 1, [1], 1))
        assert str(tmp_path) in str(caught.value)
        assert "free some space" in str(caught.value)
        assert len(metrics.load_trace(tmp_path)) == 1
        run.append(row("d", 1, [1], 1))  # space was made
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            with pytest.raises(RunError, match="every measurement is kept"):
                run.finish()
        assert not (tmp_path / "DONE").exists()
        run.finish()
    assert (tmp_path / "DONE").exists()


def test_a_row_json_cannot_hold_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG, []) as run:
        with pytest.raises(ValueError, match="JSON compliant"):
            run.append(row("d", 0, [1], 1, prefill_seconds=float("nan")))
        assert (tmp_path / "trace.jsonl").read_bytes() == b""


def test_a_trace_of_unknown_origin_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text(json.dumps(row("d", 0, [1], 1)) + "\n")
    with pytest.raises(RunError, match=r"no config\.yaml"):
        RunFolder(tmp_path, CONFIG, [])


def test_environment_holds_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t" * 7)
    facts = environment(["/home/someone/bin/specdec", "a=1"])
    assert "s3cr3t" not in json.dumps(facts)
    assert "/home" not in json.dumps(facts)
    assert git_state(tmp_path) is None
    assert command([]) == ""


def test_a_busy_machine_is_told_from_an_idle_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the ticks between two looks; the run's own wait counts as idle. The table says what is worth saying."""
    looks = iter(["cpu 100 0 100 700 100 0 0 0 50 0\ncpu0 1", "cpu 130 0 110 750 110 0 0 0 99 0\ncpu0 2"])
    monkeypatch.setattr(Path, "read_text", lambda self: next(looks))
    assert busy_share(0.0) == 0.4
    monkeypatch.undo()
    assert 0 <= (busy_share(0.01) or 0) <= 1
    for busy, said in ((0.4, True), (0.05, False), (None, False)):
        monkeypatch.setattr(run_folder, "busy_share", lambda busy=busy: busy)
        folder = tmp_path / str(busy)
        with RunFolder(folder, CONFIG, []) as run:
            facts = json.loads((run.path / "environment.json").read_text())
        assert facts["busy"] == busy
        heading = run_folder._heading(folder, facts)
        assert ("Other programs kept 40% of the processors busy" in heading) == said
    assert "40%" in busy_note({"busy": 0.3}, {"busy": None, "resumed": [{"busy": 0.4}]})
    assert busy_note() == ""


def test_what_the_speeds_suffered_goes_with_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "busy_share", lambda: 0.4)
    assert "40% of the processors busy" in derive(finished_run(tmp_path / "run")).attrs["note"]


def test_a_picture_that_fails_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise ValueError("cannot convert float NaN to integer")

    monkeypatch.setattr(run_folder, "picture", fail)
    with pytest.warns(UserWarning, match="complete but for its picture.*float NaN"):
        run = finished_run(tmp_path / "run")
    assert (run / "DONE").exists()
    assert (run / "table.md").exists()


def test_a_run_without_a_decode_step_is_finished(tmp_path: Path) -> None:
    """Every answer ended with its prefill: max_new_tokens=1, or a stop at once."""
    with RunFolder(tmp_path / "run", CONFIG, []) as run:
        for name in ("none", "d"):
            run.append(row(name, 0, [], 2))
        run.finish()
    assert {*DERIVED, "DONE"} <= {path.name for path in run.path.iterdir()}


def test_what_was_said_is_there_to_read_once(specdec: CommandLine) -> None:
    """A line a row of the trace, as it is written; also when a kill came between both files or cut a line."""
    assert specdec(*QUICK, "dataset.tasks=multi_turn", "dataset.limit=1", "run_dir=r").code == 0
    output, trace = specdec.folder / "r/output.jsonl", specdec.folder / "r/trace.jsonl"
    before = specdec.rows("r/output.jsonl")
    assert [(one["drafter"], one["turn"]) for one in before] == [(d, t) for t in (0, 1) for d in ("none", "ngram")]
    (conversation,) = Prompts(tasks="multi_turn", limit=1).load()
    for one, measured in zip(before, specdec.rows("r/trace.jsonl"), strict=True):
        assert one["prompt"] == conversation.turns[one["turn"]]
        assert one["question_id"] == conversation.question_id
        assert one["text"] == Toy().tokenizer.decode(measured["tokens"], skip_special_tokens=True)
        assert one["num_tokens"] == len(measured["tokens"]) == 8
    for kept, lines in ((2, 3), (3, 1)):
        trace.write_text("".join(trace.read_text().splitlines(True)[:kept]))
        output.write_text("".join(output.read_text().splitlines(True)[:lines]) + '{"question')
        (specdec.folder / "r/DONE").unlink()
        assert specdec(*QUICK, "dataset.tasks=multi_turn", "dataset.limit=1", "run_dir=r").code == 0
        assert specdec.rows("r/output.jsonl") == before


def test_questions_that_changed_are_noticed(specdec: CommandLine) -> None:
    """The file has the same path, so the config is the same; yet the trace speaks of other questions."""
    command = [*QUICK, "dataset=jsonl", "dataset.path=questions.jsonl", "run_dir=r"]
    Path("questions.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "task": "b"}\n')
    assert specdec(*command).code == 0
    (specdec.folder / "r/DONE").unlink()
    Path("questions.jsonl").write_text('{"prompt": "one"}\n')
    words = "r holds turn 0 of question 2", "no longer the dataset's question number 1", "another run_dir"
    check_mistake(specdec(*command), *words)
    assert len(specdec.rows("r/trace.jsonl")) == 4


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one with a name of ours in it; what an interrupted run left, be it before its first row, goes on."""
    for name in ("config.yaml", "table.md", "notes"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(RunError, match=f"is no run folder, it holds {name} and no trace.*another run_dir"):
            RunFolder(folder, CONFIG, [])
        assert [path.read_text() for path in folder.iterdir()] == ["mine"]
    with pytest.raises(RunError, match="notes is a file: name a folder"):
        RunFolder(tmp_path / "notes" / "notes", CONFIG, [])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(RunError, match="empty or the current folder: name a folder"):
        RunFolder("", CONFIG, [])
    with RunFolder(tmp_path / "empty", CONFIG, []):
        pass
    with RunFolder("", {**CONFIG, "seed": 1}, []) as run:
        assert run.finished() == set()


def test_git_state_tells_a_changed_tree(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    clean = git_state(tmp_path)
    assert clean is not None
    assert not clean["dirty"]
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {**clean, "dirty": True}


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no netrc, and a host that refuses connections."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}")


@pytest.mark.usefixtures("no_account")
def test_an_offline_copy_is_whole_and_silent(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = WandbTracker(group="g", tags=["t"]).log(run)
    assert record is not None
    files = Path(record) / "files"
    assert (files / "trace.jsonl").read_bytes() == (run / "trace.jsonl").read_bytes()
    assert not any(path.is_symlink() for path in files.rglob("*"))
    assert list((files / "media" / "table").glob("summary*.json"))
    assert list((files / "media" / "images").glob("results*.png"))
    assert list(Path(record).glob("run-*.wandb"))
    assert capfd.readouterr() == ("", "")
    assert "WANDB_DATA_DIR" not in os.environ


def test_the_copy_has_a_number_for_every_method_and_task(tmp_path: Path) -> None:
    """The rates that serving engines log among them, and nll where log-probabilities were kept."""
    for name, kept in (("plain", {}), ("kept", {"logprobs": [-1.0]})):
        with RunFolder(tmp_path / name, CONFIG, []) as run:
            for one in (row("none", 0, [0], 0), row("d", 0, [2, 0], 4)):
                run.append({**one, **kept})
            run.finish()
        (run.path / "results.png").unlink()
        content = copy._content(run.path)
        assert content["d/all/tau"] == 2
        assert content["d/all/acceptance_rate"] == 2 / 8
        assert [content[f"d/all/acceptance_rate/{i}"] for i in (1, 2, 3)] == [0.5, 0.5, 0]
        assert "none/all/acceptance_rate" not in content
        assert ("d/all/nll" in content, "d/all/nll_excess" in content) == (
            (False,) * 2 if name == "plain" else (True,) * 2
        )


@pytest.mark.usefixtures("no_account")
def test_an_outage_leaves_the_record_and_names_the_remedy(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with pytest.warns(UserWarning, match=r"no answer within 3 s.*`wandb sync .*offline-run"):
        record = WandbTracker(timeout=3).log(run)
    assert record is not None
    assert list(Path(record).glob("run-*.wandb"))


@pytest.mark.usefixtures("no_account")
def test_a_sync_that_did_not_finish_is_not_taken_for_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb sync` may end with status 0 although the key was refused."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    with pytest.warns(UserWarning, match="did not finish"):
        WandbTracker(mode="online").log(run)


@pytest.mark.parametrize("error", [wandb.errors.CommError("down"), TimeoutError("slow"), ConnectionError("refused")])
def test_a_failing_init_leaves_the_run_intact(run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(**_: Any) -> None:
        raise error

    before = {path.name: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setattr(wandb, "init", fail)
    with pytest.warns(UserWarning, match=f"no W&B copy of .*{error}.*complete"):
        assert WandbTracker(mode="offline").log(run) is None
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.usefixtures("no_account")
def test_auto_goes_online_only_with_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert WandbTracker()._mode() == "offline"
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password " + "a" * 40)
    assert WandbTracker()._mode() == "online"
    (tmp_path / "netrc").write_text("machine 127.0.0.1 nonsense")
    with pytest.warns(UserWarning, match="stays offline"):
        assert not has_api_key()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert WandbTracker()._mode() == "disabled"
    assert WandbTracker().log(tmp_path) is None


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'cloud'; choose one of auto, online"):
        WandbTracker(mode="cloud")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "kind"), [("none", NoTracking), ("wandb", WandbTracker)])
def test_the_configs_make_trackers(name: str, kind: type, tmp_path: Path) -> None:
    tracker = instantiate(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(tracker, kind)
    if name == "none":
        assert tracker.log(tmp_path) is None
