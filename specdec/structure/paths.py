"""Trees given node by node (Medusa, 2401.10774)."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.structure._shape import TreeShape
from specdec.structure._static import Static

__all__ = ["Paths"]


class Paths(Static):
    """paths: of every node the choices that lead to it, such as [[0], [1], [0, 0]]; a node's earlier siblings must be there."""

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        super().__init__(TreeShape(paths))
