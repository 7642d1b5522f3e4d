"""Loading a rank's part and no more, quantising on the way, and mistakes found before any data is read."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, LLAMA4, Tensors, fused, last_logits, quantized, same, weights, write, write_compressed
from parity import error, llama_config, plain_logits, random_text, save_model
from torch import Tensor, nn
from transformers import Llama4TextConfig

from specdec.kernels.reference import FP8
from specdec.nn import DecoderModel, ModelConfig, Shard
from specdec.target.llama import Llama
from specdec.target.loading import make_model, open_source
from specdec.weights import checkpoint, convert
from specdec.weights.checkpoint import iter_tensors, load_state, match
from specdec.weights.lazy import Index, LazyTensor

CPU = torch.device("cpu")
CONFIG = ModelConfig.from_huggingface(LLAMA4)
EXPERTS = "model.layers.1.feed_forward.experts"


def load(folder: Path, quantize: str = "auto", shard: Shard | None = None) -> DecoderModel:
    """A filled model, before it is packed."""
    source = open_source(folder, None, quantize, "checkpoint")
    return make_model(source.config, source.tensors, torch.bfloat16, CPU, source.quantized, shard or Shard(), 0)


# ---- a rank's part ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*KV cache here is not quantised")
@pytest.mark.parametrize("quantize", ["auto", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_hold_slices_of_the_whole(
    layout: str, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_BLOCK", 100)  # many blocks a parameter
    LAYOUTS[layout](tmp_path)
    check_ranks(tmp_path, quantize)


def test_quantising_gives_every_split_the_same_numbers(tmp_path: Path) -> None:
    write(tmp_path, fused(weights()), LLAMA4)
    check_ranks(tmp_path, "fp8")


def check_ranks(folder: Path, quantize: str) -> None:
    """Two ranks' parameters against those of one."""
    whole = dict(load(folder, quantize).named_parameters())
    split = 0
    for rank in range(2):
        shard = Shard(rank, 2)
        for name, part in load(folder, quantize, shard).named_parameters():
            dim = getattr(part, "shard_dim", None)
            split += dim is not None
            wanted = whole[name].data if dim is None else shard.part(whole[name].data, dim)
            assert same(part.data, wanted), name
    assert split > 20


