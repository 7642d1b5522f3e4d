"""The drafter interface: what proposes tokens. One file and one YAML per drafter; nothing else learns its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from specdec.types import Acceptance, DraftInputs, DraftTree, Law, ModelOutput

__all__ = ["Drafter"]


class Drafter(ABC):
    """Proposes a `DraftTree` after every step. Attributes declare needs; the loop asks for these, never for a name."""

    num_draft_tokens: int  # static; the tree has one node more, the root
    depth: int  # static
    features: Sequence[
        int | str
    ] = ()  # target layers to tap: 0-based ids (stream after it) or "hidden"; known after setup
    laws: frozenset[Law] = frozenset({"any"})  # "any": deterministic drafts; "iid" / "distinct": drawn, with probs
    graphable: bool = True  # False: reads tensors on the host, runs outside a CUDA graph
    trained: bool = False  # drafts with a checkpoint that was made for one target, so it is tested on a known prompt
    parts: Sequence[Drafter] = ()  # drafters that it is made of; those with a checkpoint are tested one by one
    card: Mapping[str, Any] = {}  # what such a checkpoint says of itself: config.json's "specdec"

    def setup(self, target: Any, batch_size: int, max_len: int, law: Law) -> None:
        """Called before every batch of requests: share the target's weights, allocate, learn which law the verifier wants."""

    def prefill(self, inputs: DraftInputs) -> bool:
        """Requests begin: for their rows num_new is the whole prompt. Whether it has been read, or never will be.

        True: propose is offered the last depth + 1 of these tokens alone, as in any other step, so that on a GPU a request's
        first step is the same CUDA graph as the others. False: propose is offered all of them, and that step runs as it is.
        """
        return False

    @abstractmethod
    def propose(self, inputs: DraftInputs) -> DraftTree:
        """Propose at most `num_draft_tokens` tokens behind every row's root."""

    def observe(self, tree: DraftTree, output: ModelOutput, acceptance: Acceptance) -> None:
        """See what the target said of the tree (rows with num_accepted = -1 do not run)."""
