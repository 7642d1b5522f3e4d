"""Reading Hugging Face checkpoints: safetensors only, one mapped tensor at a time, strict about every key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

__all__ = [
    "check_loaded",
    "fill_nan",
    "iter_tensors",
    "load_into",
    "load_state",
    "open_safetensors",
    "read_config",
    "resolve",
]

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]  # no pickles, no code
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CHUNK = 1 << 24  # elements looked at in one go, so that checking a huge tensor needs no copy of it


def resolve(name_or_dir: str | Path) -> Path:
    """Folder of a checkpoint: a local folder as it is, else the Hub repository of that name, downloaded once."""
    folder = Path(name_or_dir).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_dir)
    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except HFValidationError as error:
        raise ValueError(f"there is no checkpoint folder {name}, nor can it be the name of a Hub repository") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{name} is neither a folder nor a Hub repository that can be downloaded now ({type(error).__name__}): "
            "check the name and the network, or give the path of a downloaded folder"
        ) from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checkpoint's config.json."""
    return _read_json(Path(folder) / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: name a whole Hugging Face checkpoint folder")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}: fetch the checkpoint again")
    return value


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A memory-mapped safetensors file; damage found on opening or reading becomes one ValueError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: fetch the checkpoint again") from error
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}): delete it and fetch the checkpoint again"
        ) from error


def iter_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in a checkpoint, single or sharded, on the CPU, one at a time, memory-mapped."""
    for path, expected in _shards(Path(folder)):
        with open_safetensors(path) as file:
            names = set(file.keys())
            if expected is not None and names != expected:
                odd = _few(names ^ expected)
                raise ValueError(f"{path} and {_INDEX} disagree about {odd}: fetch the checkpoint again")
            for name in sorted(names):
                yield name, file.get_tensor(name)


def _shards(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """The safetensors files of a folder, each with the names the index promises (None: there is no index)."""
    if (folder / _INDEX).is_file():
        weight_map: dict[str, str] = _read_json(folder / _INDEX).get("weight_map", {})
        shards: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(Path(file).name, set()).add(name)
        if not shards:
            raise ValueError(f"{folder / _INDEX} lists no tensors: fetch the checkpoint again")
        return [(folder / file, shards[file]) for file in sorted(shards)]
    if (folder / _SINGLE).is_file():
        return [(folder / _SINGLE, None)]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    found = f"only {pickled[0]}" if pickled else "no weights"
    raise ValueError(f"{folder} has {found}; safetensors only: convert it or use a safetensors revision")


def fill_nan(module: nn.Module) -> None:
    """Make every floating-point parameter NaN, so that one that is never loaded cannot go unseen."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)


def check_loaded(module: nn.Module) -> None:
    """ValueError naming the parameters that hold NaN: never loaded in full, or corrupt in the checkpoint."""
    bad = [name for name, parameter in module.named_parameters() if _has_nan(parameter.detach())]
    if bad:
        raise ValueError(f"{_few(bad)} hold NaN after loading: the weights are corrupt or were not loaded in full")


def load_state(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors into a module's parameters and persistent buffers by exact name, cast to their dtype and device.

    Strict: ValueError naming a few keys on missing, leftover, repeated or wrong-shape ones, and on NaN. Of tied
    parameters one name is enough.
    """
    state = module.state_dict(keep_vars=True)
    seen: set[str] = set()
    leftover: list[str] = []
    for name, tensor in tensors:
        if name not in state:
            leftover.append(name)
            continue
        if name in seen:
            raise ValueError(f"the checkpoint holds {name} twice")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)} in the checkpoint but {list(state[name].shape)} in the model"
            )
        with torch.no_grad():
            state[name].copy_(tensor)
        if _has_nan(state[name].detach()):
            raise ValueError(
                f"{name} holds NaN as loaded to {state[name].dtype}: the checkpoint is corrupt, fetch it again"
            )
        seen.add(name)
    loaded = {id(state[name]) for name in seen}
    missing = [name for name, tensor in state.items() if id(tensor) not in loaded]
    faults = [f"{kind} {_few(names)}" for kind, names in (("lacks", missing), ("has in excess", leftover)) if names]
    if faults:
        raise ValueError(f"the checkpoint does not fit {type(module).__name__}: it {' and '.join(faults)}")


def load_into(module: nn.Module, folder: str | Path, rename: Callable[[str], str | None] = lambda name: name) -> None:
    """Fill a module from a checkpoint folder; `rename` maps a tensor's name to the module's, None to leave it out."""
    fill_nan(module)
    renamed = ((rename(name), tensor) for name, tensor in iter_tensors(folder))
    load_state(module, ((name, tensor) for name, tensor in renamed if name is not None))


def _has_nan(tensor: Tensor) -> bool:
    """In chunks and through float32, because float8 has no isnan."""
    if not tensor.is_floating_point():
        return False
    return any(bool(chunk.float().isnan().any()) for chunk in torch.split(tensor.flatten(), _CHUNK))


def _few(names: Iterable[str], limit: int = 3) -> str:
    """The first names in order and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
