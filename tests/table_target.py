"""A target whose law is a table of its last two tokens: exact laws, real loop, a cache that rollback can get wrong.

Shapes: B rows, T tokens, S slots, D tree depth, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from specdec.sampling import warp
from specdec.types import Acceptance, DraftTree, ModelInputs, ModelOutput, Sampling


class TableTarget:
    """Implements `specdec.target.Target` (and a draft model) by looking up logits f32 [V, V, V] of (before, last).

    The cache keeps the tokens themselves where a model keeps keys and values: a commit that goes wrong changes the law.
    """

    def __init__(self, vocab: int, seed: int, like: TableTarget | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(vocab, vocab, vocab, generator=generator) * 1.5
        if like is not None:
            self.table = like.table + self.table / 2
        self.config = SimpleNamespace(vocab_size=vocab, hidden_size=1, num_layers=1, max_positions=64, eos_token_ids=())
        self.checkpoint, self.tokenizer = None, None
        self.embed = self.lm_head = torch.zeros(vocab, 1)
        self.lengths = torch.zeros(0, dtype=torch.int32)

    def allocate(self, batch_size: int, max_len: int, num_nodes: int, features: Sequence[int | str] = ()) -> None:
        self.cache = torch.zeros(batch_size, max_len + 2 * num_nodes, dtype=torch.int64)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32)

    def prefill(self, tokens: Tensor, lengths: Tensor) -> ModelOutput:
        begins = lengths > 0
        width = tokens.shape[1]
        self.cache[:, :width] = torch.where(begins[:, None], tokens, self.cache[:, :width])
        self.lengths = torch.where(begins, lengths, self.lengths)
        last = self.lengths.long()[:, None] - 1
        before, token = (self.cache.gather(1, (last - back).clamp(min=0)) for back in (1, 0))
        return ModelOutput(self.table[before, token])

    def forward(self, inputs: ModelInputs, layers: int | None = None) -> ModelOutput:
        prefix = inputs.prefix_lens.long()[:, None]
        slots = prefix + inputs.offset + torch.arange(inputs.tokens.shape[1])
        self.cache.scatter_(1, slots, inputs.tokens)
        if inputs.paths is None:
            before = slots - 1
        else:
            count = (inputs.paths >= 0).sum(-1, keepdim=True)
            parent = inputs.paths.long().gather(-1, (count - 2).clamp(min=0)).squeeze(-1)
            before = prefix + torch.where(count.squeeze(-1) > 1, parent, -1)
        return ModelOutput(self.table[self.cache.gather(1, before.clamp(min=0)), inputs.tokens])

    def verify(self, tree: DraftTree) -> ModelOutput:
        paths = None if tree.is_chain else tree.paths()
        return self.forward(ModelInputs(tree.tokens, self.lengths[:, None] + tree.node_depths(), self.lengths, paths))

    def commit(self, acceptance: Acceptance) -> None:
        start = self.lengths.long()[:, None]
        step = torch.arange(acceptance.path.shape[1])
        node = torch.where(step <= acceptance.num_accepted[:, None], acceptance.path.long(), step)
        self.cache.scatter_(1, start + step, self.cache.gather(1, start + node))
        self.lengths = self.lengths + (acceptance.num_accepted + 1)

    def check(self) -> None:
        """Nothing goes wrong unseen."""

    def law(self, prompt: Sequence[int], count: int, sampling: Sampling) -> Tensor:
        """Exact joint law of the next `count` tokens under one row's sampling. f64 [V ** count]."""
        vocab = self.config.vocab_size
        pairs = torch.tensor([prompt[-2:]])
        joint = torch.ones(1, dtype=torch.float64)
        for _ in range(count):
            logits: Any = self.table[pairs[:, 0], pairs[:, 1]]
            joint = (joint[:, None] * warp(logits[None], sampling)[0].double().softmax(-1)).flatten()
            pairs = torch.stack([pairs[:, 1].repeat_interleave(vocab), torch.arange(vocab).repeat(len(pairs))], 1)
        return joint
