"""Llama 4 and Qwen3 against transformers, FP8 weights, experts, and one model in two ranks.

Shapes: M tokens, K inputs, N outputs, X experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import SCENARIOS, SIZES, check_prefill, check_taps, save_model
from torch import Tensor
from transformers import Llama4TextConfig, Qwen3Config

from specdec.decoding import SpeculativeDecoder
from specdec.drafter.none import NoDraft
from specdec.nn import ModelConfig
from specdec.target.llama import Llama
from specdec.target.toy import Toy
from specdec.testing import Replay
from specdec.verifier.target_only import TargetOnly

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
NARROW: dict[str, Any] = SIZES | {"hidden_size": 96, "intermediate_size": 80}
LLAMA4: dict[str, Any] = NARROW | {
    "num_hidden_layers": 5,
    "intermediate_size_mlp": 112,
    "num_local_experts": 5,
    "attention_chunk_size": 16,
    "floor_scale": 8,
    "attn_scale": 0.3,
}
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3Config(**NARROW, num_hidden_layers=3),
    "qwen3-tied": lambda: Qwen3Config(**NARROW, num_hidden_layers=3, tie_word_embeddings=True),
    "maverick": lambda: Llama4TextConfig(**LLAMA4, interleave_moe_layer_step=2, use_qk_norm=False),
    "scout": lambda: Llama4TextConfig(**LLAMA4, rope_parameters=LLAMA3),
    "untempered": lambda: Llama4TextConfig(**LLAMA4 | {"attn_temperature_tuning": False, "num_hidden_layers": 4}),
}


class Model(Llama):
    """A target over tensors in memory."""

    def __init__(self, config: ModelConfig, tensors: Any) -> None:
        self._build(config, tensors, "float32", "cpu", "torch", 32, None)


def renamed(model: Any) -> Iterator[tuple[str, Tensor]]:
    """transformers' tensors under this runtime's names: experts have their gate and up apart, and inputs last."""
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.transpose(1, 2).chunk(2, 1)
            stem = name.removesuffix("gate_up_proj")
            yield from ((f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up))
        elif name.endswith("experts.down_proj"):
            yield f"{name}.weight", tensor.transpose(1, 2)
        elif not (tied and name == "lm_head.weight"):
            yield name, tensor


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_model(MODELS[request.param](), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def target(model: Any) -> Model:
    return Model(ModelConfig.from_huggingface(model.config.to_dict()), renamed(model))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_agrees_with_transformers(target: Model, model: Any, scenario: Any) -> None:
    """The texts pass several attention chunks and temperature steps, in prefill, trees and decoding."""
    scenario(target, model)


def test_taps(target: Model, model: Any) -> None:
    check_taps(target, model, model.model.norm)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_chunk": 0},
        {"attention_chunk": 17},
        {"temperature_scale": 0.0},
        {"temperature_floor": 9},
        {"interleaved_rope": False},
        {"qk_norm": "unit"},
        {"nope_layers": ()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_parity_sees_a_wrong_rule(tmp_path: Any, changes: dict[str, Any]) -> None:
    """Negative controls: each rule of Llama 4 left out or off by one."""
    model = save_model(MODELS["maverick"](), tmp_path)
    config = ModelConfig.from_huggingface(model.config.to_dict())
    with pytest.raises(AssertionError):
        check_prefill(Model(replace(config, **changes), renamed(model)), model)


def test_parity_sees_missing_weights_of_norms(tmp_path: Any) -> None:
    """Negative control: Qwen3's q and k norms are applied, not only loaded."""
    model = save_model(MODELS["qwen3"](), tmp_path)
    tensors = ((n, torch.ones_like(t) if "q_norm" in n else t) for n, t in renamed(model))
    with pytest.raises(AssertionError):
        check_prefill(Model(ModelConfig.from_huggingface(model.config.to_dict()), tensors), model)


# ---- reading config.json ---------------------------------------------------------------------------------------------

MAVERICK = {
    "model_type": "llama4_text",
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "no_rope_layers": [],
    "max_position_embeddings": 1048576,
}


def test_maverick() -> None:
    """The pattern of the published model, from a file that leaves defaults out, wrapped with its vision part or not."""
    wrapped = {"model_type": "llama4", "text_config": MAVERICK, "vision_config": {}, "eos_token_id": [7, 8]}
    config = ModelConfig.from_huggingface(wrapped)
    assert replace(config, eos_token_ids=()) == ModelConfig.from_huggingface(MAVERICK)
    assert config.eos_token_ids == (7, 8)
    assert config.moe_layers == tuple(range(1, 48, 2))
    assert config.nope_layers == tuple(range(3, 48, 4))
    assert (config.mlp_size, config.intermediate_size, config.num_experts) == (16384, 8192, 128)
    near, far = config.attention_rule(0), config.attention_rule(3)
    assert (near.rope, near.chunk, near.unit_norm, near.temperature_scale) == (True, 8192, False, 0.0)
    assert (far.rope, far.chunk, far.temperature_scale, far.temperature_floor) == (False, 0, 0.1, 8192)
    assert config.rope_theta == 500_000.0
    assert ModelConfig.from_huggingface(MAVERICK | {"use_qk_norm": True}).attention_rule(0).unit_norm


QWEN3 = NARROW | {"model_type": "qwen3", "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MAVERICK | {"num_experts_per_tok": 2}, "num_experts_per_tok = 2"),
        (MAVERICK | {"attention_bias": True}, "attention_bias = True"),
        (MAVERICK | {"layer_types": ["full_attention"] * 48}, "layer_types .* is not computed here"),
        (QWEN3 | {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 99}, "sliding_window = 99"),
        (QWEN3 | {"layer_types": ["sliding_attention"] * 2}, "sliding_window"),
        (QWEN3 | {"attention_bias": True}, "attention_bias = True"),
    ],
)
def test_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_huggingface(config)


def test_an_unused_window_is_no_fault() -> None:
    unused = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 99}
    assert ModelConfig.from_huggingface(QWEN3 | unused).qk_norm == "weighted"


# ---- toys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "llama4"])
def test_toys_decode_speculatively(family: str, tree: bool) -> None:
    """Drafts of which about a third are wrong change nothing, and save steps."""
    toy, prompts = (
        Toy(family=family, backend="torch"),
        [list(b"abcabcabcabcab"), list(b"a longer prompt than that one")],
    )
    plain = SpeculativeDecoder(toy, NoDraft(), TargetOnly(), batch_size=2).generate(prompts, 24, ignore_eos=True)
    references = [prompt + tokens for prompt, tokens in zip(prompts, plain.tokens, strict=True)]
    drafter = Replay(references, tree=tree)
    drafted = SpeculativeDecoder(toy, drafter, TargetOnly(), batch_size=2).generate(prompts, 24, ignore_eos=True)
    assert drafted.tokens == plain.tokens
    assert drafted.trace.num_accepted.shape[1] < 20


@pytest.mark.parametrize(("family", "backend"), [("llama", "native"), ("qwen3", "torch"), ("llama4", "torch")])
def test_the_compiled_backend_is_for_plain_layers(family: str, backend: str) -> None:
    toy = Toy(family=family, device="cpu")
    assert toy.config.plain == (family == "llama")
    assert toy.backend == backend


def test_unknown_toy() -> None:
    with pytest.raises(ValueError, match=r"target\.family=gpt is unknown; choose one of llama, qwen3, llama4"):
        Toy(family="gpt")
