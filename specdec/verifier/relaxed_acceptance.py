"""Relaxed acceptance, as TensorRT-LLM has it for a model's thinking. Lossy: the output does not have the target's law.

Shapes: B rows, N nodes with the root, V vocabulary. A verifier sees no text, so this one is relaxed in all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.sampling import choose
from specdec.types import Acceptance, DraftTree, Sampling
from specdec.verifier import Verifier
from specdec.verifier._common import longest_path, path_to, pick, real_nodes


class RelaxedAcceptance(Verifier):
    """Keeps a draft among the target's top_k tokens that is at most delta less probable than the first of them.

    Probabilities are those before temperature, so that greedy decoding is relaxed too. The next token is chosen as plain
    decoding chooses it.
    """

    lossless = False

    def __init__(self, top_k: int = 10, delta: float = 0.6) -> None:
        if not (top_k >= 1 and 0 <= delta < 1):
            raise ValueError(f"relaxed_acceptance needs top_k >= 1 and 0 <= delta < 1, but got {top_k} and {delta}")
        self.top_k, self.delta = top_k, delta

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        """The longest path of drafts that stand; among equals the likeliest, then the first."""
        probs = logits.float().softmax(-1)
        best = probs.topk(min(self.top_k, probs.shape[-1])).values
        threshold = torch.maximum(best[..., 0] - self.delta, best[..., -1])
        rows, parents = torch.arange(probs.shape[0], device=probs.device)[:, None], tree.parents.clamp(min=0).long()
        drafted = probs[rows, parents, tree.tokens]
        stands = (drafted >= threshold[rows, parents]) & real_nodes(tree)

        node = longest_path(tree, stands, drafted)
        path, num_accepted = path_to(tree, node)
        position = (sampling.position + num_accepted)[:, None]
        return Acceptance(path, num_accepted, choose(pick(logits, node)[:, None], sampling, position).squeeze(1))
