"""The EAGLE-1 head (2401.15077) for training; what it computes is defined in `specdec.nn.eagle1`.

Shapes: B rows, T positions, H hidden size, V target vocabulary, W draft vocabulary, J steps, n predictions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.nn.eagle1 import Eagle1Config
from specdec.sampling import STREAM_DRAFT, uniform
from specdec.train.eagle3 import MLP, Attention, ChainHead, Norm, begin_small, one_layer

__all__ = ["Eagle1Head", "make_head"]


class Layer(nn.Module):
    """The head's one decoder layer, whose attention reads its input as it is."""

    def __init__(self, config: Eagle1Config) -> None:
        super().__init__()
        hidden, eps = config.layer.hidden_size, config.layer.rms_norm_eps
        self.self_attn = Attention(config.layer, hidden)
        self.post_attention_layernorm = Norm(hidden, eps)
        self.mlp = MLP(hidden, config.layer.intermediate_size)

    def forward(self, y: Tensor, cos: Tensor, sin: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """f32 [B, T, H] -> f32 [B, T, H]."""
        x = y + self.self_attn(y, cos, sin, keys, values).float()
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x)).float()
        return result


class Eagle1Head(ChainHead):
    """fc, one layer, and the target's own lm_head, which stays as it is.

    A prediction's loss is token_weight * training.loss + feature_weight * smooth L1 to the target's hidden state, which is the
    mean over its channels; both compare with the target at the same position (2401.15077, "Training of the draft models").
    """

    lm_head: Tensor

    def __init__(
        self, config: Eagle1Config, lm_head: Tensor, d2t: Tensor | None, t2d: Tensor | None, depth: int = 1,
        feature_weight: float = 1.0, token_weight: float = 0.1, noise: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(config, depth, ("hidden",))
        if min(feature_weight, token_weight, noise) < 0 or feature_weight + token_weight == 0:
            raise ValueError(
                f"training.head.feature_weight={feature_weight}, token_weight={token_weight} and noise={noise} must not be "
                "below 0, nor both weights 0: a head that nothing is asked of learns nothing"
            )
        self.feature_weight, self.token_weight, self.noise = feature_weight, token_weight, noise
        hidden = config.layer.hidden_size
        self.fc = nn.Linear(2 * hidden, hidden, bias=config.bias)
        self.layers = nn.ModuleList([Layer(config)])
        self.set_vocabulary(d2t, t2d)
        rows = lm_head if self.ids is None else lm_head[self.ids]
        self.register_buffer("lm_head", rows.float().clone(), persistent=False)

    def reduce(self, features: Tensor) -> Tensor:
        return features.float()

    def step(
        self, e: Tensor, h: Tensor, cos: Tensor, sin: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        y = self.fc(torch.cat([e, h], -1)).float()
        g = self.layers[0](y, cos, sin, keys, values)
        return g, g

    def logits(self, depth: int, states: Tensor) -> Tensor:
        return F.linear(states, self.lm_head)

    def augment(self, features: Tensor, keys: Tensor) -> Tensor:
        """Uniform noise from -noise to noise on what the target gave: its own outputs are not exact."""
        if self.noise == 0:
            return features
        places, channels = (torch.arange(size, device=keys.device) for size in features.shape[1:])
        share = uniform(keys[:, None, None], places[:, None], STREAM_DRAFT, channels)
        return features.float() + self.noise * (2 * share - 1)

    def objective(self, loss: Tensor, states: Tensor, hidden: Tensor) -> Tensor:
        distance = F.smooth_l1_loss(states.float(), hidden.float(), reduction="none").mean(-1).sum()
        return self.token_weight * loss + self.feature_weight * distance


def make_head(
    target: Any,
    d2t: Tensor | None,
    t2d: Tensor | None,
    seed: int = 0,
    depth: int = 1,
    intermediate_size: int | None = None,
    bias: bool = True,
    feature_weight: float = 1.0,
    token_weight: float = 0.1,
    noise: float = 0.1,
) -> Eagle1Head:
    """A fresh head for a target, on the CPU in f32. intermediate_size None: the target's.

    The layer starts small and random, and fc lets the feature through: only the step to the next one is to be learnt.
    ValueError: a target whose layers are not known.
    """
    layer = one_layer(target, intermediate_size)
    config = Eagle1Config(layer, layer.vocab_size if d2t is None else len(d2t), bias)
    head = Eagle1Head(config, target.lm_head.cpu(), d2t, t2d, depth, feature_weight, token_weight, noise)
    begin_small(head, seed)
    with torch.no_grad():
        head.fc.weight[:, layer.hidden_size :] += torch.eye(layer.hidden_size)
        if head.config.bias:
            head.fc.bias.zero_()
    return head
