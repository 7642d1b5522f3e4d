"""Tiny random transformers checkpoints, and what any target over one must agree with: the model without a cache.

Words: `committed` holds each row's tokens in the cache. Every check compares logits at 1e-4 of the largest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from specdec.types import Acceptance, DraftTree, ModelInputs

VOCAB = 259
TOLERANCE = 1e-4
PARENTS = [-1, 0, 0, 1, 1, 2, 3, 6]  # two branches and a long one; nodes of a path are not neighbours
DEPTH = 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
}
Text = list[int]


def llama_config(**changes: Any) -> LlamaConfig:
    """Odd sizes: 259 tokens, 6 query heads on 2 KV heads, 3 layers."""
    return LlamaConfig(**SIZES | {"num_hidden_layers": 3} | changes)


def save_model(config: PreTrainedConfig, folder: Path, seed: int = 0) -> Any:
    """A seeded random fp32 model of that config, saved as safetensors; weights large enough to have opinions."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:  # the inputs of experts are their second dimension too
                parameter.normal_(std=1.2 * parameter.shape[1] ** -0.5)
            elif "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder, safe_serialization=True)
    return model


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers of that seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_text(length: int, seed: int) -> Text:
    """Token ids."""
    tokens: Text = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


# ---- what the model says by itself -----------------------------------------------------------------------------------


@torch.no_grad()
def plain_logits(model: Any, tokens: Text) -> Tensor:
    """Logits [len(tokens), V]."""
    logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


@torch.no_grad()
def plain_states(model: Any, tokens: Text) -> list[Tensor]:
    """transformers' hidden_states [len(tokens), hidden]: embedding, every layer but the last, stream after the norm."""
    states = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
    return [state[0] for state in states]


@torch.no_grad()
def plain_greedy(model: Any, prompt: Text, max_new_tokens: int) -> Text:
    """What the model's own `generate` answers."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    answer = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0)
    tokens: Text = answer[0, len(prompt) :].tolist()
    return tokens


def error(value: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest wanted magnitude."""
    assert value.shape == wanted.shape, (value.shape, wanted.shape)
    return float((value.double() - wanted.double()).abs().max() / wanted.double().abs().max())


# ---- driving a target ------------------------------------------------------------------------------------------------


def prefill(target: Any, texts: Sequence[Text]) -> Any:
    """Fill the rows of non-empty texts; the target has been given room."""
    tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
    return target.prefill(tokens, torch.tensor([len(text) for text in texts], dtype=torch.int32))


def start(target: Any, texts: Sequence[Text], features: Sequence[int | str] = ()) -> Any:
    """Room for the texts and 40 tokens more, then their prefill."""
    target.allocate(len(texts), max(map(len, texts)) + 40, len(PARENTS), features)
    return prefill(target, texts)


def random_tree(batch: int, seed: int) -> DraftTree:
    """Trees of shape PARENTS with other tokens in every row."""
    tokens = torch.tensor([random_text(len(PARENTS), seed * 100 + row) for row in range(batch)])
    parents = torch.tensor(PARENTS, dtype=torch.int32).expand(batch, -1)
    return DraftTree(tokens, parents, torch.full((batch,), len(PARENTS), dtype=torch.int32), DEPTH)


def random_chain(batch: int, length: int, seed: int) -> DraftTree:
    """Chains of a root and length - 1 drafts."""
    tokens = torch.tensor([random_text(length, seed * 100 + row) for row in range(batch)])
    return DraftTree.chain(tokens[:, 0], tokens[:, 1:])


def nodes_to(tree: DraftTree, node: int) -> list[int]:
    """The nodes from the root to a node."""
    nodes = [node]
    while nodes[0] > 0:
        nodes.insert(0, int(tree.parents[0, nodes[0]]))
    return nodes


def check_verify(target: Any, model: Any, committed: Sequence[Text], tree: DraftTree) -> None:
    """Every node's logits are those of a plain forward over the row's tokens and the node's path."""
    output = target.verify(tree)
    for row, text in enumerate(committed):
        for node in range(tree.tokens.shape[1]):
            path = tree.tokens[row, nodes_to(tree, node)].tolist()
            wanted = plain_logits(model, text + path)[-1]
            assert error(output.logits[row, node], wanted) < TOLERANCE, (row, node)


