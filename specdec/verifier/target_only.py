"""Choose a token after every node as plain decoding would, then follow the child that carries it.

Shapes: B rows, N nodes with the root, D depth, V vocabulary. Exact at any temperature for every draft: what is emitted
is the target's own choice, and its noise depends on the position alone, so the text equals plain decoding's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.sampling import choose
from specdec.types import Acceptance, DraftTree, Sampling
from specdec.verifier import Verifier


class TargetOnly(Verifier):
    """Keeps a draft when the target chooses it too: greedy, tree-greedy and sampling with deterministic drafts."""

    coupled = True

    def accept(self, tree: DraftTree, logits: Tensor, sampling: Sampling) -> Acceptance:
        """Walk down along the target's choices; the first of equal siblings stands for all."""
        index = torch.arange(tree.tokens.shape[1], dtype=torch.int32, device=tree.tokens.device)
        depths = index if tree.is_chain else tree.node_depths()
        chosen = choose(logits, sampling, sampling.position[:, None] + depths)
        if tree.is_chain:
            return _walk_chain(tree, chosen, index)
        return _walk_tree(tree, chosen, index)


def _walk_chain(tree: DraftTree, chosen: Tensor, index: Tensor) -> Acceptance:
    """The longest prefix of drafts that were chosen. chosen int64 [B, N], index int32 [N]."""
    hit = (chosen[:, :-1] == tree.tokens[:, 1:]) & (index[1:] < tree.num_nodes[:, None])
    num_accepted = hit.cumprod(1).sum(1, dtype=torch.int32)
    last = num_accepted[:, None]
    return Acceptance(torch.minimum(index, last), num_accepted, chosen.gather(1, last.long()).squeeze(1))


def _walk_tree(tree: DraftTree, chosen: Tensor, index: Tensor) -> Acceptance:
    """One level a turn; a row without a matching child stays where it is. chosen int64 [B, N], index int32 [N]."""
    padding = index.shape[0]
    real = index < tree.num_nodes[:, None]
    node = torch.zeros_like(tree.num_nodes)[:, None]
    path = [node]
    num_accepted = torch.zeros_like(tree.num_nodes)
    for _ in range(tree.depth):
        hit = real & (tree.parents == node) & (tree.tokens == chosen.gather(1, node.long()))
        child = torch.where(hit, index, padding).amin(1, keepdim=True)
        found = child < padding
        node = torch.where(found, child, node)
        num_accepted = num_accepted + found.squeeze(1)
        path.append(node)
    return Acceptance(torch.cat(path, 1), num_accepted, chosen.gather(1, node.long()).squeeze(1))
