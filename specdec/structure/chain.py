"""One token after another."""

from __future__ import annotations

from specdec.structure._shape import TreeShape, regular_paths
from specdec.structure._static import Static

__all__ = ["Chain"]


class Chain(Static):
    """The favourite, its favourite, and so on: num_draft_tokens of them."""

    def __init__(self, num_draft_tokens: int = 4) -> None:
        super().__init__(TreeShape(regular_paths([1] * num_draft_tokens)))