def accept(target: Any, committed: list[Text], tree: DraftTree, last: Sequence[int]) -> None:
    """Commit the path to node `last` of every row (-1: the row does not run), here and in `committed`."""
    paths = [nodes_to(tree, max(node, 0)) for node in last]
    padded = torch.tensor([path + path[-1:] * (tree.depth + 1 - len(path)) for path in paths], dtype=torch.int32)
    counts = torch.tensor([len(p) - 1 if n >= 0 else -1 for p, n in zip(paths, last, strict=True)], dtype=torch.int32)
    target.commit(Acceptance(padded, counts, torch.zeros(len(last), dtype=torch.int64)))
    for row, path in enumerate(paths):
        if last[row] >= 0:
            committed[row] += tree.tokens[row, path].tolist()
    assert target.lengths.tolist() == [len(text) for text in committed]


# ---- the scenarios ---------------------------------------------------------------------------------------------------


def check_prefill(target: Any, model: Any) -> None:
    """Rows of unequal lengths, shorter and longer than a chunk, and exactly one."""
    texts = [random_text(length, length) for length in (1, target.prefill_chunk, 2 * target.prefill_chunk + 5)]
    output = start(target, texts)
    for row, text in enumerate(texts):
        assert error(output.logits[row, 0], plain_logits(model, text)[-1]) < TOLERANCE


def check_steps(target: Any, model: Any) -> None:
    """Trees, chains and single tokens by turns, each row accepting differently and sometimes not running."""
    committed = [random_text(length, length) for length in (3, 40, 17)]
    start(target, committed)
    steps = [(random_tree(3, 1), (7, 2, 0)), (random_chain(3, 1, 2), (0, 0, -1)), (random_tree(3, 3), (5, -1, 7))]
    steps += [(random_chain(3, 6, 4), (5, 0, 3)), (random_tree(3, 5), (4, 6, -1)), (random_chain(3, 1, 6), (0, 0, 0))]
    for tree, last in steps:
        check_verify(target, model, committed, tree)
        accept(target, committed, tree, last)


def check_refill(target: Any, model: Any) -> None:
    """A row that ends is filled with another prompt; the others go on as they were."""
    committed = [random_text(length, length) for length in (20, 9, 5)]
    start(target, committed)
    tree = random_tree(3, 1)
    check_verify(target, model, committed, tree)
    accept(target, committed, tree, (7, 5, 2))
    committed[1] = random_text(4, 77)
    output = prefill(target, [[], committed[1], []])
    assert error(output.logits[1, 0], plain_logits(model, committed[1])[-1]) < TOLERANCE
    check_verify(target, model, committed, random_tree(3, 2))


def check_levels(target: Any, model: Any) -> None:
    """A tree drafted level by level behind the prefix (offset and paths) sees what its verification sees."""
    committed = [random_text(length, length) for length in (6, 30)]
    start(target, committed)
    tree = random_tree(2, 1)
    for level in ([0], [1, 2], [3, 4, 5]):
        nodes = [nodes_to(tree, node) for node in level]
        paths = torch.tensor([nodes, nodes], dtype=torch.int32)
        positions = (target.lengths[:, None] + len(nodes[0]) - 1).repeat(1, len(level))
        output = target.forward(ModelInputs(tree.tokens[:, level], positions, target.lengths, paths, offset=level[0]))
        for row, text in enumerate(committed):
            for i, path in enumerate(nodes):
                wanted = plain_logits(model, text + tree.tokens[row, path].tolist())[-1]
                assert error(output.logits[row, i], wanted) < TOLERANCE, (row, level[i])
    check_verify(target, model, committed, tree)


@torch.no_grad()
def check_taps(target: Any, model: Any, norm: Any) -> None:
    """Layer i is hidden_states[i + 1]; the last one is "hidden", and the last layer's stream normed."""
    last = target.config.num_layers - 1
    text, size = random_text(2 * target.prefill_chunk + 3, 5), target.config.hidden_size
    taps: list[int | str] = [1, "hidden", 0, last]
    tree = random_chain(1, 4, 3)
    prompt_states, states = plain_states(model, text), plain_states(model, text + tree.tokens[0].tolist())
    filled = start(target, [text], taps).features
    for tapped, wanted in ((filled[0], prompt_states), (target.verify(tree).features[0], [s[-4:] for s in states])):
        one, hidden, zero, final = tapped.split(size, -1)
        assert error(one, wanted[2]) < TOLERANCE
        assert error(zero, wanted[1]) < TOLERANCE
        assert error(hidden, wanted[-1]) < TOLERANCE
        assert error(norm(final), wanted[-1]) < TOLERANCE
        for planted in (
            error(one, wanted[1]),
            error(zero, wanted[0]),
            error(zero, wanted[2]),
            error(final, wanted[-1]),
        ):
            assert planted > 100 * TOLERANCE  # the off-by-one that this must catch
    with pytest.raises(ValueError, match=f"layer {last + 1}; the target has layers 0 to {last}"):
        target.allocate(1, 8, 2, [last + 1])


SCENARIOS = [check_prefill, check_steps, check_refill, check_levels]
