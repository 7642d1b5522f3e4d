"""Forwards of one target without the loop: what they cost at M tokens, what a prefill costs, and whether their bits agree.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from _gpu import clocked, fill_cache, graphed, kv_read, products, random_ids, spread
from torch import Tensor

from specdec.types import DraftTree


def allocate(target: Any, batch: int, length: int, nodes: int) -> None:
    """A cache of that size alone: attention's launches depend on its slots."""
    target.cache = None
    target.allocate(batch, length, nodes, ())


@torch.inference_mode()
def forward_row(target: Any, tokens: int, context: int, repeats: int) -> dict[str, Any]:
    """Seconds of a verification of a chain of `tokens` behind `context`, as a CUDA graph and launched one by one."""
    allocate(target, 1, context, tokens)
    fill_cache(target, context)
    ids = random_ids(target.config.vocab_size, tokens)[None].to(target.device)
    verify = partial(target.verify, DraftTree.chain(ids[:, 0], ids[:, 1:]))
    size = sum(size for _, size in products(target)) + kv_read(target, context)
    eager = clocked(verify, max(1, repeats // 4), target.device)
    seconds = clocked(graphed(verify, target.device), repeats, target.device)
    return {"tokens": tokens, "context": context, "bytes": size, "seconds": spread(seconds), "eager": spread(eager)}


@torch.inference_mode()
def prefill_row(target: Any, length: int, chunk: int, repeats: int) -> dict[str, Any]:
    """Seconds of a prefill of random tokens, and its FLOPs (2 a multiply-add; scores and values counted causally)."""
    usual, target.prefill_chunk = target.prefill_chunk, chunk
    allocate(target, 1, length, 1)
    ids = random_ids(target.config.vocab_size, length)[None].to(target.device)
    lengths = torch.tensor([length], dtype=torch.int32)
    seconds = clocked(partial(target.prefill, ids, lengths), repeats, target.device)
    target.prefill_chunk = usual
    return {"tokens": length, "chunk": chunk, "flops": prefill_flops(target.config, length), "seconds": spread(seconds)}


def prefill_flops(config: Any, length: int) -> int:
    """Products of every layer for all tokens, attention over what each sees, the head for the last; dense layers only."""
    hidden, size = config.hidden_size, config.head_dim
    attention = hidden * size * (2 * config.num_heads + 2 * config.num_kv_heads)
    layer = length * (attention + 3 * hidden * config.mlp_size)
    seen = 2 * config.num_heads * size * length * (length + 1) // 2
    return int(2 * (config.num_layers * (layer + seen) + hidden * config.vocab_size))


# ---- bits ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def bits_row(target: Any, shape: str, tokens: int, context: int, most: int) -> dict[str, Any]:
    """Tokens whose logits differ in a forward of `tokens` from those of plain decoding, one token a forward.

    shape: "chain"; "tree", in which every level has a decoy beside the text; "batch", the same text in as many rows, one
    token of it a forward. most: the longest chain, whose plain logits are the reference.
    """
    text = random_ids(target.config.vocab_size, context + most, seed=1)[None].to(target.device)
    rows = tokens if shape == "batch" else 1
    allocate(target, 1, context + most, most)
    target.prefill(text[:, :context], torch.tensor([context], dtype=torch.int32))
    plain = torch.stack([_plain(target, text, context + i) for i in range(most)])
    if shape == "batch":
        allocate(target, rows, context + most, most)
        prompt = text[:, :context].expand(rows, -1)
        target.prefill(prompt, torch.full((rows,), context, dtype=torch.int32))
    tree, nodes = _draft(text[0, context:], shape, tokens)
    target.lengths.fill_(context)
    logits = target.verify(tree).logits.flatten(0, 1)
    levels = [0] * rows if shape == "batch" else list(range(len(nodes)))
    differing = sum(not torch.equal(logits[node], plain[level]) for node, level in zip(nodes, levels, strict=True))
    return {"shape": shape, "tokens": tokens, "context": context, "compared": len(nodes), "differing": differing}


def _plain(target: Any, text: Tensor, position: int) -> Tensor:
    """Logits [V] behind the token at a position, decoded alone; its K/V stay."""
    target.lengths.fill_(position)
    root = text[:, position]
    logits: Tensor = target.verify(DraftTree.chain(root, root.new_empty(1, 0))).logits[0, 0]
    return logits


def _draft(text: Tensor, shape: str, tokens: int) -> tuple[DraftTree, list[int]]:
    """A tree of `tokens` nodes (in all rows), and its nodes that carry text."""
    if shape == "batch":
        roots = text[:1].expand(tokens)
        return DraftTree.chain(roots, roots.new_empty(tokens, 0)), list(range(tokens))
    if shape == "chain":
        return DraftTree.chain(text[:1], text[None, 1:tokens]), list(range(tokens))
    ids, parents, spine = [int(text[0])], [-1], [0]
    while len(ids) < tokens:
        right = int(text[len(spine)])
        decoy_first = len(spine) % 2 == 1 and len(ids) + 1 < tokens
        above, first = spine[-1], len(ids)
        spine.append(first + decoy_first)
        decoy = right - 1 if right else 1
        ids += [decoy, right] if decoy_first else [right, decoy]
        parents += [above, above]
    device = text.device
    tree = DraftTree(
        torch.tensor([ids[:tokens]], device=device),
        torch.tensor([parents[:tokens]], dtype=torch.int32, device=device),
        torch.tensor([tokens], dtype=torch.int32, device=device),
        len(spine) - 1,
    )
    return tree, spine


def shapes_of(tokens: Sequence[int]) -> list[tuple[str, int]]:
    """What `bits_row` is asked: every M as chain, tree and batch; a tree has a branch from M = 3 on."""
    return [(shape, m) for m in tokens for shape in ("chain", "tree", "batch") if shape != "tree" or m > 2]
