"""The README does what it says: its files are written out, its commands and Python run as they stand."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser

from specdec.analysis import CELLS
from specdec.testing import ConformanceError, check_verifier

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
FILES = {body.split()[1]: body for _, body in BLOCKS if body.startswith("# my_methods/")}
PYTHON = [body for language, body in BLOCKS if language == "python" and body not in FILES.values()]
LINES = [line for language, body in BLOCKS if language == "sh" for line in body.splitlines()]
COMMANDS = [line for line in LINES if re.search(r"(^| |-m )specdec( |$)", line)]
EXAMPLES = [line for line in COMMANDS if "my_methods" in line]


def shell(line: str, place: Path) -> str:
    """Run a line of the README; its output."""
    environment = {
        **os.environ,
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    done = subprocess.run(
        ["bash", "-c", line], cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's files, a `specdec` command and a finished run."""
    folder = tmp_path_factory.mktemp("readme")
    for name, body in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
    command = folder / "bin" / "specdec"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{ROOT}" exec {sys.executable} -m specdec "$@"\n')
    command.chmod(0o755)
    first = next(line for line in COMMANDS if "run_dir=runs/first" in line)
    shell(f"{first.partition('#')[0]} debug=quick", folder)
    sweep = folder / "runs" / "sweep"
    for cell in ("one", "two"):
        shutil.copytree(folder / "runs" / "first", sweep / cell)
    cells = [
        {"number": i, "cell": cell, "done": True, "settings": {"drafter.num_draft_tokens": i}}
        for i, cell in enumerate(("one", "two"))
    ]
    (sweep / CELLS).write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """There, with my_methods importable."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place / "my_methods")
    for name in ("mine", "relaxed"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return place


def test_the_example_has_the_files_it_needs() -> None:
    assert set(FILES) == {
        "my_methods/mine.py", "my_methods/drafter/mine.yaml", "my_methods/relaxed.py", "my_methods/verifier/relaxed.yaml",
    }  # fmt: skip
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize(
    "names", [("mine.py", "drafter/mine.yaml"), ("relaxed.py", "verifier/relaxed.yaml")], ids=["drafter", "verifier"]
)
def test_a_method_takes_under_forty_lines(names: tuple[str, str]) -> None:
    assert sum(len(FILES[f"my_methods/{name}"].splitlines()) for name in names) < 40


@pytest.mark.parametrize("command", EXAMPLES, ids=["drafter", "with a verifier"])
def test_the_examples_run(command: str, place: Path) -> None:
    """From another folder, as written."""
    before = set(place.glob("runs/*/"))
    output = shell(command, place)
    (run,) = set(place.glob("runs/*/")) - before
    assert (run / "DONE").exists()
    rows = [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]
    mine = [row for row in rows if row["drafter"] == "mine"]
    assert sum(map(sum, (row["num_accepted"] for row in mine))) > 0
    if "relaxed" in command:
        assert {row["drafter"] for row in rows} == {"none", "mine", "ngram"}
        assert [row["lossless"] for row in rows] == [row["drafter"] == "none" for row in rows]
        assert "mine (lossy)" in output
    else:
        assert all(row["lossless"] and row["equal_to_plain"] for row in mine)


@pytest.mark.parametrize("number", range(len(PYTHON)))
@pytest.mark.usefixtures("inside")
def test_python_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Each block as written, but for the model."""
    body = PYTHON[number].replace('"target=smollm2"', '"target=toy"')
    exec(compile(body, f"README.md, Python block {number + 1}", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


@pytest.mark.usefixtures("inside")
def test_the_example_verifier_is_rightly_lossy() -> None:
    """Control: claiming more than it holds is found out."""
    from relaxed import Relaxed  # type: ignore[import-not-found]

    rule: Any = Relaxed()
    assert not check_verifier(rule, rows=2000).lossless
    rule.lossless = True
    with pytest.raises(ConformanceError):
        check_verifier(rule, rows=2000)


# ---- what the text names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [line for line in COMMANDS if "my_methods" not in line])
def test_commands_compose(command: str) -> None:
    """The config of every command, with the first value of what it sweeps."""
    words = shlex.split(command.removeprefix("torchrun --nproc-per-node 2 -m "), comments=True)
    assert words.pop(0) == "specdec"
    name = words.pop(0) if words[0] == "train" else "config"
    overrides = []
    for override in OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")]):
        if override.is_sweep_override():
            assert "-m" in words
            overrides.append(f"{override.get_key_element()}={next(override.sweep_string_iterator())}")
        else:
            overrides.append(str(override.input_line))
    with initialize_config_module("specdec.conf", version_base="1.3"):
        assert "drafter" in compose(name, overrides=overrides)


@pytest.mark.parametrize("group", ["drafter", "verifier"])
def test_each_method_is_in_its_table(group: str) -> None:
    heading, _, rows = README.partition(f"\n| {group} |")[2].partition("\n")
    named = re.findall(r"^\| `(\w+)` \|", rows.partition("\n\n")[0], re.MULTILINE)
    assert heading
    assert sorted(named) == sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def test_links_and_targets_exist() -> None:
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for link in re.findall(r"\]\(([^)]+)\)", text):
            assert link.startswith("https://") or (ROOT / link.partition("#")[0]).exists(), link
        cited = set(re.findall(r"(?<!\])\[(\d{4}\.\d{5})\](?!:)", text))
        assert cited == set(re.findall(r"^\[(\d{4}\.\d{5})\]: https://arxiv.org/abs/\1$", text, re.MULTILINE))
        makefile = (ROOT / "Makefile").read_text()
        for target in re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert README.count("<!-- demo-table -->") == README.count("<!-- /demo-table -->") == 1
