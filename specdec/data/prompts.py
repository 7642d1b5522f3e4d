"""The prompts that ship with the package: thirty of our own in eight tasks, small enough for a 135M chat model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdec.data.jsonl import Jsonl

__all__ = ["Prompts"]


class Prompts(Jsonl):
    """chat, translation, summarization, qa, math, rag, code and multi_turn; no benchmark's text is among them."""

    def __init__(self, **options: Any) -> None:
        """`options` are those of `Dataset`."""
        super().__init__(Path(__file__).with_name("prompts.jsonl"), **options)
