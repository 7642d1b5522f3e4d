"""Numbered safetensors files, each with a record beside it that says it is whole: what survives a kill at any moment.

A folder holds settings.json, what all its shards were made with; shard-00000.safetensors; and, written last, shard-00000.json
with the file's sha256 and what else is known of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from specdec.tracking.run_folder import write_atomic

__all__ = [
    "bind",
    "compare",
    "digest",
    "indices",
    "is_whole",
    "path_of",
    "read_record",
    "read_settings",
    "verify",
    "write_shard",
]

_SETTINGS = "settings.json"


def path_of(folder: Path, index: int) -> Path:
    """Where the tensors of a shard lie; its record has the same name with .json."""
    return folder / f"shard-{index:05d}.safetensors"


def bind(folder: Path, settings: Mapping[str, Any]) -> None:
    """Begin a folder with these settings, or go on with it; ValueError as `compare` has it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    with FileLock(f"{path}.lock"):  # several ranks begin at once
        if not path.exists():
            write_atomic(path, json.dumps(settings, indent=1) + "\n")
    compare(folder, settings)


def compare(folder: Path, settings: Mapping[str, Any]) -> None:
    """ValueError where a folder was made with other settings: names the first that differs and both values."""
    known, asked = _flat(read_settings(folder)), _flat(json.loads(json.dumps(settings)))
    for key in known | asked:
        if known.get(key) != asked.get(key):
            raise ValueError(
                f"{folder} was made with {key} = {known.get(key)!r}, and {asked.get(key)!r} is asked for now: "
                "use the same value to go on, or another folder"
            )


def read_settings(folder: Path) -> dict[str, Any]:
    """What a folder was made with; ValueError where there is none."""
    path = folder / _SETTINGS
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {_SETTINGS}, so it is no folder of training data: check the path, or make it anew"
        )
    settings: dict[str, Any] = json.loads(path.read_text())
    return settings


def indices(folder: Path) -> list[int]:
    """Numbers of the shards in a folder, in order; one that lacks its file or its record counts, so that it is missed."""
    found = folder.glob("shard-[0-9]*.*")
    return sorted({int(path.stem.split("-")[1]) for path in found if path.suffix in (".safetensors", ".json")})


def write_shard(folder: Path, index: int, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Put a shard on disk whole or not at all, then its record."""
    path = path_of(folder, index)
    path.with_suffix(".json").unlink(missing_ok=True)
    unfinished = path.with_name(path.name + ".part")
    save_file(tensors, unfinished)
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    write_atomic(path.with_suffix(".json"), json.dumps({"sha256": digest(path), **facts}) + "\n")


def is_whole(folder: Path, index: int) -> bool:
    """Whether a shard is there with its record and the checksum is right."""
    path = path_of(folder, index)
    if not (path.is_file() and path.with_suffix(".json").is_file()):
        return False
    return bool(digest(path) == read_record(folder, index)["sha256"])


def read_record(folder: Path, index: int) -> dict[str, Any]:
    """What was noted about a shard."""
    record: dict[str, Any] = json.loads(path_of(folder, index).with_suffix(".json").read_text())
    return record


def verify(folder: Path, index: int, remedy: str) -> dict[str, Any]:
    """The record of a shard whose checksum is right; ValueError names the file that is missing or damaged, and the remedy."""
    path = path_of(folder, index)
    for part in (path, path.with_suffix(".json")):
        if not part.is_file():
            raise ValueError(f"{part} is missing: {remedy}")
    record = read_record(folder, index)
    found = digest(path)
    if found != record["sha256"]:
        raise ValueError(
            f"{path} is damaged or cut short (sha256 {found[:12]}, should be {record['sha256'][:12]}): {remedy}"
        )
    return record


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result
