"""What acceptance rules share: laws at the nodes, coins, residuals and the way from a node to an `Acceptance`.

Shapes: B rows, N nodes with the root, D depth, V vocabulary. target_probs, draft_probs: f32 [..., V], after warping.
A child to which its parent's draft law gives no mass was not drawn from it: it is a point mass. That covers
deterministic drafts (no law at all) and siblings proposed after the law was exhausted; judging a point mass is exact
whatever chose it. f32 is enough: the rounding of a residual is weighed by the (as small) probability of needing it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.sampling import STREAM_ACCEPT, STREAM_RESIDUAL, sample, uniform, warp
from specdec.types import Acceptance, DraftTree, Sampling


def require_chain(rule: str, tree: DraftTree) -> None:
    """ValueError unless the tree is a chain."""
    if not tree.is_chain:
        raise ValueError(
            f"{rule} judges chains, but got a tree of {tree.tokens.shape[1]} nodes and depth {tree.depth}; "
            "use target_only, rrs or traversal, or let the drafter propose a chain"
        )


def target_laws(logits: Tensor, sampling: Sampling) -> Tensor:
    """Warped target law after every node; one-hot in greedy rows. [B, N, V] -> f32 [B, N, V], a fresh tensor."""
    return warp(logits, sampling).softmax(-1)


def draft_laws(tree: DraftTree, target_probs: Tensor) -> Tensor:
    """Law of every node's children, zeros where drafts are deterministic (read only). f32 [B, N, V]."""
    return target_probs.new_zeros(()).expand_as(target_probs) if tree.probs is None else tree.probs


def coins(tree: DraftTree, sampling: Sampling) -> Tensor:
    """One uniform in (0, 1) for every node; a step's position never recurs, so neither does its noise. f32 [B, N]."""
    index = torch.arange(tree.tokens.shape[1], device=tree.tokens.device)
    return uniform(sampling.seed[:, None], sampling.position[:, None], STREAM_ACCEPT, index)


def real_nodes(tree: DraftTree) -> Tensor:
    """False for padding. bool [B, N]."""
    return torch.arange(tree.tokens.shape[1], device=tree.tokens.device) < tree.num_nodes[:, None]


def mass(probs: Tensor, tokens: Tensor) -> Tensor:
    """Probability of a token under its law. probs [..., V], tokens int64 [...] -> [...]."""
    return probs.gather(-1, tokens[..., None]).squeeze(-1)


def pick(values: Tensor, node: Tensor) -> Tensor:
    """Row b's entry at node[b]. values [B, N, ...], node int64 [B] -> [B, ...]."""
    return values[torch.arange(node.shape[0], device=node.device), node]


def law_of_child(draft_probs: Tensor, tokens: Tensor) -> Tensor:
    """Law a child was drawn from: its parent's, or a point mass where that gives the child none. [..., V], [...]."""
    point = torch.zeros_like(draft_probs).scatter_(-1, tokens[..., None], 1.0)
    return torch.where(mass(draft_probs, tokens)[..., None] > 0, draft_probs, point)


def chain_laws(tree: DraftTree, target_probs: Tensor) -> Tensor:
    """Law of the one child of every node of a chain, zeros behind the last node. f32 [B, N, V].

    With zeros there, the bonus token needs no case of its own: its residual is the target law.
    """
    child = tree.tokens.roll(-1, 1)
    has_child = real_nodes(tree).roll(-1, 1)
    has_child[:, -1] = False
    return law_of_child(draft_laws(tree, target_probs), child) * has_child[..., None]


def normalise(probs: Tensor, otherwise: Tensor) -> Tensor:
    """Weights [..., V] over their sum; `otherwise` where nothing is left, which only rounding can bring about."""
    total = probs.sum(-1, keepdim=True)
    return torch.where(total > 0, probs / total, otherwise)


def residual(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """normalise((target - draft)+): the law of a recovered token (2211.17192, eq. in 2.3). [..., V]."""
    return normalise((target_probs - draft_probs).relu(), target_probs)


def without(draft_probs: Tensor, tokens: Tensor) -> Tensor:
    """Draft law once a token is drawn and cannot come again; zeros when that exhausts it. [B, V], int64 [B]."""
    rest = draft_probs.scatter(-1, tokens[..., None], 0.0)
    return normalise(rest, rest)


def emit(tree: DraftTree, node: Tensor, probs: Tensor, sampling: Sampling) -> Acceptance:
    """Accept the path to `node` (int64 [B]) and draw the next token from `probs` [B, V]."""
    path, num_accepted = path_to(tree, node)
    next_token = sample(probs, sampling, sampling.position + num_accepted, STREAM_RESIDUAL)
    return Acceptance(path, num_accepted, next_token)


def path_to(tree: DraftTree, node: Tensor) -> tuple[Tensor, Tensor]:
    """Root to node, the node repeated behind it, int32 [B, D+1], and the node's depth, int32 [B]. node int64 [B]."""
    node = node.to(torch.int32)
    if tree.is_chain:
        steps = torch.arange(tree.depth + 1, dtype=torch.int32, device=node.device)
        return torch.minimum(steps, node[:, None]), node
    path = pick(tree.paths(), node.long())
    return torch.where(path < 0, node[:, None], path), (path >= 0).sum(-1, dtype=torch.int32) - 1


def longest_path(tree: DraftTree, stands: Tensor, probs: Tensor) -> Tensor:
    """End of the longest path of nodes that stand; among equals the likeliest, then the first. int64 [B].

    stands bool, probs f32 [B, N]: the verdict on every node (the root's counts for nothing) and its probability.
    """
    paths = tree.paths()[..., 1:]
    steps, padding = paths.clamp(min=0).long().flatten(1), paths < 0
    whole = (stands.gather(1, steps).view_as(padding) | padding).all(-1)
    likelihood = probs.log().gather(1, steps).view_as(padding).masked_fill(padding, 0.0).sum(-1)
    depths = (~padding).sum(-1).masked_fill(~whole, -1)
    deepest = depths == depths.amax(1, keepdim=True)
    return likelihood.masked_fill(~deepest, -torch.inf).argmax(1)
