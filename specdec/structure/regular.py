"""Trees with the same number of children at every node of a level (SpecInfer, 2305.09781)."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.structure._shape import TreeShape, regular_paths
from specdec.structure._static import Static

__all__ = ["Regular"]


class Regular(Static):
    """num_children: of a node of each level, from the root on; [3, 2] is SpecInfer's <3, 2>, 9 tokens."""

    def __init__(self, num_children: Sequence[int]) -> None:
        super().__init__(TreeShape(regular_paths(num_children)))
