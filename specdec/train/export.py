"""From a trained head to a checkpoint folder that drafters load: config.json, model.safetensors, README.md (the card)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.reference import quantize
from specdec.target.formats import FP8_STORAGE
from specdec.train.checkpoint import write_folder
from specdec.train.heads import TrainableHead

__all__ = ["STORAGE", "card", "export"]

STORAGE = ("bfloat16", "fp8")


def export(head: TrainableHead, place: Path, storage: str, notes: Mapping[str, Any], text: str | None = None) -> None:
    """Write a head, whole or not at all: matrices in bfloat16, or in FP8 with a scale a row, as config.json says; norms in f32.

    notes: what config.json keeps under "specdec". text: the card. ValueError: an unknown storage.
    """
    if storage not in STORAGE:
        raise ValueError(f"storage={storage} is unknown; choose one of {', '.join(STORAGE)}")
    tensors: dict[str, Tensor] = {}
    for name, value in head.state_dict().items():
        if value.dim() < 2:
            tensors[name] = value
        elif storage == "fp8":
            tensors[name], tensors[f"{name}_scale"] = quantize(value)
        else:
            tensors[name] = value.to(torch.bfloat16)
    stored = {"quantization_config": {"quant_method": FP8_STORAGE}} if storage == "fp8" else {}
    config = json.dumps({**head.settings(), **stored, "specdec": notes}, indent=2) + "\n"
    texts = {"config.json": config, **({} if text is None else {"README.md": text})}
    write_folder(place, {"model.safetensors": tensors}, texts)


def card(
    title: str,
    use: str,
    reached: str,
    facts: Mapping[str, Any],
    environment: Mapping[str, Any],
    limits: Sequence[str],
) -> str:
    """The card as Markdown: what it reaches (a table), what it was made of, with what, and where that ends."""
    git = environment["git"]
    revision = f"{git['revision'][:12]}{' with changes' if git['dirty'] else ''}" if git else "unknown"
    hardware = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    if environment["gpu"] and environment["gpus"] > 1:
        hardware = f"{environment['gpus']} x {hardware}"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    made = {"hardware": hardware, "versions": versions, "revision": revision, "date": environment["date"]}
    lines = [
        f"# {title}",
        "",
        f"`{use}`",
        "",
        "## What it reaches",
        "",
        reached,
        "accept length: tokens a forward of the target, the recovered or bonus token included, with a 95% bootstrap interval "
        "over prompts; by position: share accepted of the drafts whose predecessors were; equal: answers that equal plain "
        "output.",
        "",
        "## What it was made of",
        "",
        *(f"- **{name}**: {value}" for name, value in facts.items()),
        "",
        "## How it was made",
        "",
        f"`{environment['command']}`",
        "",
        *(f"- **{name}**: {value}" for name, value in made.items()),
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in limits),
    ]
    return "\n".join(lines) + "\n"
