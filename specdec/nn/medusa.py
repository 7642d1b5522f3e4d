"""Heads that guess ahead from the target's last hidden state: Medusa's (2401.10774) and Hydra's (2402.05109).

M rows, H hidden size (the target's), D heads, V and W entries of the target's and the draft vocabulary.
Head d, from 0, guesses the token d + 2 places behind the one whose hidden state h it reads, by the target's own lm_head:
z = h + silu(A y + b), logits = lm_head(z). Medusa: y = h. Hydra: y = h, then the embeddings of the d + 1 tokens in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.nn.head import draft_ids
from specdec.nn.layers import Linears, weight

ARCHITECTURES = {"MedusaModel": False, "HydraModel": True}  # and whether heads see the tokens in between
_NEEDED = ("hidden_size", "vocab_size", "num_heads")


@dataclass(frozen=True, slots=True)
class MedusaConfig:
    """What a set of heads is: its config.json."""

    hidden_size: int  # the target's
    vocab_size: int  # the target's
    draft_vocab_size: int
    num_heads: int  # D, the longest draft
    sequential: bool  # Hydra

    @property
    def is_reduced(self) -> bool:
        """Whether the draft vocabulary is a part of the target's, which d2t and t2d then describe."""
        return self.draft_vocab_size != self.vocab_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MedusaConfig:
        """Read a config.json; ValueError names the first thing that no such heads have."""
        found = [name for name in config.get("architectures") or () if name in ARCHITECTURES]
        if not found:
            raise ValueError(f"architectures is {config.get('architectures')}, known are {', '.join(ARCHITECTURES)}")
        missing = [key for key in _NEEDED if config.get(key) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}: add what the heads were trained with")
        vocab, heads = config["vocab_size"], config["num_heads"]
        drafts = config.get("draft_vocab_size") or vocab
        if not 0 < drafts <= vocab or heads < 1:
            raise ValueError(
                f"draft_vocab_size {drafts} must be 1 to vocab_size, {vocab}, num_heads {heads} at least 1"
            )
        return cls(config["hidden_size"], vocab, drafts, heads, ARCHITECTURES[found[0]])

    def to_dict(self) -> dict[str, Any]:
        """config.json; `from_dict` gives the same back."""
        name = next(name for name, sequential in ARCHITECTURES.items() if sequential == self.sequential)
        sizes = {key: getattr(self, key) for key in (*_NEEDED, "draft_vocab_size")}
        return {"architectures": [name], **sizes}

    def width(self, depth: int) -> int:
        """Inputs of head `depth`."""
        return self.hidden_size * (2 + depth if self.sequential else 1)

    def check(self, target: Any) -> None:
        """ValueError unless the heads were made for a target of this config (hidden_size, vocab_size)."""
        for name in ("hidden_size", "vocab_size"):
            mine, theirs = getattr(self, name), getattr(target, name)
            if mine != theirs:
                raise ValueError(
                    f"the heads are for a target of {name} {mine}, this target's is {theirs}: take heads that were trained "
                    "for this target, or train some (specdec train drafter=medusa)"
                )


class _Block(nn.Module):
    """What checkpoints keep under `heads.D.`."""

    def __init__(self, width: int, hidden: int, linears: Linears) -> None:
        super().__init__()
        self.linear = linears.rows(hidden, width)
        self.bias = weight(hidden, dtype=torch.float32)


class MedusaModel(nn.Module):
    """The heads. Load the parameters, which have the checkpoint's names, then `pack` once, then ask."""

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: MedusaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        linears, hidden = Linears(dtype), config.hidden_size
        self.heads = nn.ModuleList(_Block(config.width(d), hidden, linears) for d in range(config.num_heads))
        if config.is_reduced:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    def pack(self, ops: Any, lm_head: Tensor) -> None:
        """Give the weights to a backend, and let the originals go. lm_head [V, H]: the target's."""
        self.ops = ops
        self.token_ids = draft_ids(self.d2t, self.t2d) if self.config.is_reduced else None
        blocks: list[_Block] = list(self.heads)  # type: ignore[arg-type]
        self.biases = [block.bias.data for block in blocks]
        self.weights = [ops.pack(block.linear.value()) for block in blocks]
        self.head = ops.pack(lm_head if self.token_ids is None else lm_head[self.token_ids])
        del self.heads

    def state(self, depth: int, inputs: Tensor) -> Tensor:
        """What head `depth` makes of y [M, width], whose first H are h: f32 [M, H]."""
        product: Tensor = self.ops.norm_linear(inputs.float(), None, 0.0, self.weights[depth])
        return inputs[:, : self.config.hidden_size].float() + F.silu(product + self.biases[depth])

    def logits(self, states: Tensor) -> Tensor:
        """States [M, H] -> logits of the draft vocabulary f32 [M, W]."""
        result: Tensor = self.ops.norm_linear(states, None, 0.0, self.head)
        return result
