"""Trained heads: where they lie, and from their folder to a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.nn.head import draft_ids
from specdec.types import DraftInputs
from specdec.weights import checkpoint as checkpoints

__all__ = [
    "HEADS",
    "check_embedding",
    "features_of",
    "find_head",
    "last_features",
    "load_head",
    "operations",
    "read_config",
]

Config = TypeVar("Config")
Module = TypeVar("Module", bound=torch.nn.Module)

HEADS = Path(__file__).parents[1] / "heads"  # what ships
_ROWS = 1 << 13  # of an embedding, compared in one go


def find_head(name: str | Path) -> Path:
    """The folder of that name, else the shipped head of that name, else the Hub repository (OWNER/NAME)."""
    for folder in (Path(name).expanduser(), HEADS / name):
        if folder.is_dir():
            return folder
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return checkpoints.resolve(name)
    shipped = sorted(path.parent.name for path in HEADS.glob("*/config.json"))
    raise ValueError(
        f"drafter.checkpoint={name} is neither a folder, nor a head that ships ({', '.join(shipped) or 'none does'}), nor "
        "OWNER/NAME on the Hub: give the folder of a trained head, or make one with `specdec train`"
    )


def read_config(folder: Path, parse: Callable[[Mapping[str, Any]], Config], kind: str) -> Config:
    """A head's config.json."""
    try:
        return parse(checkpoints.read_config(folder))
    except ValueError as error:
        raise ValueError(f"{folder} holds no {kind} head: {error}") from error


def load_head(
    make: Callable[[Any, torch.dtype], Module],
    config: Any,
    folder: Path,
    target: Any,
    rename: Callable[[str], str | None] = lambda name: name,
) -> Module:
    """A head's weights, in the dtype and on the device of the target. ValueError: not what the config describes.

    rename: a tensor's name in the file to the module's, None to leave it out.
    """
    table: Tensor = target.embed
    named = ((rename(name), tensor) for name, tensor in checkpoints.iter_tensors(folder))
    tensors = {name: tensor for name, tensor in named if name is not None}
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


def check_embedding(folder: Path, target: Any) -> None:
    """ValueError where a head brings an embedding, and it is not the target's: it was made for another target."""
    for name, tensor in checkpoints.iter_tensors(folder):
        if name == "embed_tokens.weight":
            ours: Tensor = target.embed
            if tensor.shape != ours.shape:
                how = f"in shape, {list(tensor.shape)} and {list(ours.shape)}"
            elif not (apart := _distance(tensor.read(), ours)) <= 0.01:  # NaN is no match either
                how = f"by {apart:.0%}, and 1% is taken for rounding"
            else:
                continue
            raise ValueError(
                f"the head in {folder} brings an embed_tokens.weight that differs from the target's {how}: it was made for "
                "another target, take one that was trained for this"
            )


def _distance(theirs: Tensor, ours: Tensor) -> float:
    """|theirs - ours| / |ours|, where ours lies and in parts: f32 copies of a large table may not fit beside the model."""
    sums = torch.zeros(2, device=ours.device)
    for a, b in zip(torch.split(theirs, _ROWS), torch.split(ours, _ROWS), strict=True):
        b = b.float()
        sums += torch.stack([(a.to(b) - b).square().sum(), b.square().sum()])
    return float((sums[0] / sums[1]).sqrt())


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
