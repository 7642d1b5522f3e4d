"""Structures: how a draft model's guesses become a tree. One file and one YAML each; any drafter that asks a model level by
level takes any of them.

    specdec drafter=eagle3 structure@drafter.structure=dynamic drafter.structure.top_k=8
    specdec drafter=eagle3 drafter.structure=[3,2,1]
"""

from __future__ import annotations

from collections.abc import Sequence

from specdec.structure._base import Forward, RootState, Structure
from specdec.structure._shape import TreeShape, likely_paths, regular_paths

__all__ = ["Forward", "RootState", "Structure", "TreeShape", "as_structure", "likely_paths", "regular_paths"]


def as_structure(structure: Structure | Sequence[int] | None, num_draft_tokens: int) -> Structure:
    """A structure as it is; numbers of children by level as a regular tree; None as a chain of num_draft_tokens."""
    from specdec.structure.chain import Chain
    from specdec.structure.regular import Regular

    if structure is None:
        return Chain(num_draft_tokens)
    return structure if isinstance(structure, Structure) else Regular(structure)
