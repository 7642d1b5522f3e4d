"""What fits, and random weights for models whose real ones are not at hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LLAMA4, fused, last_logits, same, weights, write
from parity import random_text

from specdec.nn import DecoderModel, ModelConfig, Shard
from specdec.target import memory
from specdec.target.llama import Llama
from specdec.target.loading import parse_shard
from specdec.target.presets import PRESETS
from specdec.target.random import fill_random
from specdec.weights import checkpoint

CPU = torch.device("cpu")
CONFIG = ModelConfig.from_huggingface(LLAMA4)
EXPERTS = "model.layers.1.feed_forward.experts"


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_maverick_as_it_is_known() -> None:
    """400.7B parameters; a rank of 8 holds 49.9 GB of FP8 linears, a shard of the head and the whole embedding."""
    config = ModelConfig.from_huggingface(PRESETS["maverick"])
    assert (len(config.moe_layers), config.moe_layers[0], config.nope_layers[:2]) == (24, 1, (3, 7))
    with torch.device("meta"):
        whole = DecoderModel(config, torch.bfloat16)
        rank = DecoderModel(config, torch.bfloat16, quantized=True, shard=Shard(0, 8))
    assert sum(parameter.numel() for parameter in whole.parameters()) == pytest.approx(400.7e9, rel=1e-4)
    assert sum(parameter.nbytes for parameter in rank.parameters()) == pytest.approx(52.2e9, rel=3e-3)
    assert memory.kv_bytes(config, Shard(0, 8), torch.bfloat16) == 2 * 48 * 128 * 2


def test_what_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, fused(weights()), LLAMA4)
    target = Llama(tmp_path, device="cpu")
    target.config = replace(target.config, max_positions=10**9)
    monkeypatch.setattr(memory, "capacity", lambda device: 10**8)
    with pytest.raises(ValueError, match=r"KV cache of 2\d{6} tokens needs 0.5 GB, and cpu has 0.1 GB: use more ranks"):
        target.allocate(2, 10**6, 8)
    monkeypatch.setattr(memory, "capacity", lambda device: 10**9)
    asked: dict[str, Any] = {"weights": "random", "preset": "maverick", "device": "cpu"}
    with pytest.raises(
        ValueError,
        match=r"rank 0 of 1 need 801.\d GB \(197 kB more .*, and cpu has 1.0 GB: use more ranks or target.quantize=fp8$",
    ):
        Llama(None, **asked)
    with pytest.raises(ValueError, match=r"rank 3 of 8 need 52.\d GB .* has 1.0 GB: use more ranks$"):
        Llama(None, **asked, quantize="fp8", shard="3/8")


def test_capacity_is_what_the_machine_has() -> None:
    assert 10**8 < memory.capacity(CPU) < 10**14


# ---- random weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["none", "fp8"])
def test_random_weights_keep_activations_finite(quantize: str, tmp_path: Path) -> None:
    """From a config.json alone; the same seed gives the same model."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA4))
    text = [token % LLAMA4["vocab_size"] for token in random_text(20, 3)]
    made = [
        last_logits(Llama(tmp_path, device="cpu", weights="random", quantize=quantize, seed=s), text) for s in (1, 1, 2)
    ]
    assert made[0].isfinite().all()
    assert 0.1 < made[0].std() < 10
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_random_ranks_agree_on_what_is_whole() -> None:
    models = [DecoderModel(CONFIG, torch.bfloat16, quantized=True, shard=Shard(rank, 2)) for rank in range(2)]
    for model in models:
        fill_random(model, 5)
        checkpoint.check_loaded(model)
    first, second = (dict(model.named_parameters()) for model in models)
    for name, parameter in first.items():
        if not name.endswith("_scale") and parameter.dim() > 1:
            assert same(parameter.data, second[name].data) != hasattr(parameter, "shard_dim"), name
    down = first[f"{EXPERTS}.down_proj.weight"].float() * first[f"{EXPERTS}.down_proj.weight_scale"][..., None]
    assert float(down.std()) == pytest.approx(CONFIG.intermediate_size**-0.5, rel=0.1)


def test_one_rank_by_itself(tmp_path: Path) -> None:
    """Its shapes, no process group: logits of its rows of the vocabulary, a cache of its heads."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA4))
    target = Llama(tmp_path, device="cpu", weights="random", quantize="fp8", shard="1/2")
    assert last_logits(target, [1, 2, 3]).shape == (32,)
    assert target.cache is not None
    assert target.cache.values.shape[2] == 1
    assert parse_shard(None) == Shard()
