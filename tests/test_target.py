"""Our Llama against transformers on small random checkpoints, on both backends, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import (
    SCENARIOS,
    TOLERANCE,
    check_prefill,
    check_taps,
    check_verify,
    error,
    llama_config,
    plain_logits,
    plain_states,
    prefill,
    random_text,
    random_tree,
    save_model,
    start,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.kernels.reference import FP8
from specdec.nn import KVCache, ModelConfig
from specdec.target import Target
from specdec.target.backends import choose_device
from specdec.target.llama import Llama
from specdec.types import ModelInputs

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3},
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_model(llama_config(**CHECKPOINTS[request.param]), folder)


@pytest.fixture(scope="module", params=["native", "torch"])
def target(request: pytest.FixtureRequest, saved: tuple[Path, Any]) -> Llama:
    return Llama(saved[0], dtype="float32", device="cpu", backend=request.param, prefill_chunk=32)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_agrees_with_transformers(target: Llama, saved: tuple[Path, Any], scenario: Any) -> None:
    scenario(target, saved[1])


def test_taps(target: Llama, saved: tuple[Path, Any]) -> None:
    check_taps(target, saved[1], saved[1].model.norm)


@torch.no_grad()
def test_prompts_that_share_a_forward(saved: tuple[Path, Any]) -> None:
    """As on a GPU: short prompts in one padded forward, the long one by itself; rows in use stay as they are."""
    target = Llama(saved[0], dtype="float32", device="cpu", backend="torch", prefill_chunk=32)
    assert not target.shares_prompts
    target.shares_prompts = True
    assert target._shares([9, 0, 40, 7, 3, 12]) == [[4, 3, 0], [5], [2]]
    kept, texts = random_text(20, 1), [random_text(length, length) for length in (9, 40, 7, 3)]
    start(target, [kept, [], [], [], []], [1])
    output = prefill(target, [[], *texts])
    for row, text in enumerate(texts, 1):
        assert error(output.logits[row, 0], plain_logits(saved[1], text)[-1]) < TOLERANCE
        assert error(output.features[row, : len(text)], plain_states(saved[1], text)[2]) < TOLERANCE
        assert not output.features[row, len(text) :].any()
    check_verify(target, saved[1], [kept, *texts], random_tree(5, 2))


def test_attributes(target: Llama, saved: tuple[Path, Any]) -> None:
    assert isinstance(target, Target)
    assert target.checkpoint == saved[0]
    assert target.tokenizer is None
    assert torch.equal(target.embed, saved[1].get_input_embeddings().weight)
    assert torch.equal(target.lm_head, saved[1].get_output_embeddings().weight)


@torch.no_grad()
def test_early_exit(target: Llama, saved: tuple[Path, Any]) -> None:
    """The first layers, then the final norm and the head."""
    model, text = saved[1], random_text(12, 1)
    start(target, [text[:-1]])
    root = torch.tensor([text[-1:]])
    for layers in (1, 2):
        inputs = ModelInputs(root, target.lengths[:, None], target.lengths)
        wanted = model.lm_head(model.model.norm(plain_states(model, text)[layers][-1]))
        assert error(target.forward(inputs, layers=layers).logits[0, 0], wanted) < TOLERANCE


def test_parity_sees_a_wrong_rope(tmp_path: Path) -> None:
    """Negative control: without its scaling the same checkpoint fails."""
    model = save_model(llama_config(rope_parameters=LLAMA3), tmp_path)
    rewrite(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    with pytest.raises(AssertionError):
        check_prefill(Llama(tmp_path, dtype="float32", prefill_chunk=32), model)


def test_old_and_new_spelling_of_rope() -> None:
    new = llama_config(rope_parameters=LLAMA3).to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old |= {"rope_theta": LLAMA3["rope_theta"], "rope_scaling": scaling}
    first, second = ModelConfig.from_huggingface(new), ModelConfig.from_huggingface(old)
    assert first.rope_theta == second.rope_theta == 10_000.0
    assert first.rope_scaling is not None
    assert second.rope_scaling is not None
    assert {key: first.rope_scaling[key] for key in scaling} == dict(second.rope_scaling)


def test_bfloat16_is_near(saved: tuple[Path, Any]) -> None:
    text = random_text(20, 2)
    target = Llama(saved[0], dtype="bfloat16", prefill_chunk=32)
    assert error(start(target, [text]).logits[0, 0], plain_logits(saved[1], text)[-1]) < 0.1


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(llama_config(num_hidden_layers=1), tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def to_nan(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.0.self_attn.k_proj.weight"), "lacks model.layers.0.self_attn.k_proj.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "in excess extra"),
        (to_nan, "up_proj.weight holds NaN"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"model.norm.weight is \[7\] in the checkpoint"),
    ],
    ids=["missing", "leftover", "nan", "shape"],
)
def test_bad_weights(folder: Path, edit: Any, message: str) -> None:
    damage(folder, edit)
    with pytest.raises(ValueError, match=message):
        Llama(folder)


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        Llama(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not one this runtime computes"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling .*yarn"),
        ({"num_key_value_heads": 4}, "6 query heads do not share 4 KV heads"),
    ],
)
def test_unsupported_models(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=message):
        Llama(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "target.dtype=int8 is unknown; choose one of float32, bfloat16"),
        ({"backend": "cuda"}, "target.backend=cuda is unknown"),
        ({"prefill_chunk": 0}, "target.prefill_chunk=0"),
        ({"threads": 0}, "target.threads=0 must be at least 1"),
        *[
            ({"device": name}, f"target.device={name} is unknown; choose auto")
            for name in ("mps", "gpu", "cuda:x", "cpu:1")
        ],
    ],
)
def test_bad_options(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llama(folder, **options)


@pytest.mark.parametrize(
    ("found", "device", "message"),
    [(0, "cuda", "finds no GPU: use target.device=cpu"), (2, "cuda:2", "torch finds 2 GPUs, the first being cuda:0")],
)
def test_a_gpu_that_is_not_there(found: int, device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    with pytest.raises(ValueError, match=f"target.device={device}, but .*{message}"):
        choose_device(device)
    if found:
        assert [str(choose_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
            "cuda",
            "cuda",
            "cuda:1",
            "cpu",
        ]


def test_native_refuses_shapes_it_cannot_compute(tmp_path: Path) -> None:
    save_model(llama_config(head_dim=24, num_hidden_layers=1), tmp_path)
    with pytest.raises(ValueError, match=r"use target\.backend=torch"):
        Llama(tmp_path, backend="native")
    assert Llama(tmp_path).backend == "torch"


def test_too_long(folder: Path) -> None:
    with pytest.raises(ValueError, match="need 513 positions, the model has 512"):
        Llama(folder).allocate(1, 513, 1)


@pytest.mark.parametrize("tap", [-1, 1, "last"])
def test_bad_tap(folder: Path, tap: int | str) -> None:
    with pytest.raises(ValueError, match=f"features tap layer {tap!r}"):
        Llama(folder).allocate(1, 8, 1, [tap])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"kv_dtype": "fp8"}, "kv_dtype=fp8 needs the kernels of a GPU.*backend native on cpu"),
        ({"kv_dtype": "int8"}, "kv_dtype=int8 is unknown"),
        ({"exchange": "direct"}, "exchange=direct needs several ranks on GPUs"),
        ({"exchange": "mail"}, "exchange=mail is unknown; choose auto, direct or nccl"),
    ],
)
def test_what_this_target_cannot_have(saved: tuple[Path, Any], option: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llama(saved[0], dtype="float32", device="cpu", backend="native", **option)


def test_an_fp8_cache_keeps_a_path() -> None:
    """Bit for bit as one in f32 does."""
    config, device = ModelConfig(16, 32, 32, 2, 2, 1, 32), torch.device("cpu")
    wide, narrow = (KVCache(config, 2, 16, dtype, device) for dtype in (torch.float32, FP8))
    for plain, small in ((wide.keys, narrow.keys), (wide.values, narrow.values)):
        small.copy_(torch.randn(small.shape))
        plain.copy_(small)
    before, path = wide.keys.clone(), torch.tensor([[0, 2, 5], [0, 3, 3]], dtype=torch.int32)
    for cache in (wide, narrow):
        cache.keep_path(torch.tensor([3, 4], dtype=torch.int32), path, torch.tensor([2, 1]))
    assert torch.equal(wide.keys, narrow.keys.float())
    assert torch.equal(wide.values, narrow.values.float())
    assert torch.equal(wide.keys[:, 0, :, 4:6], before[:, 0, :, [5, 8]])  # nodes 2 and 5 stand behind the root
