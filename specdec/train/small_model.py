"""A small Llama that learns the target's law from its text alone, to draft through `drafter.small_model`.

Shapes: B rows, T positions, H hidden size, A query heads, G KV heads, E head size, V vocabulary.
The state at position t is the residual stream behind token t + 1, which has seen the tokens 0 to t + 1 and predicts t + 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.kernels.reference import rotate
from specdec.nn import ModelConfig
from specdec.nn.rope import rope_tables
from specdec.train.eagle3 import MLP, Norm
from specdec.train.heads import TrainableHead

__all__ = ["SmallLlama", "make_head", "principal_table"]

_SPREAD = 0.02  # of fresh weights, and of the embedding: a token's logit for itself begins at about 0.02 H


class Attention(nn.Module):
    """Causal grouped-query attention (2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, self.size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_heads * self.size, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.size, hidden, bias=False)

    def forward(self, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """y [B, T, H], cos and sin f32 [1, T, E/2] -> [B, T, H]. A row's padding stands behind it, so nothing looks at it."""
        q, k, v = (proj(y).unflatten(-1, (-1, self.size)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return result


class Layer(nn.Module):
    """Pre-norm attention and feed-forward around a residual stream in f32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.post_attention_layernorm = Norm(hidden, eps), Norm(hidden, eps)
        self.self_attn = Attention(config)
        self.mlp = MLP(hidden, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin).float()
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x)).float()
        return result


class Stack(nn.Module):
    """What checkpoints keep under `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)


class SmallLlama(TrainableHead):
    """A plain Llama whose embedding is its head, too; of the target it reads nothing but the tokens."""

    depth, taps = 1, ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.set_vocabulary(None, None)

    def forward(self, tokens: Tensor, features: Tensor, embed: Tensor) -> list[Tensor]:
        x = self.model.embed_tokens(tokens)
        cos, sin = rope_tables(self.config, tokens.shape[1], tokens.device)
        for layer in self.model.layers:
            x = layer(x, cos[None], sin[None])
        return [F.pad(x, (0, 0, -1, 1))]  # the state of position t stands behind token t + 1

    def logits(self, depth: int, states: Tensor) -> Tensor:
        result: Tensor = F.linear(self.model.norm(states), self.model.embed_tokens.weight)
        return result

    def settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "max_position_embeddings": config.max_positions,
            "tie_word_embeddings": True,
            "eos_token_id": list(config.eos_token_ids),
            "torch_dtype": "bfloat16",
        }


def make_head(
    target: Any,
    d2t: Tensor | None,
    t2d: Tensor | None,
    seed: int = 0,
    hidden_size: int = 192,
    intermediate_size: int = 480,
    num_layers: int = 6,
    num_heads: int = 3,
    num_kv_heads: int = 1,
) -> SmallLlama:
    """A fresh model of a target's vocabulary, on the CPU in f32: the target's table on fewer channels, the rest random.

    Random as in GPT-2: normal, and what adds to the residual stream divided by the root of the number of additions.
    ValueError: a reduced vocabulary, or sizes that make no model.
    """
    sizes = target.config
    if d2t is not None:
        raise ValueError(
            f"training.draft_vocab_size={len(d2t)}, and a small model drafts all {sizes.vocab_size} tokens of the target: use "
            "training.draft_vocab_size=null"
        )
    _check(sizes.hidden_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads)
    config = ModelConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        max_positions=sizes.max_positions,
        tie_word_embeddings=True,
        eos_token_ids=tuple(sizes.eos_token_ids),
    )
    model, generator = SmallLlama(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "model.embed_tokens.weight":
                parameter.copy_(principal_table(target.embed.cpu(), hidden_size))
            elif parameter.dim() > 1:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))  # smaller, so that depth swells no stream
                parameter.normal_(std=_SPREAD * ((2 * num_layers) ** -0.5 if adds else 1.0), generator=generator)
    return model


def principal_table(table: Tensor, size: int) -> Tensor:
    """A table [V, H] on its first principal directions, f32 [V, size], with a root mean square of 0.02.

    No projection to so few channels keeps more of which tokens are alike (Eckart and Young 1936), and a small model learns
    sooner from a large one's weights than from random ones (2312.09299). Logits do not see the mean row taken off before.
    """
    rows = table.float()
    rows = rows - rows.mean(0)
    directions = torch.linalg.eigh((rows.T @ rows).double()).eigenvectors.flip(-1)  # right singular vectors
    projected = rows @ directions[:, :size].float()
    scaled: Tensor = projected * (_SPREAD / projected.square().mean().sqrt())
    return scaled


def _check(width: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> None:
    """ValueError for sizes that make no model; width: the target's hidden size."""
    counts = {
        "hidden_size": hidden, "intermediate_size": inner, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads
    }  # fmt: skip
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"training.head.{name}={value} must be at least 1")
    if hidden > width:
        raise ValueError(
            f"training.head.hidden_size={hidden} is more than the target's {width}, whose embedding it begins with: take "
            "fewer channels"
        )
    if hidden % (2 * heads) or heads % kv_heads:
        raise ValueError(
            f"training.head.hidden_size={hidden} does not make num_heads={heads} of an even size that share "
            f"num_kv_heads={kv_heads} evenly: take a multiple of {2 * heads}, and heads in a multiple of the KV heads"
        )
