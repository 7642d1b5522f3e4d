"""No drafter: the baseline of every speed-up, decoded by the same loop as the methods it is compared with."""

from __future__ import annotations

from specdec.drafter import Drafter
from specdec.types import DraftInputs, DraftTree, Law

__all__ = ["NoDraft"]


class NoDraft(Drafter):
    """Proposes nothing: a tree of the root alone, which any verifier can judge."""

    num_draft_tokens = 0
    depth = 0
    laws: frozenset[Law] = frozenset({"any", "iid", "distinct"})

    def prefill(self, inputs: DraftInputs) -> bool:
        return True

    def propose(self, inputs: DraftInputs) -> DraftTree:
        root = inputs.root
        return DraftTree.chain(root, root.new_empty(root.shape[0], 0))
