"""Trained heads: where they lie, and from their folder to a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.nn.eagle import draft_ids
from specdec.types import DraftInputs
from specdec.weights import checkpoint as checkpoints

__all__ = ["HEADS", "features_of", "find_head", "last_features", "load_head", "operations", "read_config"]

Config = TypeVar("Config")
Module = TypeVar("Module", bound=torch.nn.Module)

HEADS = Path(__file__).parents[1] / "heads"  # what ships


def find_head(name: str | Path) -> Path:
    """The folder of that name, else the shipped head of that name."""
    for folder in (Path(name).expanduser(), HEADS / name):
        if folder.is_dir():
            return folder
    shipped = sorted(path.parent.name for path in HEADS.glob("*/config.json"))
    raise ValueError(
        f"drafter.checkpoint={name} is neither a folder nor a head that ships ({', '.join(shipped) or 'none does'}): "
        "give the folder of a trained head, or make one with `specdec train`"
    )


def read_config(folder: Path, parse: Callable[[Mapping[str, Any]], Config], kind: str) -> Config:
    """A head's config.json."""
    try:
        return parse(checkpoints.read_config(folder))
    except ValueError as error:
        raise ValueError(f"{folder} holds no {kind} head: {error}") from error


def load_head(make: Callable[[Any, torch.dtype], Module], config: Any, folder: Path, target: Any) -> Module:
    """A head's weights, in the dtype and on the device of the target. ValueError: not what the config describes."""
    table: Tensor = target.embed
    tensors = dict(checkpoints.iter_tensors(folder))
    missing = [name for name in ("d2t", "t2d") if config.is_reduced and name not in tensors]
    if missing:
        raise ValueError(
            f"{folder} lacks {' and '.join(missing)}, and its config.json has draft_vocab_size {config.draft_vocab_size} of "
            f"vocab_size {target.config.vocab_size}: export the head with both, or without a draft vocabulary"
        )
    with table.device:
        model = make(config, table.dtype)
    try:
        checkpoints.load_state(model, tensors.items())
        if config.is_reduced:
            draft_ids(model.d2t, model.t2d)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"the head in {folder} is not what its config.json describes: {error}") from error
    return model


def operations(target: Any, config: Any) -> Any:
    """What a head of these sizes computes with beside the target."""
    return target.operations(config) if hasattr(target, "operations") else reference


def features_of(inputs: DraftInputs, target: Any, taps: Any) -> Tensor:
    """The target's features [B, max_new, F]; ValueError where it gives none."""
    if inputs.features is None:
        raise ValueError(
            f"the head drafts from the target's layers {list(taps)}, and {type(target).__name__} gives no features: use "
            "target=llama"
        )
    return inputs.features


def last_features(inputs: DraftInputs, features: Tensor) -> Tensor:
    """Those of every row's last committed token. [B, max_new, F] -> [B, F]."""
    last = (inputs.num_new - 1).clamp(min=0).long()
    return features.gather(1, last[:, None, None].expand(-1, -1, features.shape[-1])).squeeze(1)
