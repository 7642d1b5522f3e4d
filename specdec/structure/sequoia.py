"""The tree that is accepted most, given how often each choice is right (Sequoia, 2402.12374)."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.structure._shape import TreeShape, likely_paths
from specdec.structure._static import Static

__all__ = ["Sequoia"]


class Sequoia(Static):
    """rates[r]: how often the r-th choice at a node is right, falling; or one such list a level, the last for all further ones.

    A path is accepted with the product of its rates; the num_draft_tokens best paths are the best tree, because no child and
    no later sibling is worth more than what it needs.
    """

    def __init__(self, num_draft_tokens: int, rates: Sequence[float | Sequence[float]]) -> None:
        nested = [list(level) for level in rates if isinstance(level, Sequence)]
        levels = nested or [[float(rate) for rate in rates if not isinstance(rate, Sequence)]]
        for level in levels:
            if not level or not all(0 < b <= a <= 1 for a, b in zip(level, [*level[1:], level[-1]], strict=True)):
                raise ValueError(f"rates {level} must be above 0, at most 1 and not rise: order them by choice")
        last = len(levels) - 1
        paths = likely_paths(num_draft_tokens, lambda depth: levels[min(depth, last)], num_draft_tokens)
        super().__init__(TreeShape(paths))
