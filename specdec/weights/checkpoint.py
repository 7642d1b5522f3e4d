"""Reading Hugging Face checkpoints: safetensors only, mapped, read in parts, strict about every key before any data."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from specdec.kernels.reference import FP8
from specdec.nn.parallel import Shard
from specdec.weights import convert
from specdec.weights.lazy import Index, LazyTensor

__all__ = [
    "check_loaded",
    "fill_nan",
    "iter_tensors",
    "load_into",
    "load_state",
    "match",
    "open_safetensors",
    "read_config",
    "read_json",
    "resolve",
]

Named = tuple[str, Tensor | LazyTensor]

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]  # no pickles, no code
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LONG = 1 << 30  # bytes whose loading is worth a progress bar
_FP8_NAN = 0x7F  # and 0xFF: e4m3fn has no other bit pattern for it
_CHUNK = 1 << 24  # elements looked at in one go, so that checking a huge tensor needs no copy of it


def resolve(name_or_dir: str | Path, weights: bool = True) -> Path:
    """Folder of a checkpoint: a local folder as it is, else the Hub repository of that name, downloaded once.

    weights: False leaves the weights where they are.
    """
    folder = Path(name_or_dir).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_dir)
    try:
        patterns = [pattern for pattern in _PATTERNS if weights or pattern != "*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise ValueError(f"there is no checkpoint folder {name}, nor can it be the name of a Hub repository") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{name} is neither a folder nor a Hub repository that can be downloaded now ({type(error).__name__}): "
            "check the name and the network, or give the path of a downloaded folder"
        ) from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checkpoint's config.json."""
    return read_json(Path(folder) / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError where the file is missing or holds something else."""
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


def iter_tensors(folder: str | Path) -> Iterator[tuple[str, LazyTensor]]:
    """(name, tensor) of every tensor in a checkpoint, single or sharded. Headers are read here, data where it is asked for."""
    for path, expected in _shards(Path(folder)):
        with open_safetensors(path) as file:
            names = set(file.keys())
            if expected is not None and names != expected:
                odd = _few(names ^ expected)
                raise ValueError(f"{path} and {_INDEX} disagree about {odd}: fetch the checkpoint again")
            for name in sorted(names):
                yield name, LazyTensor.in_file(file, name)


def _shards(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """The safetensors files of a folder, each with the names the index promises (None: there is no index)."""
    if (folder / _INDEX).is_file():
        weight_map: dict[str, str] = read_json(folder / _INDEX).get("weight_map", {})
        shards: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(Path(file).name, set()).add(name)
        if not shards:
            raise ValueError(f"{folder / _INDEX} lists no tensors: fetch the checkpoint again")
        return [(folder / file, shards[file]) for file in sorted(shards)]
    if (folder / _SINGLE).is_file():
        return [(folder / _SINGLE, None)]
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    if parts:
        raise ValueError(f"{folder} has {parts[0]} but neither {_INDEX} nor {_SINGLE}: fetch the checkpoint again")
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    found = f"only {pickled[0]}" if pickled else "no weights"
    raise ValueError(f"{folder} has {found}; safetensors only: convert it or use a safetensors revision")


def fill_nan(module: nn.Module) -> None:
    """Make every floating-point parameter NaN, so that one that is never loaded cannot go unseen."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dtype == FP8:
                parameter.view(torch.uint8).fill_(_FP8_NAN)
            elif parameter.is_floating_point():
                parameter.fill_(torch.nan)


def check_loaded(module: nn.Module) -> None:
    """ValueError naming the parameters that hold NaN: never loaded in full, or corrupt in the checkpoint."""
    bad = [name for name, parameter in module.named_parameters() if _has_nan(parameter.detach())]
    if bad:
        raise ValueError(f"{_few(bad)} hold NaN after loading: the weights are corrupt or were not loaded in full")


def match(module: nn.Module, tensors: Iterable[Named], shard: Shard | None = None) -> dict[str, LazyTensor]:
    """The tensors by name, if they are those that a module wants; reads no data, and works on a meta module too.

    ValueError naming a few keys on missing, leftover, repeated or wrong-shape ones. Scales may be absent where a weight is
    to be quantised, or in excess where it is to be multiplied out.
    """
    sources: dict[str, LazyTensor] = {}
    for name, tensor in tensors:
        if name in sources:
            raise ValueError(f"the checkpoint holds {name} twice")
        sources[name] = LazyTensor.of(tensor)
    state = module.state_dict(keep_vars=True)
    shapes = {name: _whole(tensor, shard or Shard()) for name, tensor in state.items()}
    loaded = {id(state[name]) for name in sources if name in state}
    lacks = [name for name, tensor in state.items() if id(tensor) not in loaded and not _optional(name, state, sources)]
    lacks += [f"{name}_scale" for name, tensor in sources.items() if _unscaled(name, tensor, state, sources)]
    excess = [name for name in sources if name not in state and not _is_scale(name, state)]
    faults = [f"{kind} {_few(names)}" for kind, names in (("lacks", lacks), ("has in excess", excess)) if names]
    if faults:
        raise ValueError(f"the checkpoint does not fit {type(module).__name__}: it {' and '.join(faults)}")
    for name, shape in shapes.items():
        if name in sources and sources[name].shape != shape:
            raise ValueError(f"{name} is {list(sources[name].shape)} in the checkpoint but {list(shape)} in the model")
    return sources


def _whole(tensor: Tensor, shard: Shard) -> tuple[int, ...]:
    """Shape of a parameter before it was split over ranks."""
    split = getattr(tensor, "shard_dim", None)
    return tuple(size * shard.world if dim == split else size for dim, size in enumerate(tensor.shape))


def _part(tensor: Tensor, shard: Shard) -> Index:
    """Where a rank's parameter lies in the whole one."""
    split = getattr(tensor, "shard_dim", None)
    starts = (size * shard.rank if dim == split else 0 for dim, size in enumerate(tensor.shape))
    return tuple(slice(start, start + size) for start, size in zip(starts, tensor.shape, strict=True))


def _is_scale(name: str, names: Mapping[str, Any]) -> bool:
    stem, _, kind = name.rpartition(".")
    return kind in ("weight_scale", "input_scale") and f"{stem}.weight" in names


def _optional(name: str, state: Mapping[str, Tensor], sources: Mapping[str, LazyTensor]) -> bool:
    """An input scale (without one every token has its own), or the scales of a weight that will be quantised."""
    if not _is_scale(name, state):
        return False
    weight = sources.get(name.removesuffix("_scale"))
    return name.endswith(".input_scale") or weight is None or weight.dtype != FP8


def _unscaled(name: str, tensor: LazyTensor, state: Mapping[str, Tensor], sources: Mapping[str, LazyTensor]) -> bool:
    """FP8 data whose scales are missing, for a parameter that is not FP8."""
    fp8 = name in state and tensor.dtype == FP8 and state[name].dtype != FP8
    return fp8 and f"{name}_scale" not in sources


def load_state(module: nn.Module, tensors: Iterable[Named], shard: Shard | None = None) -> None:
    """Fill a module's parameters and persistent buffers by exact name, each with this rank's part, in its dtype.

    Strict: ValueError as `match` has it, then on NaN. Of tied parameters one name is enough. FP8 weights for a parameter
    without scales are multiplied out; other weights for one with scales are quantised row by row.
    """
    shard = shard or Shard()
    sources = match(module, tensors, shard)
    state = module.state_dict(keep_vars=True)
    wanted = {name: tensor for name, tensor in state.items() if name in sources}
    with _progress(sum(tensor.nbytes for tensor in wanted.values())) as advance, torch.no_grad():
        for name, tensor in wanted.items():
            source, index = sources[name], _part(tensor, shard)
            scales = f"{name}_scale"
            if tensor.dtype != FP8 and source.dtype == FP8:
                convert.dequantize(tensor, source, sources[scales], index, advance)
            elif tensor.dtype == FP8 and source.dtype != FP8 and scales in state:
                convert.quantize(tensor, state[scales], source, index, advance)
            else:
                convert.copy(tensor, source, index, advance)
            if _has_nan(tensor.detach()):
                raise ValueError(
                    f"{name} holds NaN as loaded to {tensor.dtype}: the checkpoint is corrupt, fetch it again"
                )


def load_into(module: nn.Module, folder: str | Path, rename: Callable[[str], str | None] = lambda name: name) -> None:
    """Fill a module from a checkpoint folder; `rename` maps a tensor's name to the module's, None to leave it out."""
    fill_nan(module)
    renamed = ((rename(name), tensor) for name, tensor in iter_tensors(folder))
    load_state(module, ((name, tensor) for name, tensor in renamed if name is not None))


def _has_nan(tensor: Tensor) -> bool:
    """In chunks, so that a large tensor needs no copy; float8 has no isnan, but few bit patterns."""
    if not tensor.is_floating_point():
        return False
    for chunk in torch.split(tensor.flatten(), _CHUNK):
        bad = (chunk.view(torch.uint8) & 0x7F) == _FP8_NAN if chunk.dtype == FP8 else chunk.isnan()
        if bool(bad.any()):
            return True
    return False


@contextmanager
def _progress(total: int) -> Iterator[convert.Advance]:
    """A bar of bytes on stderr, where someone looks and it takes long; it leaves nothing behind."""
    if total < _LONG or not sys.stderr.isatty():
        yield lambda count: None
        return
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=total)
        yield lambda count: bar.advance(task, count)


def _few(names: Iterable[str], limit: int = 3) -> str:
    """The first names in order and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
