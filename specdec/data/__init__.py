"""Prompts: their sources (`Prompts`, `Jsonl`, `specdec.data.huggingface`) and how they become tokens (`encode`)."""

from __future__ import annotations

from specdec.data.chat import Message, Prompt, encode, messages, template_name
from specdec.data.dataset import Conversation, Dataset
from specdec.data.jsonl import Jsonl
from specdec.data.prompts import Prompts

__all__ = [
    "Conversation",
    "Dataset",
    "Jsonl",
    "Message",
    "Prompt",
    "Prompts",
    "encode",
    "messages",
    "template_name",
]
