"""The most that any lossless rule can accept of k independent drafts: optimal transport, through its dual (2502.18779).

Shapes: V vocabulary. Laws f64 [..., V].
"""

from __future__ import annotations

from torch import Tensor


def optimal_acceptance(target_probs: Tensor, draft_probs: Tensor, num_drafts: int) -> Tensor:
    """Largest probability that one of the drafts is emitted: 1 + min over sets H of target(H) - draft(H)^k. -> f64 [...].

    Drafts that all lie in H leave no choice but H, of which the target has target(H). The minimum is at a prefix of the
    tokens in ascending order of target / draft.
    """
    target_probs, draft_probs = target_probs.double(), draft_probs.double()
    order = (target_probs / draft_probs).argsort(-1)
    target_mass, draft_mass = (law.gather(-1, order).cumsum(-1) for law in (target_probs, draft_probs))
    return 1 + (target_mass - draft_mass**num_drafts).amin(-1).clamp(max=0.0)  # 0: the empty set
