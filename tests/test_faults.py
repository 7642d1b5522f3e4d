"""What can go wrong outside the code: each is one sentence with the values and the remedy, and no measurement is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import wandb
from command import QUICK, CommandLine, check_mistake
from safetensors.torch import load_file, save_file

from specdec.target.toy import Toy
from specdec.tracking.run_folder import RunFolder

CHECKPOINT = ["target=llama", "target.checkpoint=tiny", "target.dtype=float32"]


# ---- weights ---------------------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def another_model(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "mamba"}))


def half_a_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", ')


def one_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors")


def one_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def one_too_many(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.extra.weight": torch.zeros(2)}, folder / "model.safetensors")


def wrong_shape(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vocab_size": values["vocab_size"] + 8}))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, ["model.safetensors is damaged or cut short", "fetch the checkpoint again"]),
        (garble, ["model.safetensors is damaged or cut short", "fetch the checkpoint again"]),
        (remove, ["tiny has no weights", "safetensors only"]),
        (pickle_only, ["tiny has only pytorch_model.bin", "safetensors only: convert it"]),
        (without_config, ["tiny has no config.json: name a whole"]),
        (
            another_model,
            ["'mamba' is not one this runtime computes (llama, qwen3, llama4, llama4_text)", "target=huggingface"],
        ),
        (half_a_config, ["config.json is not valid JSON", "fetch the checkpoint again"]),
        (one_nan, ["model.norm.weight holds NaN", "the checkpoint is corrupt, fetch it again"]),
        (one_missing, ["lacks model.norm.weight"]),
        (one_too_many, ["has in excess model.extra.weight"]),
        (wrong_shape, ["in the checkpoint but", "in the model"]),
    ],
)
def test_weights_that_cannot_be_used(
    specdec: CommandLine, tiny_llama: Path, harm: Callable[[Path], None], words: list[str]
) -> None:
    shutil.copytree(tiny_llama, specdec.folder / "tiny")
    harm(specdec.folder / "tiny")
    check_mistake(specdec(*QUICK, *CHECKPOINT), *words)


def test_a_checkpoint_that_is_nowhere(specdec: CommandLine) -> None:
    words = "nowhere/at/all", "folder"
    check_mistake(specdec(*QUICK, "target=llama", "target.checkpoint=nowhere/at/all"), *words)


def test_a_checkpoint_without_a_tokenizer_cannot_take_a_dataset_of_text(specdec: CommandLine, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, specdec.folder / "tiny")
    check_mistake(specdec(*QUICK, *CHECKPOINT), "the checkpoint folder has no tokenizer")


def test_a_failed_start_binds_nobody_to_its_config(specdec: CommandLine) -> None:
    """After a mistake the same folder can be used with what was put right: nothing was measured yet."""
    check_mistake(specdec(*QUICK, "target.device=cuda:99", "run_dir=r"), "cuda:99")
    assert specdec(*QUICK, "run_dir=r").code == 0


# ---- prompts and vocabularies ----------------------------------------------------------------------------------------


def test_a_question_longer_than_the_model_is_found_before_anything_runs(specdec: CommandLine) -> None:
    long = {"question_id": "q7", "category": "qa", "turns": ["word " * 900]}
    short = {"question_id": "q1", "category": "chat", "turns": ["hello"]}
    Path("questions.jsonl").write_text(json.dumps(short) + "\n" + json.dumps(long) + "\n")
    done = specdec(*QUICK, "dataset=jsonl", "dataset.path=questions.jsonl", "run_dir=r")
    check_mistake(done, "question q7 has 4503 tokens", "max_new_tokens=8", "the model's 4096 positions", "leave it out")
    assert specdec.rows("r/trace.jsonl") == []


def test_a_later_turn_that_does_not_fit_names_its_question(specdec: CommandLine) -> None:
    """How long a conversation grows is only known when it has been answered; what was measured stays."""
    turns = ["word " * 410, "word " * 410]
    Path("questions.jsonl").write_text(json.dumps({"question_id": "q7", "category": "qa", "turns": turns}) + "\n")
    done = specdec(*QUICK, "dataset=jsonl", "dataset.path=questions.jsonl", "run_dir=r")
    check_mistake(done, "question q7: prompt and new tokens need 41", "the model has 4096")
    assert [row["turn"] for row in specdec.rows("r/trace.jsonl")] == [0, 0]


def test_a_draft_model_of_another_vocabulary(specdec: CommandLine) -> None:
    model = ["drafter=small_model", "target@drafter.model=toy", "+drafter.model.vocab_size=16"]
    check_mistake(specdec(*QUICK, *model), "the draft model has 16 token ids, the target 260; choose")


def test_logits_that_are_nan_stop_the_run(specdec: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that load well can still overflow: no row of garbage is written."""
    build = Toy.__init__

    def overflowing(self: Toy, **options: object) -> None:
        build(self, **options)  # type: ignore[arg-type]
        self.model.embedding[ord("e")] = torch.nan

    monkeypatch.setattr(Toy, "__init__", overflowing)
    check_mistake(specdec(*QUICK, "run_dir=r"), "the target's logits are NaN after a prompt of", "target.dtype=float32")
    assert specdec.rows("r/trace.jsonl") == []


# ---- disk and network ------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_every_finished_row(specdec: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    write = RunFolder._write

    def full(self: RunFolder, line: bytes) -> None:
        if len(self.finished()) == 3:
            os.write(self._trace.fileno(), line[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_write", full)
        done = specdec(*QUICK, "run_dir=r")
    check_mistake(done, "r: the disk is full; 3 finished rows are kept", "free some space and run the same command")
    before = specdec.rows("r/trace.jsonl")
    assert len(before) == 3
    assert specdec(*QUICK, "run_dir=r").code == 0
    rows = specdec.rows("r/trace.jsonl")
    assert rows[:3] == before
    assert len(rows) == 4


def test_a_disk_that_is_full_from_the_start(specdec: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("specdec.tracking.run_folder.write_atomic", full)
    check_mistake(specdec(*QUICK, "run_dir=r"), "r: the disk is full", "free some space")


@pytest.mark.parametrize("error", [wandb.errors.CommError("service is down"), ConnectionError("refused")])
def test_an_outage_of_wandb_does_not_cost_the_run(
    specdec: CommandLine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def down(**_: object) -> None:
        raise error

    monkeypatch.setattr(wandb, "init", down)
    done = specdec(*QUICK, "tracking=wandb", "tracking.mode=online", "run_dir=r")
    assert done.code == 0
    assert done.err == f"specdec: no W&B copy of r ({error}); the run itself is complete\n"
    assert (specdec.folder / "r/DONE").exists()
    assert len(specdec.rows("r/trace.jsonl")) == 4


def test_a_trace_that_was_edited_is_named(specdec: CommandLine) -> None:
    assert specdec(*QUICK, "run_dir=r").code == 0
    Path("r/DONE").unlink()
    lines = Path("r/trace.jsonl").read_text().splitlines()
    Path("r/trace.jsonl").write_text("\n".join([lines[0], "{oops", *lines[2:]]) + "\n")
    check_mistake(specdec(*QUICK, "run_dir=r"), "r/trace.jsonl, line 2 is not JSON", "remove that line to go on")
