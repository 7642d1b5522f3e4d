"""What a forward of M tokens costs, and what its products cost beside torch's.

Words: a product is one linear layer. N outputs, K inputs, M tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _bench import interleaved, reader
from torch import Tensor
from transformers import DynamicCache

from specdec.nn import ModelConfig
from specdec.target.backends import DTYPES
from specdec.types import DraftTree

TOKENS = (1, 2, 4, 6, 8, 12, 16, 32, 64)
CONTEXT = 256
COLD = 128 * 2**20  # bytes of weights a timed pass walks over: more than the caches hold


@dataclass(frozen=True, slots=True)
class Product:
    """One kind of linear layer of a model, and how many a forward has."""

    name: str
    outputs: int
    inputs: int
    count: int


def products(config: ModelConfig) -> list[Product]:
    """The linear layers of one forward, fused as our runtime runs them."""
    hidden, layers, size = config.hidden_size, config.num_layers, config.head_dim
    return [
        Product("qkv", (config.num_heads + 2 * config.num_kv_heads) * size, hidden, layers),
        Product("o", hidden, config.num_heads * size, layers),
        Product("gate_up", 2 * config.intermediate_size, hidden, layers),
        Product("down", hidden, config.intermediate_size, layers),
        Product("head", config.vocab_size, hidden, 1),
    ]


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of weights that every forward must read: all products'."""
    return sum(p.outputs * p.inputs * p.count for p in products(config)) * DTYPES[dtype].itemsize


def forward_row(target: Any, model: Any, dtype: str, repeats: int) -> dict[str, Any]:
    """Seconds of forwards of M tokens behind CONTEXT, ours and transformers', in turns with the memory read."""
    tokens = torch.randint(0, target.config.vocab_size, (1, CONTEXT + max(TOKENS)), generator=torch.manual_seed(0))
    target.allocate(1, CONTEXT, max(TOKENS))
    target.prefill(tokens[:, :CONTEXT], torch.tensor([CONTEXT], dtype=torch.int32))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :CONTEXT], past_key_values=cache, use_cache=True)
    read, size = reader()
    functions: dict[str, Callable[[], object]] = {"read": read}
    for m in TOKENS:
        new = tokens[:, CONTEXT : CONTEXT + m]
        functions[f"ours {m}"] = partial(target.verify, DraftTree.chain(new[:, 0], new[:, 1:]))
        functions[f"transformers {m}"] = partial(_transformers, model, new, cache)
    seconds = interleaved(functions, repeats)
    floor = weight_bytes(target.config, dtype)
    return {"section": "forward", "dtype": dtype, "read_bytes": size, "weight_bytes": floor, "seconds": seconds}


@torch.no_grad()
def _transformers(model: Any, tokens: Tensor, cache: DynamicCache) -> None:
    """One forward behind the cached context, logits of every token; the cache is as before."""
    model(tokens, past_key_values=cache, use_cache=True)
    cache.crop(-tokens.shape[1])


def product_row(product: Product, dtype: str, repeats: int) -> dict[str, Any]:
    """Seconds a product of M tokens takes: our kernel, F.linear, and oneDNN with weights packed beforehand.

    Every pass walks over copies of the weights, as a forward walks over its layers, so that none comes from a cache.
    """
    from specdec.kernels.cpu import ops  # compiles the kernels

    kind = DTYPES[dtype]
    copies = max(1, round(COLD / (product.outputs * product.inputs * kind.itemsize)))
    weight = torch.randn(product.outputs, product.inputs, generator=torch.manual_seed(0)).to(kind)
    plain = [weight.clone() for _ in range(copies)]
    packed = [ops.pack(weight) for _ in range(copies)]
    seconds: dict[str, list[float]] = {}
    for m in TOKENS:
        x, out = torch.randn(m, product.inputs).to(kind), torch.empty(m, product.outputs)
        onednn = [torch.ops.mkldnn._reorder_linear_weight(weight, m) for _ in range(copies)]
        passes = {
            f"ours {m}": partial(_ours, x, out, packed),
            f"linear {m}": partial(_linear, x, plain),
            f"prepacked {m}": partial(_prepacked, x, onednn),
        }
        seconds |= {name: [s / copies for s in values] for name, values in interleaved(passes, repeats).items()}
    shape = {"outputs": product.outputs, "inputs": product.inputs, "count": product.count}
    return {"section": "product", "dtype": dtype, "product": product.name, **shape, "seconds": seconds}


def _ours(x: Tensor, out: Tensor, weights: list[Any]) -> None:
    from specdec.kernels.cpu.linear import STORE, linear

    for weight in weights:
        linear(x, weight, out, STORE)


def _linear(x: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        F.linear(x, weight)


def _prepacked(x: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def forward_jobs(
    targets: dict[str, Any], models: dict[str, Any], repeats: int, sections: list[str]
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Key and measurement of the rows of the sections "forward" and "product"."""
    for dtype, target in targets.items():
        if "forward" in sections:
            yield f"forward/{dtype}", partial(forward_row, target, models[dtype], dtype, repeats)
        for product in products(target.config) if "product" in sections else []:
            yield f"product/{dtype}/{product.name}", partial(product_row, product, dtype, repeats)
