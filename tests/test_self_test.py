"""A trained head is tried on a known prompt when it is loaded, against what its card says."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from heads import random_head

import specdec
from specdec.decoding import SpeculativeDecoder, self_test
from specdec.decoding.self_test import LEAST, known_prompt_length
from specdec.target.toy import Toy


def load(folder: Path, drafts: int = 3) -> SpeculativeDecoder:
    words = "drafter=eagle3", f"drafter.checkpoint={folder}", f"drafter.num_draft_tokens={drafts}"
    return specdec.load(*words, "target=toy")


def head(folder: Path, toy: Toy, **card: object) -> Path:
    """A random head, which is accepted next to never."""
    return random_head(folder, toy, 96, specdec=card)


def test_below_its_card_it_is_refused(tmp_path: Path, toy: Toy) -> None:
    folder = head(tmp_path / "head", toy, self_test={"depth": 3, "tau": 2.5})
    with pytest.raises(ValueError, match=r"emits 1\.\d\d tokens a forward on a known prompt, and its card says 2\.50"):
        load(folder)


def test_within_its_card_it_is_taken(tmp_path: Path, toy: Toy) -> None:
    """Also where fewer drafts are asked for than the card speaks of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = load(head(tmp_path / "head", toy, self_test={"depth": 3, "tau": 1.0}))
        load(head(tmp_path / "longer", toy, self_test={"depth": 7, "tau": 5.0}))
    assert decoder.drafter.card["self_test"]["tau"] == 1.0
    found = known_prompt_length(decoder)
    assert found is not None
    assert 1.0 <= found < LEAST


def test_without_a_card_it_warns(tmp_path: Path, toy: Toy) -> None:
    folder = head(tmp_path / "head", toy)
    with pytest.warns(UserWarning, match="hardly worth its time"):
        decoder = load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, drafts=2)  # too short to tell
        decoder.target.tokenizer = None
        self_test(decoder)  # nothing to ask it with


def test_what_is_not_trained_is_not_asked() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specdec.load("drafter=ngram", "target=toy")