class Counted:
    """Counts the elements that are read of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.read = tensor, 0

    def lazy(self) -> LazyTensor:
        return LazyTensor(tuple(self.tensor.shape), self.tensor.dtype, self.fetch)

    def fetch(self, index: Index) -> Tensor:
        part = self.tensor[index]
        self.read += part.numel()
        return part


def test_a_rank_reads_its_own_part() -> None:
    counted = {name: Counted(value) for name, value in weights().items()}
    with torch.device("meta"):
        plan = DecoderModel(CONFIG, torch.bfloat16, shard=Shard(1, 2))
    lazies = {name: one.lazy() for name, one in counted.items()}
    assert len(match(plan, lazies.items(), Shard(1, 2))) == len(lazies)
    assert not any(one.read for one in counted.values())
    model = DecoderModel(CONFIG, torch.bfloat16, shard=Shard(1, 2))
    load_state(model, lazies.items(), Shard(1, 2))
    for name, parameter in model.named_parameters():
        assert counted[name].read == parameter.numel(), name


def test_quantising_reads_whole_rows_only_where_they_are_split() -> None:
    counted = {name: Counted(value) for name, value in weights().items()}
    model = DecoderModel(CONFIG, torch.bfloat16, quantized=True, shard=Shard(1, 2))
    load_state(model, [(name, one.lazy()) for name, one in counted.items()], Shard(1, 2))
    for name, parameter in model.named_parameters():
        if parameter.dtype == FP8:
            twice = 2 if parameter.shard_dim == parameter.dim() - 1 else 1  # type: ignore[attr-defined]
            assert counted[name].read == twice * parameter.numel(), name


def test_a_file_outlives_its_listing(tmp_path: Path) -> None:
    """Tensors are read after the generator has closed the files, scalars too."""
    write(tmp_path, {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3.0)}, {}, files=2)
    tensors = dict(iter_tensors(tmp_path))
    assert torch.equal(tensors["a"].narrow(1, 1, 2).read(), torch.tensor([[1.0, 2], [4, 5]]))
    assert tensors["b"].read() == 3


# ---- quantised models ------------------------------------------------------------------------------------------------


def test_agrees_with_transformers(tmp_path: Path) -> None:
    sizes = {key: value for key, value in LLAMA4.items() if key not in ("model_type", "rope_theta")}
    model = save_model(Llama4TextConfig(**sizes, eos_token_id=None, bos_token_id=None, pad_token_id=0), tmp_path)
    text = [token % LLAMA4["vocab_size"] for token in random_text(40, 1)]
    target = Llama(tmp_path, dtype="float32", device="cpu")
    wanted = plain_logits(model, text)[-1]
    assert error(last_logits(target, text), wanted) < 1e-4
    coarse = error(last_logits(Llama(tmp_path, device="cpu", quantize="fp8"), text), wanted)
    assert 1e-3 < coarse < 0.2


@pytest.mark.filterwarnings("ignore:.*KV cache here is not quantised")
@pytest.mark.parametrize("layout", ["fbgemm", "compressed"])
def test_fp8_is_near_its_weights_multiplied_out(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path)
    text = [token % LLAMA4["vocab_size"] for token in random_text(30, 2)]
    exact = last_logits(Llama(tmp_path, dtype="float32", device="cpu", quantize="none"), text)
    assert 1e-4 < error(last_logits(Llama(tmp_path, device="cpu"), text), exact) < 0.15


def test_rows_of_zeros_and_nan_when_quantising() -> None:
    made = weights()
    name = "model.layers.0.feed_forward.down_proj.weight"
    made[name][3] = 0
    model = DecoderModel(CONFIG, torch.bfloat16, quantized=True)
    load_state(model, made.items())
    linear = model.get_submodule(name.removesuffix(".weight"))
    assert isinstance(linear.weight, Tensor)
    assert not linear.weight[3].float().any()
    made[name][5, -1] = torch.nan  # in the columns of rank 1: both ranks must see it
    for rank in range(2):
        part = DecoderModel(CONFIG, torch.bfloat16, quantized=True, shard=Shard(rank, 2))
        with pytest.raises(ValueError, match=f"{name} holds NaN as loaded to torch.float8_e4m3fn"):
            load_state(part, made.items(), Shard(rank, 2))


# ---- mistakes --------------------------------------------------------------------------------------------------------


def changed(change: Callable[[Tensors], Any]) -> Tensors:
    """The tensors of an fbgemm checkpoint after some accident."""
    tensors = fused(quantized(weights()))
    change(tensors)
    return tensors


def cut(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.o_proj.weight"] = tensors["model.layers.0.self_attn.o_proj.weight"][:-1]
    tensors["model.layers.0.self_attn.o_proj.weight_scale"] = torch.ones(47, 1)


@pytest.mark.parametrize("quantize", ["auto", "none"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"), "lacks model.layers.1.self_attn.k_proj.weight"),
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight_scale"), r"lacks model.*k_proj.weight_scale"),
        (lambda t: t.pop(f"{EXPERTS}.down_proj_scale"), rf"lacks {EXPERTS}.down_proj.weight_scale"),
        (lambda t: t.update({"model.layers.2.x.weight": torch.ones(1)}), "has in excess model.layers.2.x.weight"),
        (cut, r"o_proj.weight is \[47, 64\] in the checkpoint but \[48, 64\] in the model"),
    ],
)
def test_headers_tell(
    change: Callable[[Tensors], Any], words: str, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before memory is taken: no data is read."""
    write(tmp_path, changed(change), LLAMA4)

    def refuse(self: LazyTensor, index: Index | None = None) -> Tensor:
        raise AssertionError("data is being read")

    monkeypatch.setattr(LazyTensor, "read", refuse)
    with pytest.raises(ValueError, match=words):
        Llama(tmp_path, device="cpu", quantize=quantize)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": "int4"}, "target.quantize=int4 is unknown; choose one of auto, fp8, none"),
        ({"weights": "none"}, "target.weights=none is unknown; choose one of checkpoint, random"),
        ({"shard": "8/8"}, "target.shard=8/8 is not a rank and how many there are"),
        ({"shard": "1"}, "target.shard=1 is not"),
        ({"shard": "0/4"}, "4 ranks cannot share 2 KV heads evenly"),
        ({"backend": "native"}, "target.backend=native needs head_dim .*: use target.backend=torch"),
        ({"dtype": "float16"}, "target.dtype=float16 is unknown"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_compressed(tmp_path)
    with pytest.raises(ValueError, match=words):
        Llama(tmp_path, **{"device": "cpu", **options})


def test_sources_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names no weights: give a folder or Hub name, or target.weights=random"):
        Llama(None)
    with pytest.raises(ValueError, match=r"target.preset=None is unknown; choose one of maverick"):
        Llama(None, weights="random")
    write(tmp_path, {}, LLAMA4 | {"model_type": "gpt2"})
    with pytest.raises(ValueError, match="model_type 'gpt2' is not one this runtime computes"):
        Llama(tmp_path)
    write(tmp_path, {}, LLAMA4 | {"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ValueError, match="is quantised by awq, which is not read here"):
        Llama(tmp_path)
    write(tmp_path, fused(weights()), LLAMA4, files=2)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is missing"):
        Llama(tmp_path)


def test_fp8_llama_on_the_cpu_takes_the_reference(tmp_path: Path) -> None:
    save_model(llama_config(num_hidden_layers=1), tmp_path)
    assert Llama(tmp_path, device="cpu").backend == "native"
    assert Llama(tmp_path, device="cpu", quantize="fp8").backend == "torch"
    with pytest.raises(ValueError, match="native computes whole models on the CPU, and not in FP8"):
        Llama(tmp_path, device="cpu", quantize="fp8", backend="native")


# ---- progress --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_where_someone_looks_and_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"weight": torch.ones(4, 4)}
    for long, terminal, seen in ((0, Terminal(), True), (0, io.StringIO(), False), (1 << 30, Terminal(), False)):
        monkeypatch.setattr(checkpoint, "_LONG", long)
        monkeypatch.setattr(sys, "stderr", terminal)
        load_state(nn.Linear(4, 4, bias=False), made.items())
        assert ("loading" in terminal.getvalue()) == seen
