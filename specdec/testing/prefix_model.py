"""A random target and drafter whose laws depend on the whole prefix and are known in full.

Shapes: R rows, N nodes with the root, V vocabulary, L tokens that are followed, H prefixes. Prefixes are numbered as in
a heap: 0 is empty, prefix * V + 1 + token is one token longer; so every law of a tree is one row of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.sampling import warp
from specdec.types import Acceptance, DraftTree, Sampling

Topology = tuple[int, ...]  # parent of every node, -1 for the root


def sampling_of(rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    """Equal settings in every row; the seed is the row's number, the position 0."""
    mode = "greedy" if temperature == 0 else "warped" if top_k or top_p < 1 else "sampled"
    return Sampling(
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k, dtype=torch.int32),
        top_p=torch.full((rows,), top_p),
        seed=torch.arange(rows),
        position=torch.zeros(rows, dtype=torch.int32),
        mode=mode,  # type: ignore[arg-type]
    )


def depth_of(topology: Topology) -> int:
    """Depth of the deepest node."""
    depths = [0]
    for parent in topology[1:]:
        depths.append(depths[parent] + 1)
    return max(depths)


def sibling_law(probs: Tensor, used: Tensor) -> Tensor:
    """Law of the next sibling when `used` tokens are out; uniform over the others once it is exhausted. [R, V]."""
    rest = probs.masked_fill(used, 0.0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, (~used).to(probs.dtype))
    return rest / rest.sum(-1, keepdim=True)


@dataclass
class PrefixModel:
    """Logits f32 [H, V] of target and drafter after every prefix of fewer than `length` tokens."""

    vocab: int
    length: int
    target_logits: Tensor
    draft_logits: Tensor

    @classmethod
    def random(cls, vocab: int, length: int, seed: int, noise: float = 1.0) -> PrefixModel:
        """Gaussian target logits; the drafter's are the same plus Gaussian noise."""
        generator = torch.Generator().manual_seed(seed)
        shape = (sum(vocab**n for n in range(length)), vocab)
        target = torch.randn(shape, generator=generator) * 1.5
        return cls(vocab, length, target, target + noise * torch.randn(shape, generator=generator))

    def law(self, logits: Tensor, sampling: Sampling) -> Tensor:
        """One row's warped law after every prefix. logits [H, V], sampling of one row -> f64 [H, V]."""
        return warp(logits[None], sampling)[0].double().softmax(-1)

    def complete(self, emitted: Tensor, law: Tensor) -> Tensor:
        """Spread the mass of short outcomes by the target's law: [..., prefixes] -> [..., V^L], text of L tokens."""
        level = emitted[..., :1]
        start, count = 1, self.vocab
        for n in range(self.length):
            rows = law[start - count // self.vocab : start] if n else law[:1]
            level = (level[..., None] * rows).flatten(-2) + emitted[..., start : start + count]
            start, count = start + count, count * self.vocab
        return level

    def num_prefixes(self) -> int:
        """Prefixes of up to `length` tokens."""
        return int(sum(self.vocab**n for n in range(self.length + 1)))

    def prefixes(self, tokens: Tensor, topology: Topology) -> Tensor:
        """Prefix at every node, the root's empty. tokens int64 [R, N] -> int64 [R, N]."""
        nodes = [torch.zeros_like(tokens[:, 0])]
        for i, parent in enumerate(topology[1:], 1):
            nodes.append(nodes[parent] * self.vocab + 1 + tokens[:, i])
        return torch.stack(nodes, 1)

    def draw(self, topology: Topology, sampling: Sampling, distinct: bool, generator: torch.Generator) -> Tensor:
        """Tokens of one tree per row, siblings with or without replacement. int64 [R, N]; the root is token 0."""
        tokens = torch.zeros(len(sampling.seed), len(topology), dtype=torch.int64)
        used = torch.zeros(*tokens.shape, self.vocab, dtype=torch.bool)
        for i, parent in enumerate(topology[1:], 1):
            prefix = self.prefixes(tokens, topology)[:, parent]
            law = sibling_law(warp(self.draft_logits[prefix], sampling).softmax(-1), used[:, parent])
            tokens[:, i] = torch.multinomial(law, 1, generator=generator).squeeze(1)
            if distinct:
                used[:, parent] = used[:, parent].scatter(1, tokens[:, i : i + 1], True)
        return tokens

    def judged(
        self, tokens: Tensor, topology: Topology, sampling: Sampling, drawn: bool, num_nodes: Tensor | None = None
    ) -> tuple[DraftTree, Tensor]:
        """The tree with these tokens [R, N] and the target's logits f32 [R, N, V]; `drawn` adds the draft laws."""
        prefixes = self.prefixes(tokens, topology)
        rows, width = tokens.shape
        probs = warp(self.draft_logits[prefixes], sampling).softmax(-1) if drawn else None
        parents = torch.tensor(topology, dtype=torch.int32).repeat(rows, 1)
        if num_nodes is None:
            num_nodes = torch.full((rows,), width, dtype=torch.int32)
        return DraftTree(tokens, parents, num_nodes, depth_of(topology), probs), self.target_logits[prefixes]

    def emitted(self, tree: DraftTree, verdict: Acceptance) -> Tensor:
        """Prefix that a verdict emits: accepted tokens, then the next token. int64 [R]."""
        prefix = torch.zeros_like(verdict.next_token)
        for d in range(1, tree.depth + 1):
            token = tree.tokens.gather(1, verdict.path[:, d : d + 1].long()).squeeze(1)
            prefix = torch.where(verdict.num_accepted >= d, prefix * self.vocab + 1 + token, prefix)
        return prefix * self.vocab + 1 + verdict.next_token
