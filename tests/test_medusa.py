"""Medusa's and Hydra's heads: what drafting computes is what training defines, and they conform.

Shapes: B rows, T positions, H hidden size, V and W entries of the target's and the draft vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.drafter.hydra import Hydra
from specdec.drafter.medusa import Medusa
from specdec.structure.dynamic import Dynamic
from specdec.target.toy import Toy
from specdec.testing import check_drafter
from specdec.train.corpus import Batch
from specdec.train.export import export
from specdec.train.features import Features
from specdec.train.medusa import MedusaHeads, make_head
from specdec.train.vocabulary import draft_vocabulary
from specdec.types import DraftInputs, Sampling
from specdec.verifier.target_only import TargetOnly

KINDS = {"medusa": Medusa, "hydra": Hydra}
DRAFTS = 96  # W, where it is reduced


def heads_of(
    kind: str, target: Any, folder: Path, reduced: bool = True, depth: int = 3, storage: str = "bfloat16"
) -> MedusaHeads:
    """Random heads, exported into the folder."""
    vocab = target.config.vocab_size
    draw = torch.Generator().manual_seed(1)
    tables = draft_vocabulary(torch.randint(1, 1000, (vocab,), generator=draw), DRAFTS) if reduced else (None, None)
    head = make_head(target, *tables, seed=2, depth=depth, sequential=kind == "hydra")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.1, generator=draw)
            parameter.copy_(parameter.bfloat16())  # what the checkpoint holds
    export(head, folder, storage, {})
    return head


def inputs_for(tokens: torch.Tensor, features: torch.Tensor) -> DraftInputs:
    """Two requests begin: of row 0 all tokens are there, of row 1 one less."""
    lengths = torch.tensor([tokens.shape[1], tokens.shape[1] - 1], dtype=torch.int32)
    zero = torch.zeros(2)
    sampling = Sampling(zero, zero.int(), zero + 1, zero.long(), lengths)
    return DraftInputs(tokens, lengths, lengths - 1, tokens.shape[1] - 1, features, sampling)


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_what_training_predicts(kind: str, reduced: bool, tmp_path: Path, toy: Toy) -> None:
    """A greedy chain: the training head, fed the drafts as text, has each draft as its favourite."""
    head = heads_of(kind, toy, tmp_path / "heads", reduced)
    drafter = KINDS[kind](tmp_path / "heads", num_draft_tokens=3)
    tokens = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(5))
    batch = Batch(tokens, torch.tensor([9, 9], dtype=torch.int32), torch.ones(2, 9, dtype=torch.bool), torch.arange(2))
    _, hidden = Features(toy, ())(batch)
    toy.allocate(2, 64, 4, ("hidden",))
    drafter.setup(toy, 2, 64, "any")
    tree = drafter.propose(inputs_for(tokens, hidden[:, :8]))
    for row, at in ((0, 7), (1, 6)):  # the last committed token; the root follows
        drafts = tree.tokens[row, 1:]
        assert tree.tokens[row, 0] == tokens[row, at + 1]
        text = torch.cat([tokens[row, : at + 2], drafts])[None]
        states = head(
            text, torch.cat([hidden[row : row + 1], torch.zeros(1, text.shape[1] - 9, hidden.shape[-1])], 1), toy.embed
        )
        for j in range(3):
            best = head.logits(j, states[j][0, at]).argmax()
            assert drafts[j] == (best if head.ids is None else head.ids[best])


@pytest.mark.parametrize("structure", [None, [2, 2, 1], "dynamic"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_conform(kind: str, structure: Any, tmp_path: Path, toy: Toy) -> None:
    heads_of(kind, toy, tmp_path / "heads", storage="fp8")
    shape = Dynamic(6, top_k=3, depth=3) if structure == "dynamic" else structure
    check_drafter(lambda: KINDS[kind](tmp_path / "heads", num_draft_tokens=3, structure=shape), TargetOnly(), toy)


def test_heads_that_do_not_fit(tmp_path: Path, toy: Toy) -> None:
    heads_of("medusa", toy, tmp_path / "heads")
    with pytest.raises(ValueError, match=r"holds Medusa heads, not Hydra's"):
        Hydra(tmp_path / "heads")
    with pytest.raises(ValueError, match=r"holds 3 heads, .* and 4 are asked for"):
        Medusa(tmp_path / "heads", num_draft_tokens=4)
    with pytest.raises(ValueError, match=r"neither a folder, nor a head that ships"):
        Medusa(tmp_path / "nowhere")
    other = Toy(seed=1)
    object.__setattr__(other.config, "hidden_size", 96)
    with pytest.raises(ValueError, match=r"hidden_size \d+, this target's is 96"):
        Medusa(tmp_path / "heads", num_draft_tokens=2).setup(other, 1, 64, "any")
