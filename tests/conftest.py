"""What the tests share: a toy target, a checkpoint, the command line, one thread, and no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, at its module's import

from command import CommandLine

from specdec import metrics
from specdec.target.toy import Toy

torch.set_num_threads(1)  # several test processes share the machine


@pytest.fixture(scope="session")
def toy() -> Toy:
    """The seeded toy target on compiled kernels."""
    return Toy()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of one layer; not to be written to."""
    from parity import llama_config, save_model  # transformers takes seconds to import

    folder = tmp_path_factory.mktemp("tiny_llama")
    save_model(llama_config(num_hidden_layers=1), folder)
    return folder


@pytest.fixture
def specdec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line in an empty folder; in this process it draws no picture and resamples little."""
    monkeypatch.setattr("specdec.tracking.run_folder.picture", lambda folder: (folder / "results.png").touch())
    monkeypatch.setattr(metrics, "RESAMPLES", 50)
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Also for a test that changes the number: it is what it was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
