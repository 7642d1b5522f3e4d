"""Where a training run stands, on disk: weights and moments as safetensors, the rest as JSON, whole or not at all.

RUN/checkpoints/step-00000500/{head.safetensors, optimizer.safetensors, state.json}; the last two are kept. Nothing in training
draws random numbers but by (seed, epoch), so step and place in the data are all the state there is besides the tensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["Standing", "latest", "restore", "save", "write_folder"]

KEPT = 2  # newest and the one before, should the disk have damaged the newest
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class Standing:
    """What is behind a run."""

    step: int = 0  # optimizer steps
    epoch: int = 0
    batch: int = 0  # batches of this epoch
    tokens: int = 0  # of the text, read so far


def save(folder: Path, head: nn.Module, optimizer: torch.optim.Optimizer, standing: Standing) -> Path:
    """Write the checkpoint of a step and let older ones go."""
    named = head.named_parameters()
    moments = {f"{kind}.{name}": optimizer.state[parameter][kind] for name, parameter in named for kind in MOMENTS}
    place = folder / f"step-{standing.step:08d}"
    files = {"head.safetensors": head.state_dict(), "optimizer.safetensors": moments}
    write_folder(place, files, {"state.json": json.dumps(asdict(standing)) + "\n"})
    for old in _all(folder)[:-KEPT]:
        shutil.rmtree(old)
    return place


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, if there is one."""
    found = _all(folder)
    return found[-1] if found else None


def restore(place: Path, head: nn.Module, optimizer: torch.optim.Optimizer) -> Standing:
    """Put a checkpoint back into a head and its optimizer. ValueError: damaged, or of another head."""
    try:
        weights, moments = (load_file(place / f"{name}.safetensors") for name in ("head", "optimizer"))
        standing = Standing(**json.loads((place / "state.json").read_text()))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{place} is damaged ({error}): delete it to go on from the checkpoint before it") from error
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{place} holds another head ({reason}): choose another run_dir") from error
    for name, parameter in head.named_parameters():
        state: dict[str, Tensor] = {kind: moments[f"{kind}.{name}"].to(parameter.device) for kind in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(standing.step)), **state}
    return standing


def write_folder(place: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> None:
    """A folder of safetensors and text files that appears whole or not at all; one of that name is replaced."""
    unfinished = place.with_name(f".{place.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, content in tensors.items():
        save_file({key: value.detach().cpu().contiguous() for key, value in content.items()}, unfinished / name)
    for name, text in texts.items():
        (unfinished / name).write_text(text)
    for path in unfinished.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if (
        place.exists()
    ):  # two renames: a kill between them leaves the old folder under its other name, and no half of one
        replaced = place.with_name(f".{place.name}.old")
        shutil.rmtree(replaced, ignore_errors=True)
        place.rename(replaced)
        unfinished.rename(place)
        shutil.rmtree(replaced)
    else:
        unfinished.rename(place)


def _all(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))
