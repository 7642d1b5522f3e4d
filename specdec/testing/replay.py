"""A drafter that knows the plain output and gets about every third token wrong: commit and rollback under load.

Equality proofs on random weights need it, where honest drafters are hardly ever accepted.
Shapes: B rows, R references, L their length, K drafted levels, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.drafter import Drafter
from specdec.types import DraftInputs, DraftTree, Law


class Replay(Drafter):
    """Proposes what the references say comes next. `references`: prompt and plain output of each request, as ids.

    A token is wrong where its position's hash says so. As a tree every level has two siblings, the spine and a decoy;
    where the spine is wrong the decoy is right, and they stand in either order. Nothing is proposed off the references.
    """

    def __init__(self, references: Sequence[Sequence[int]], depth: int = 4, tree: bool = False, every: int = 3) -> None:
        if not references or min(map(len, references)) < 2:
            raise ValueError("Replay needs references of two tokens or more: the prompt and the plain output")
        self.depth = depth
        self.tree = tree
        self.every = every
        self.num_draft_tokens = 2 * depth if tree else depth
        width = max(map(len, references)) + depth + 1
        self._texts = torch.tensor([[*text, *[0] * (width - len(text))] for text in references])
        self._sizes = torch.tensor([len(text) for text in references])

    def setup(self, target: Any, batch_size: int, max_len: int, law: Law) -> None:
        """Move the references to the target's device."""
        device = target.lengths.device
        self._texts, self._sizes = self._texts.to(device), self._sizes.to(device)
        self._vocab = target.config.vocab_size

    def prefill(self, inputs: DraftInputs) -> bool:
        return True

    def propose(self, inputs: DraftInputs) -> DraftTree:
        following, known = self._following(inputs)
        step = torch.arange(self.depth, device=following.device)
        position = inputs.lengths[:, None] + step
        mixed = (position * 40503) >> 3  # a cheap hash of the position
        wrong = (following + 1 + mixed % 7) % self._vocab
        fails = mixed % self.every == 0
        spine = torch.where(fails, wrong, following)
        num_drafts = torch.where(known, self.depth, 0)
        if not self.tree:
            return DraftTree.chain(inputs.root, spine, num_drafts)
        decoy = torch.where(fails, following, wrong)
        decoy_first = (mixed // self.every) % 2 == 0
        pairs = torch.stack([torch.where(decoy_first, decoy, spine), torch.where(decoy_first, spine, decoy)], -1)
        spine_at = 1 + 2 * step + decoy_first.long()
        above = torch.cat([torch.zeros_like(spine_at[:, :1]), spine_at[:, :-1]], 1)
        parents = torch.cat([torch.full_like(above[:, :1], -1), above.repeat_interleave(2, 1)], 1).to(torch.int32)
        tokens = torch.cat([inputs.root[:, None], pairs.flatten(1)], 1)
        return DraftTree(tokens, parents, (2 * num_drafts + 1).to(torch.int32), self.depth)

    def _following(self, inputs: DraftInputs) -> tuple[Tensor, Tensor]:
        """Next tokens int64 [B, K] of the reference that each row has followed so far, and whether there is one [B]."""
        size = min(self._texts.shape[1], inputs.tokens.shape[1])
        place = torch.arange(size, device=inputs.tokens.device)
        same = inputs.tokens[:, None, :size] == self._texts[None, :, :size]
        same = same | (place >= inputs.lengths[:, None, None])
        fits = same.all(-1) & (inputs.lengths[:, None] <= self._sizes)  # [B, R]
        which = fits.int().argmax(1)
        step = torch.arange(self.depth, device=place.device)
        at = (inputs.lengths.long()[:, None] + step).clamp(max=self._texts.shape[1] - 1)
        return self._texts[which].gather(1, at), fits.any(1)
