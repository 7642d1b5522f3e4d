"""FLy (Li et al. 2511.22972): a mismatch stands if the target was unsure and then agrees with what follows. Lossy.

Shapes: B rows, N nodes with the root, V vocabulary; K = N - 1 drafts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.sampling import choose
from specdec.types import Acceptance, DraftTree, Sampling
from specdec.verifier import Verifier
from specdec.verifier._common import path_to, pick, real_nodes, require_chain


class FLy(Verifier):
    """Keeps a draft that the target chooses too; another one if entropy >= threshold and the next `window` drafts agree.

    Entropy is -sum p log p, in nats, over the target's top_k tokens before temperature, as in the authors' code. A mismatch
    with fewer than `window` drafts behind it is rejected.
    """

    lossless = False
    supports_trees = False

    def __init__(self, window: int = 6, threshold: float = 0.3, top_k: int = 3) -> None:
        if not (window >= 1 and threshold >= 0 and top_k >= 1):
            raise ValueError(
                f"fly needs window >= 1, threshold >= 0 and top_k >= 1, but got {window}, {threshold} and {top_k}"
            )
        self.window, self.threshold, self.top_k = window, threshold, top_k

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        """Tokens are chosen as plain decoding chooses them, the next one too."""
        require_chain("fly", tree)
        chosen = choose(logits, sampling, sampling.position[:, None] + tree.node_depths())
        agrees = (tree.tokens[:, 1:] == chosen[:, :-1]) & real_nodes(tree)[:, 1:]
        top = logits[:, :-1].float().softmax(-1).topk(min(self.top_k, logits.shape[-1])).values
        unsure = torch.special.entr(top).sum(-1) >= self.threshold
        confirmed = pad(agrees, (0, self.window)).unfold(1, self.window, 1)[:, 1:].all(-1)  # the window behind a draft
        node = (agrees | (unsure & confirmed)).cumprod(1).sum(1)
        path, num_accepted = path_to(tree, node)
        return Acceptance(path, num_accepted, pick(chosen, node))
