"""Checkpoint reading: single and sharded safetensors, strict loading, one clear sentence for each kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor, nn

from specdec.weights import checkpoint
from specdec.weights.checkpoint import (
    check_loaded,
    fill_nan,
    iter_tensors,
    load_into,
    load_state,
    match,
    read_config,
    resolve,
)

INDEX = "model.safetensors.index.json"


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.register_buffer("scale", torch.zeros(2, dtype=torch.int32))
        if tied:
            self.head.weight = self.embed.weight


def tensors() -> dict[str, Tensor]:
    return {
        "embed.weight": torch.arange(20.0).view(5, 4),
        "head.weight": -torch.arange(20.0).view(5, 4),
        "scale": torch.tensor([3, 4], dtype=torch.int32),
    }


def write_sharded(folder: Path) -> None:
    state = tensors()
    shards = {"a.safetensors": ["embed.weight", "scale"], "b.safetensors": ["head.weight"]}
    for file, names in shards.items():
        save_file({name: state[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
def test_round_trip(tmp_path: Path, sharded: bool) -> None:
    write_sharded(tmp_path) if sharded else save_file(tensors(), tmp_path / "model.safetensors")
    net = Net().to(torch.bfloat16)
    load_into(net, tmp_path)
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == (torch.int32 if name == "scale" else torch.bfloat16)
        assert torch.equal(tensor.to(tensors()[name].dtype), tensors()[name])


def test_rename_maps_and_drops(tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in tensors().items()} | {"rope.inv_freq": torch.ones(1)}
    save_file(state, tmp_path / "model.safetensors")
    net = Net()
    load_into(net, tmp_path, rename=lambda name: None if name == "rope.inv_freq" else name.removeprefix("model."))
    assert torch.equal(net.head.weight, tensors()["head.weight"])


def test_one_name_is_enough_for_tied_parameters() -> None:
    state = tensors()
    del state["head.weight"]
    net = Net(tied=True)
    load_state(net, state.items())
    assert torch.equal(net.head.weight, state["embed.weight"])


def test_strict_about_keys_and_shapes() -> None:
    state = tensors()
    extra = [(f"more.{i}", torch.ones(1)) for i in range(5)]
    with pytest.raises(
        ValueError, match=r"lacks embed.weight, head.weight, scale and has in excess more.0, .* and 2 more"
    ):
        load_state(Net(), extra)
    with pytest.raises(ValueError, match=r"head.weight is \[4, 5\] in the checkpoint but \[5, 4\] in the model"):
        load_state(Net(), (state | {"head.weight": torch.ones(4, 5)}).items())
    with pytest.raises(ValueError, match="holds scale twice"):
        load_state(Net(), [*state.items(), ("scale", state["scale"])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_nan_is_found_and_named(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    fill_nan(net)
    with pytest.raises(ValueError, match=r"embed.weight, head.weight hold NaN after loading"):
        check_loaded(net)
    bad = tensors()
    bad["head.weight"][4, 3] = torch.nan
    with pytest.raises(ValueError, match=r"head.weight holds NaN as loaded"):
        load_state(net, bad.items())
    load_state(net, tensors().items())
    check_loaded(net)


def test_every_fp8_bit_pattern() -> None:
    """NaN is 0x7F and 0xFF, and nothing else is taken for it."""
    net = nn.Linear(16, 16, bias=False).to(torch.float8_e4m3fn)
    patterns = torch.arange(256, dtype=torch.uint8)
    for bad in (0x7F, 0xFF):
        fine = patterns.clone()
        fine[[0x7F, 0xFF]] = 0
        load_state(net, [("weight", fine.view(torch.float8_e4m3fn).view(16, 16))])
        fine[bad] = bad
        with pytest.raises(ValueError, match="weight holds NaN"):
            load_state(net, [("weight", fine.view(torch.float8_e4m3fn).view(16, 16))])


def test_match_needs_no_memory() -> None:
    with torch.device("meta"):
        net = Net()
    assert set(match(net, tensors().items())) == set(tensors())
    with pytest.raises(ValueError, match="lacks scale"):
        match(net, [item for item in tensors().items() if item[0] != "scale"])


def test_fp8_needs_its_scales() -> None:
    """A weight in FP8 for a parameter that is not."""
    net, data = nn.Linear(4, 2, bias=False), torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]]).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="lacks weight_scale"):
        load_state(net, [("weight", data)])
    deep = nn.Sequential(net)
    load_state(deep, [("0.weight", data), ("0.weight_scale", torch.tensor([2.0, 0.5]))])
    assert torch.equal(net.weight, torch.tensor([[2.0, 4, 6, 8], [2, 1.5, 1, 0.5]]))


def test_nan_is_found_beyond_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_CHUNK", 3)
    net = Net()
    with torch.no_grad():
        net.embed.weight[4, 3] = torch.nan
    with pytest.raises(ValueError, match=r"embed.weight hold NaN"):
        check_loaded(net)


@pytest.mark.parametrize("keep", [0, 4, 60, 200])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    assert keep < path.stat().st_size
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut short .*: delete it and fetch"):
        list(iter_tensors(tmp_path))


def test_shards_that_do_not_fit_the_index(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors and .* disagree about head.weight, other: fetch"):
        list(iter_tensors(tmp_path))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b.safetensors is missing"):
        list(iter_tensors(tmp_path))
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        list(iter_tensors(tmp_path))
    (tmp_path / INDEX).unlink()
    with pytest.raises(ValueError, match=r"has a.safetensors but neither .*index.json nor model.safetensors: fetch"):
        list(iter_tensors(tmp_path))


def test_folders_without_safetensors_or_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no weights; safetensors only"):
        list(iter_tensors(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has only pytorch_model.bin; safetensors only"):
        list(iter_tensors(tmp_path))
    with pytest.raises(ValueError, match=r"has no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    assert read_config(tmp_path) == {"vocab_size": 7}


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="no checkpoint folder /no/such/folder"):
        resolve("/no/such/folder")
    asked: list[tuple[str, list[str]]] = []

    def offline(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(checkpoint, "snapshot_download", offline)
    with pytest.raises(
        ValueError, match="some/model is neither a folder nor a Hub repository that can be downloaded now"
    ):
        resolve("some/model")
    assert asked[0][0] == "some/model"
    assert not {"*.bin", "*.py", "*.pt"} & set(asked[0][1])
    with pytest.raises(ValueError, match="some/model"):
        resolve("some/model", weights=False)
    assert set(asked[0][1]) - set(asked[1][1]) == {"*.safetensors"}
