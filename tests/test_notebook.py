"""The notebook runs on a fresh run folder from top to bottom and reaches the answers built into it."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from synthetic_trace import row, rows, write_trace

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "which_drafter.ipynb"


def execute(folder: Path, monkeypatch: pytest.MonkeyPatch, run: Path | None) -> str:
    """All text the notebook puts out, started in `folder`."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("SPECDEC_RUN", raising=False)
    if run is not None:
        monkeypatch.setenv("SPECDEC_RUN", str(run))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    return "\n".join(output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs)


def test_the_notebook_answers_its_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = execute(tmp_path, monkeypatch, write_trace(tmp_path / "some_run", rows(5, 60)))
    assert "some_run: 45 rows" in text
    assert "code: ngram," in text
    assert "draft_model" in text


def test_the_newest_run_is_taken_and_a_baseline_alone_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_trace(tmp_path / "runs" / "today", [row("none", request, [0] * 3, 0) for request in range(2)])
    assert "chat: none, 1.00x" in execute(tmp_path, monkeypatch, None)


def test_a_run_on_a_shared_machine_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = [{**one, "concurrent": True} for one in rows(2, 15)]
    assert "x, clearly" not in execute(tmp_path, monkeypatch, write_trace(tmp_path / "run", trace))


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
