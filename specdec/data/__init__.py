"""Sources of prompts: `Prompts` (shipped), `Jsonl`, and `specdec.data.huggingface` (imported when asked for: it is slow)."""

from __future__ import annotations

from specdec.data.dataset import Conversation, Dataset
from specdec.data.jsonl import Jsonl
from specdec.data.prompts import Prompts

__all__ = [
    "Conversation",
    "Dataset",
    "Jsonl",
    "Prompts",
]
