"""Every layout of weights becomes the same parameters; what is not read is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import COMPRESSED, LAYOUTS, LLAMA4, MODELOPT, Tensors, fused, quantized, same, weights, write
from torch import Tensor

from specdec.kernels.reference import FP8
from specdec.nn import Shard
from specdec.target.formats import parameters, quantization, row_scales
from specdec.target.loading import make_model, open_source
from specdec.weights.lazy import LazyTensor, stack

CPU = torch.device("cpu")


def load(folder: Path, quantize: str = "auto", shard: Shard | None = None) -> Tensors:
    """The parameters of a model loaded from a folder."""
    source = open_source(folder, None, quantize, "checkpoint")
    model = make_model(source.config, source.tensors, torch.bfloat16, CPU, source.quantized, shard or Shard(), 0)
    return {name: parameter.data for name, parameter in model.named_parameters()}


def check(loaded: Tensors, wanted: Tensors) -> None:
    """Every parameter, and without an input scale a dynamic one."""
    dynamic = {name for name in loaded if name.endswith("input_scale")} - set(wanted)
    assert set(loaded) - dynamic == set(wanted)
    assert all(loaded[name] == 0 for name in dynamic)
    for name, value in wanted.items():
        assert same(loaded[name], value), name


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*KV cache here is not quantised")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path) -> None:
    wanted = LAYOUTS[layout](tmp_path)
    check(load(tmp_path), wanted)
    check(load(tmp_path, "fp8"), wanted)


@pytest.mark.filterwarnings("ignore:.*KV cache here is not quantised")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_multiplied_out(layout: str, tmp_path: Path) -> None:
    fp8 = LAYOUTS[layout](tmp_path)
    loaded = load(tmp_path, "none")
    for name, value in loaded.items():
        scale = fp8.get(f"{name}_scale")
        wanted = fp8[name] if scale is None else (fp8[name].float() * scale[..., None]).bfloat16()
        assert same(value, wanted), name
    assert set(loaded) == set(weights())


def test_unquantised_experts(tmp_path: Path) -> None:
    write(tmp_path, fused(weights()), LLAMA4)
    check(load(tmp_path), weights())


@pytest.mark.parametrize("skip", ["self_attn", "shared_expert", r"\.experts\.", "layers"])
def test_what_is_left_in_bf16_is_quantised_like_the_rest(skip: str, tmp_path: Path) -> None:
    """`layers`: nothing is FP8 yet."""
    write(tmp_path, fused(quantized(weights(), skip=skip)), LLAMA4)
    check(load(tmp_path, "fp8"), quantized(weights()))
    if skip != "layers":
        check(load(tmp_path), quantized(weights()))


def test_scales_of_the_cache_are_ignored_with_a_warning(tmp_path: Path) -> None:
    LAYOUTS["modelopt"](tmp_path)
    with pytest.warns(UserWarning, match="k_scale and its like are ignored: the KV cache here is not quantised"):
        load(tmp_path)


def test_a_copy_of_a_tied_head_is_left_out() -> None:
    tensors = [(name, LazyTensor.of(torch.ones(2, 2))) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    assert set(parameters(tensors, tied=True)) == {"model.embed_tokens.weight"}
    assert set(parameters(tensors, tied=False)) == {"model.embed_tokens.weight", "lm_head.weight"}


# ---- refused ---------------------------------------------------------------------------------------------------------


def refusals() -> list[tuple[dict[str, Any], str]]:
    """Quantisation settings and the words that name them."""
    group: dict[str, Any] = COMPRESSED["config_groups"]["group_0"]  # type: ignore[index]
    block = {"group_0": group | {"weights": {"strategy": "block"}}}
    weight_only = {"group_0": group | {"input_activations": None}}
    return [
        ({"quant_method": "awq"}, "quantised by awq, which"),
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq, which"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quantised by fp8, which"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantised by modelopt as NVFP4, which"),
        (COMPRESSED | {"format": "pack-quantized"}, "compressed-tensors as pack-quantized, which"),
        (COMPRESSED | {"config_groups": block}, "compressed-tensors with block-wise scales of the weights, which"),
        (COMPRESSED | {"config_groups": weight_only}, "with no-wise scales of the activations, which"),
    ]


@pytest.mark.parametrize(("stated", "words"), refusals())
def test_other_quantisations_are_named(stated: dict[str, Any], words: str, tmp_path: Path) -> None:
    for config in ({"quantization_config": stated}, {"text_config": {"quantization_config": stated}}):
        with pytest.raises(ValueError, match=f"{words} is not read here: read are .*ModelOpt FP8") as error:
            quantization(tmp_path, config)
        assert "\n" not in str(error.value)


def test_known_quantisations(tmp_path: Path) -> None:
    assert quantization(tmp_path, {}) is None
    assert quantization(tmp_path, {"quantization_config": COMPRESSED}) == "compressed-tensors"
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": MODELOPT}))
    assert quantization(tmp_path, {}) == "modelopt"
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    with pytest.raises(ValueError, match="modelopt as W4A8_AWQ"):
        quantization(tmp_path, {})


def lazily(**tensors: Tensor) -> list[tuple[str, LazyTensor]]:
    """Tensors of one linear layer."""
    return [(f"model.layers.0.mlp.up_proj.{name}", LazyTensor.of(tensor)) for name, tensor in tensors.items()]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"qweight": torch.ones(2, 2, dtype=torch.int32)}, "up_proj.qweight is torch.int32"),
        ({"weight": torch.ones(2, 2).to(torch.float8_e5m2)}, "up_proj.weight is torch.float8_e5m2"),
        ({"weight": torch.ones(4, 2).bfloat16(), "weight_scale": torch.ones(4)}, "a weight of torch.bfloat16"),
        ({"weight": torch.ones(4, 4).to(FP8), "weight_scale": torch.ones(2, 2)}, r"weight_scale \[2, 2\] is neither"),
        ({"weight": torch.ones(2, 2).to(FP8), "weight_scale": torch.ones(2).to(FP8)}, "weight_scale is torch.float8"),
    ],
)
def test_other_dtypes_and_scales_are_named(tensors: Tensors, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parameters(lazily(**tensors))


def test_broken_experts_are_named() -> None:
    stem, one = "model.layers.1.feed_forward.experts", LazyTensor.of(torch.ones(2, 2))
    for names in ((f"{stem}.0.up_proj.weight", f"{stem}.2.up_proj.weight"), (f"{stem}.1.up_proj.weight",)):
        with pytest.raises(ValueError, match=r"experts of .*experts.up_proj.weight are not all there"):
            parameters([(name, one) for name in names])
    with pytest.raises(ValueError, match="gate_up_proj_scale but no weight for it"):
        parameters([(f"{stem}.gate_up_proj_scale", one)])
    with pytest.raises(ValueError, match=r"model.norm.weight twice"):
        parameters([("model.norm.weight", one), ("language_model.model.norm.weight", one)])


# ---- lazy tensors ----------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_part_of_a_view_is_that_part(data: st.DataObject) -> None:
    """Any index into stacked, narrowed and transposed views agrees with torch's own."""
    wanted = torch.arange(3 * 6 * 5).view(3, 6, 5)
    lazy = stack([LazyTensor.of(expert) for expert in wanted]).narrow(1, 1, 4).transpose()
    wanted = wanted[:, 1:5].transpose(1, 2)
    assert lazy.shape == wanted.shape
    ends = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in lazy.shape]
    index = tuple(slice(start, stop) for start, stop in ends)
    assert torch.equal(lazy.read(index), wanted[index])


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((), (4,)), ((1,), (4,)), ((4,), (4,)), ((4, 1), (4,)), ((), (3, 4)), ((3,), (3, 4)), ((3, 1), (3, 4)),
     ((3, 4), (3, 4)), ((3, 1, 4), (3, 4)), ((3, 4, 1), (3, 4)), ((1,), (1, 1)), ((1, 4, 1), (1, 4))],
)  # fmt: skip
def test_scales_reach_their_rows(shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    scale = torch.rand(shape).bfloat16()
    spread = row_scales("x", LazyTensor.of(scale), rows).read()
    assert (spread.shape, spread.dtype) == (torch.Size(rows), torch.float32)
    whole = scale.float().view(-1)
    assert torch.equal(spread.flatten(), whole.repeat_interleave(spread.numel() // whole.numel()))
