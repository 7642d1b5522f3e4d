"""Chains that end where one more pass of the draft model is unlikely to pay.

Shapes: B rows, K drafts, W vocabulary of the model that drafts. p_i is its law of draft i, before temperature, top-k and top-p:
those sharpen a law without making the model any surer.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from specdec.structure._base import Forward, RootState
from specdec.structure._static import spread
from specdec.structure.chain import Chain
from specdec.types import DraftTree, Law, Sampling

__all__ = ["Adaptive"]

Rule = Literal["path", "confidence", "entropy"]
GAMMA = 0.2  # per nat of entropy: with it the bound holds for the EAGLE-3 head and the small model that ship


class Adaptive(Chain):
    """A row drafts on while what its last draft is worth is at least min_probability; K at most, and always one.

    rule "path": the product of max p_j for j <= i, the chance that all so far stands (the value of EAGLE-2, 2406.16858);
    "confidence": max p_i alone (assistant_confidence_threshold in transformers); "entropy": 1 - sqrt(GAMMA * H(p_i)), a lower
    bound of the chance that draft i is accepted (AdaEDL, 2410.18351; SVIP, 2411.18462, bounds H itself). A pass pays where that
    chance is above its cost in forwards of the target: a fifth or a quarter for a one-layer head and a small target.
    """

    def __init__(self, num_draft_tokens: int = 5, min_probability: float = 0.3, rule: Rule = "path") -> None:
        if num_draft_tokens < 1 or not 0 <= min_probability <= 1:
            raise ValueError(
                f"an adaptive chain of {num_draft_tokens=} and {min_probability=} has no sense: give at least one draft and a "
                "probability from 0 (never stop) to 1"
            )
        if rule not in get_args(Rule):
            raise ValueError(f"rule={rule} does not exist; there are {', '.join(get_args(Rule))}")
        super().__init__(num_draft_tokens)
        self.min_probability, self.rule = min_probability, rule

    def draft(
        self,
        forward: Forward,
        root: Tensor,
        prefix_lens: Tensor,
        sampling: Sampling,
        law: Law,
        state: RootState | None = None,
    ) -> DraftTree:
        """Whether draft i + 1 is made depends on p_1 to p_i, never on a token that is yet to be judged: the target's law is
        kept. A row's drafts behind its end are padding, and on the CPU none are made once every row has ended."""
        drafts, laws = [], []
        drafting = torch.ones_like(root, dtype=torch.bool)
        num_drafts = torch.zeros_like(prefix_lens)
        worth = torch.ones_like(root, dtype=torch.float32)
        for level in self.levels(forward, root, prefix_lens, sampling, law, state):
            drafts.append(level.tokens)
            if level.probs is not None:
                laws.append(level.probs)
            num_drafts = num_drafts + drafting
            worth = self._worth(level.logits[:, 0], worth)
            drafting = drafting & (worth >= self.min_probability)
            if root.device.type == "cpu" and not any_row_drafts(drafting):
                break
        probs = spread(torch.cat(laws, 1), state) if laws else None
        return DraftTree.chain(root, torch.cat(drafts, 1), num_drafts, probs)

    def _worth(self, logits: Tensor, before: Tensor) -> Tensor:
        """What a draft with these logits [B, W] is worth behind one worth `before` [B]. f32 [B]."""
        probs = logits.softmax(-1)
        if self.rule == "entropy":
            entropy: Tensor = torch.special.entr(probs).sum(-1)
            return (1 - (GAMMA * entropy).sqrt()).clamp(min=0.0)
        confidence = probs.amax(-1)
        return before * confidence if self.rule == "path" else confidence


def any_row_drafts(drafting: Tensor) -> bool:
    """Whether any row [B] drafts on: the structure's one host read, on the CPU only, where a pass more costs time."""
    return bool(drafting.any())
