"""Choose a token after every node as plain decoding would, then follow the child that carries it.

Shapes: B rows, N nodes with the root, D depth, V vocabulary. Exact at any temperature for every draft: what is emitted
is the target's own choice, and its noise depends on the position alone, so the text equals plain decoding's.
"""

from __future__ import annotations

from torch import Tensor

from specdec.kernels.steps import follow
from specdec.sampling import choose
from specdec.types import Acceptance, DraftTree, Sampling
from specdec.verifier import Verifier


class TargetOnly(Verifier):
    """Keeps a draft when the target chooses it too: greedy, tree-greedy and sampling with deterministic drafts."""

    coupled = True
    reads_logits = False

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        """Walk down along the target's choices; the first of equal siblings stands for all."""
        position = sampling.position[:, None]  # all that greedy choice, which needs no noise, looks at
        if sampling.mode != "greedy":
            position = position + tree.node_depths()
        chosen = choose(logits, sampling, position)
        return Acceptance(*follow(tree.tokens, tree.parents, tree.num_nodes, chosen, tree.depth))
