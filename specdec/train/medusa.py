"""Medusa's (2401.10774) and Hydra's (2402.05109) heads for training; what they compute is defined in `specdec.nn.medusa`.

Shapes: B rows, T positions, H hidden size, V target vocabulary, W draft vocabulary, J heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.nn.medusa import MedusaConfig
from specdec.train.heads import TrainableHead

__all__ = ["MedusaHeads", "make_head"]


class Block(nn.Module):
    """One head's layer."""

    def __init__(self, width: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = nn.Linear(width, hidden, bias=False)
        nn.init.normal_(self.linear.weight, std=0.02, generator=generator)
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, y: Tensor) -> Tensor:
        return F.silu(self.linear(y).float() + self.bias)


class MedusaHeads(TrainableHead):
    """One layer a head, and the target's own lm_head, which stays as it is."""

    lm_head: Tensor

    def __init__(
        self, config: MedusaConfig, lm_head: Tensor, d2t: Tensor | None, t2d: Tensor | None, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.config, self.depth, self.taps = config, config.num_heads, ("hidden",)
        self.heads = nn.ModuleList(Block(config.width(j), config.hidden_size, generator) for j in range(self.depth))
        self.set_vocabulary(d2t, t2d)
        rows = lm_head if self.ids is None else lm_head[self.ids]
        self.register_buffer("lm_head", rows.float().clone(), persistent=False)

    def forward(self, tokens: Tensor, features: Tensor, embed: Tensor) -> list[Tensor]:
        seen = hidden = features.float()
        states = []
        for j, block in enumerate(self.heads):
            if self.config.sequential:
                following = F.pad(tokens, (0, j + 1))[:, j + 1 :]
                seen = torch.cat([seen, F.embedding(following, embed).float()], -1)
            states.append(hidden + block(seen))
        return states

    def logits(self, depth: int, states: Tensor) -> Tensor:
        return F.linear(states, self.lm_head)

    def settings(self) -> dict[str, Any]:
        return self.config.to_dict()


def make_head(
    target: Any, d2t: Tensor | None, t2d: Tensor | None, seed: int = 0, depth: int = 4, sequential: bool = False
) -> MedusaHeads:
    """Fresh heads for a target, on the CPU in f32; sequential: Hydra's. They begin near the target's own guess, z = h."""
    if depth < 1:
        raise ValueError(f"training.head.depth={depth} must be at least 1: no heads learn nothing")
    sizes = target.config
    drafts = sizes.vocab_size if d2t is None else len(d2t)
    config = MedusaConfig(sizes.hidden_size, sizes.vocab_size, drafts, depth, sequential)
    return MedusaHeads(config, target.lm_head.cpu(), d2t, t2d, torch.Generator().manual_seed(seed))
