"""One model in two tensor-parallel ranks, in FP8 too.

Shapes: M tokens, V vocabulary.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from parity import error, random_text, random_tree
from torch import Tensor

from specdec.kernels.reference import FP8, Parallel
from specdec.nn import DecoderModel, KVCache, ModelConfig, Shard
from specdec.target.toy import as_llama4, random_tensors
from specdec.types import ModelInputs
from specdec.weights.checkpoint import load_state

TINY = ModelConfig(260, 64, 96, 4, 4, 2, 32)
CONFIGS = {
    "llama": TINY,
    "tied": replace(TINY, tie_word_embeddings=True),
    "qwen3": replace(TINY, model_type="qwen3", qk_norm="weighted"),
    "llama4": as_llama4(TINY),
}


class Sum:
    """What threads that call it together hand in, added in the order of their ranks."""

    def __init__(self, world: int) -> None:
        self.parts: list[Tensor] = [torch.empty(0)] * world
        self.barrier = threading.Barrier(world, timeout=30)

    def __call__(self, rank: int, part: Tensor) -> Tensor:
        self.parts[rank] = part
        self.barrier.wait()
        total = torch.stack(self.parts).sum(0)
        self.barrier.wait()
        return total


def rank_logits(config: ModelConfig, tensors: Any, quantized: bool, total: Sum, rank: int, world: int) -> Tensor:
    """Logits [M, V / world] of a prompt, then of a tree behind it, by one rank."""
    shard = Shard(rank, world)
    dtype = torch.bfloat16 if quantized else torch.float32
    model = DecoderModel(config, dtype, quantized, shard)
    dims = {name: getattr(parameter, "shard_dim", None) for name, parameter in model.named_parameters()}
    load_state(model, ((n, t if dims[n] is None else shard.part(t, dims[n])) for n, t in tensors))
    model.pack(Parallel(partial(total, rank)))
    cache = KVCache(config, 1, 64, dtype, torch.device("cpu"), ranks=world)
    prompt, tree = torch.tensor([random_text(20, 1)]), random_tree(1, 2)
    empty, prefix = torch.zeros(1, dtype=torch.int32), torch.full((1,), 20, dtype=torch.int32)
    filled, _ = model(ModelInputs(prompt, torch.arange(20, dtype=torch.int32)[None], empty), cache)
    behind, _ = model(ModelInputs(tree.tokens, prefix + tree.node_depths(), prefix, tree.paths()), cache)
    return torch.cat([model.logits(filled), model.logits(behind)])


@pytest.mark.parametrize(
    ("family", "quantized"), [*((family, False) for family in CONFIGS), ("llama", True), ("llama4", True)]
)
def test_two_ranks_are_one_model(family: str, quantized: bool) -> None:
    """Static input scales, because a token's own scale would be that of the rank's part of it."""
    config = CONFIGS[family]
    tensors = random_tensors(config, 3, dtype=torch.bfloat16 if quantized else torch.float32, quantized=quantized)
    tensors = [(n, torch.tensor(0.02) if n.endswith("input_scale") else t) for n, t in tensors]
    wanted = rank_logits(config, tensors, quantized, Sum(1), 0, 1)
    total = Sum(2)
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda rank: rank_logits(config, tensors, quantized, total, rank, 2), range(2)))
    assert [part.shape for part in parts] == [(28, 130)] * 2
    assert error(torch.cat(parts, 1), wanted) < (0.05 if quantized else 1e-5)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (Shard(0, 4), "4 ranks cannot share 2 KV heads evenly"),
        (Shard(0, 3), "3 ranks cannot share 4 query heads"),
        (Shard(2, 2), "rank 2 is not one of 2 ranks"),
    ],
)
def test_ranks_that_do_not_fit(shard: Shard, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderModel(TINY, torch.float32, shard=shard)


@pytest.mark.parametrize("family", ["llama", "qwen3", "llama4"])
def test_fp8_is_near_bfloat16(family: str) -> None:
    """For most tokens; one whose router was of two minds may go elsewhere."""
    config = CONFIGS[family]
    plain, quantized = (
        rank_logits(config, random_tensors(config, 3, dtype=torch.bfloat16, quantized=fp8), fp8, Sum(1), 0, 1)
        for fp8 in (False, True)
    )
    distance = (quantized - plain).norm(dim=1) / plain.norm(dim=1)
    assert 0.02 < distance.median() < 0.2


def test_quantized_parameters() -> None:
    """All linears of the layers but the router, with their scales; nothing is computed to make them."""
    with torch.device("meta"):
        model = DecoderModel(CONFIGS["llama4"], torch.bfloat16, quantized=True, shard=Shard(1, 2))
    parameters = dict(model.named_parameters())
    assert {p.device.type for p in parameters.values()} == {"meta"}
    quantized = {name for name, p in parameters.items() if p.dtype == FP8}
    assert quantized == {name for name in parameters if name.endswith("proj.weight")}
    up, down = (f"model.layers.1.feed_forward.experts.{name}_proj" for name in ("up", "down"))
    assert (parameters[f"{up}.weight"].shape, parameters[f"{up}.weight_scale"].shape) == ((4, 48, 64), (4, 48))
    assert (parameters[f"{down}.weight"].shape, parameters[f"{down}.weight_scale"].shape) == ((4, 64, 48), (4, 64))
    split = {name: p.shard_dim for name, p in parameters.items() if hasattr(p, "shard_dim")}
    assert (split[f"{up}.weight"], split[f"{up}.weight_scale"], split[f"{down}.weight"]) == (1, 1, 2)
    assert f"{down}.weight_scale" not in split
    assert split["lm_head.weight"] == 0
    assert not any("router" in name or "norm" in name or "input_scale" in name for name in split)
