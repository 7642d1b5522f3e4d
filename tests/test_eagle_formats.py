"""Heads as other projects publish them: the same head in every layout drafts the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import Tensors, head_config, head_tensors, in_fp8, write_head
from safetensors.torch import load_file, save_file
from test_eagle import Rows, made, width
from torch import Tensor

from specdec.decoding import SpeculativeDecoder
from specdec.drafter import _head
from specdec.drafter.eagle3 import Eagle3
from specdec.nn.eagle import SWITCHES, default_feature_layers
from specdec.target.toy import Toy
from specdec.train.speculators import main
from specdec.verifier.target_only import TargetOnly

Layout = Callable[[dict[str, Any], Tensors, Toy], tuple[dict[str, Any], Tensors]]


def safeailab(config: dict[str, Any], tensors: Tensors, toy: Toy) -> tuple[dict[str, Any], Tensors]:
    """Names no layers and brings the target's embedding along."""
    config = {key: value for key, value in config.items() if key not in ("feature_layers", "target_hidden_size")}
    return config, tensors | {"embed_tokens.weight": toy.embed.clone()}


def nvidia(config: dict[str, Any], tensors: Tensors, toy: Toy) -> tuple[dict[str, Any], Tensors]:
    """Layers counted after, and switches beside them."""
    config = dict(config)
    inner = {"eagle_aux_hidden_state_layer_ids": config.pop("feature_layers"), "use_aux_hidden_state": True}
    inner |= {key: config.pop(key) for key in SWITCHES if key in config}
    return config | {"eagle_config": inner}, tensors


def speculators(config: dict[str, Any], tensors: Tensors, toy: Toy) -> tuple[dict[str, Any], Tensors]:
    """Layers counted before; the layer's config inside, its tensors under another name."""
    outside = ("architectures", "feature_layers", "draft_vocab_size", "target_hidden_size")
    layer = {key: value for key, value in config.items() if key not in (*outside, *SWITCHES)}
    whole = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layer,
        "draft_vocab_size": config["draft_vocab_size"],
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in config["feature_layers"]],
        **{key: config.get(key, False) for key in SWITCHES},
    }
    return whole, {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}


def drafted(folder: Path, toy: Toy) -> tuple[float, list[list[int]], tuple[int, ...]]:
    """Acceptance length, answers and layers read."""
    drafter = Eagle3(folder, num_draft_tokens=3)
    result = SpeculativeDecoder(toy, drafter, TargetOnly()).generate([[5, 6, 7, 8, 9]], 40, ignore_eos=True)
    return result.trace.acceptance_length, result.tokens, tuple(drafter.features)  # type: ignore[arg-type]


def proposed(folder: Path, toy: Toy) -> Tensor:
    """What the head proposes behind two random texts."""
    rows = Rows(width(toy), toy.config.vocab_size)
    return made(folder, toy, 2, structure=[4, 2]).propose(rows.inputs(rows.begin([9, 5]), 3)).tokens


def written(layout: Layout, folder: Path, toy: Toy, drafts: int | None = 96, **changes: Any) -> Path:
    config = head_config(toy.config, drafts, **changes)
    config, tensors = layout(config, head_tensors(config), toy)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("drafts", [96, None])
@pytest.mark.parametrize("layout", [safeailab, nvidia, speculators])
def test_every_layout_is_the_same_head(layout: Layout, drafts: int | None, tmp_path: Path, toy: Toy) -> None:
    config = head_config(toy.config, drafts)
    write_head(tmp_path / "own", config, head_tensors(config))
    own = drafted(tmp_path / "own", toy)
    assert own[2] == default_feature_layers(toy.config.num_layers)
    assert drafted(written(layout, tmp_path / "published", toy, drafts), toy) == own


@pytest.mark.parametrize("layout", [safeailab, nvidia, speculators])
def test_every_layout_has_the_switches(layout: Layout, tmp_path: Path, toy: Toy) -> None:
    """Those that speculators trains with by default; the norm before fc is a tensor that nothing else can stand for."""
    switches = {"norm_before_residual": True, "norm_output": True, "norm_before_fc": True}
    config = head_config(toy.config, 96, **switches)
    own = proposed(write_head(tmp_path / "own", config, head_tensors(config)), toy)
    folder = written(layout, tmp_path / "published", toy, **switches)
    assert torch.equal(proposed(folder, toy), own)
    named = load_file(folder / "model.safetensors")
    norm = named.pop("input_norm.weight")
    save_file(named | {"input_norm.weight": norm.roll(64)}, folder / "model.safetensors")
    assert not torch.equal(proposed(folder, toy), own)
    save_file(named, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks input_norm\.weight"):
        proposed(folder, toy)


def test_the_wrong_convention_is_another_head(tmp_path: Path, toy: Toy) -> None:
    """Control: layers counted before, taken as counted after, are read one too late."""
    config = head_config(toy.config, 96, feature_layers=[0, 1])
    tensors = head_tensors(config)
    layers = {}
    for name, layout in (("nvidia", nvidia), ("speculators", speculators)):
        changed, named = layout(config, tensors, toy)
        (tmp_path / name).mkdir()
        if name == "speculators":
            changed["eagle_aux_hidden_state_layer_ids"] = [0 + 1, 1 + 1]
        (tmp_path / name / "config.json").write_text(json.dumps(changed))
        save_file(named, tmp_path / name / "model.safetensors")
        layers[name] = tuple(Eagle3(tmp_path / name).features)
    assert layers == {"nvidia": (0, 1), "speculators": (0, 1)}
    changed["eagle_aux_hidden_state_layer_ids"] = [0, 1]
    (tmp_path / "speculators" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"feature_layers \[-1, 0\]"):
        Eagle3(tmp_path / "speculators")


def test_what_is_not_computed_is_named(tmp_path: Path, toy: Toy) -> None:
    with pytest.raises(ValueError, match="use_mtp_layernorm is on"):
        Eagle3(written(nvidia, tmp_path / "a", toy, use_mtp_layernorm=True))
    folder = written(speculators, tmp_path / "b", toy)
    config = json.loads((folder / "config.json").read_text())
    config["transformer_layer_config"]["model_type"] = "qwen3"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model_type 'qwen3' has layers that are not computed in a head"):
        Eagle3(folder)


def test_an_embedding_of_its_own_is_refused(tmp_path: Path, toy: Toy) -> None:
    """A head that was trained over other embeddings than the target's would draft badly without a sign."""
    folder = written(safeailab, tmp_path / "a", toy)
    tensors = load_file(folder / "model.safetensors")
    one_row = toy.embed.clone()
    one_row[-1] = one_row[-1].roll(1) * 5
    for other in (torch.randn_like(toy.embed), toy.embed.roll(1, 0), one_row, toy.embed * torch.nan):
        save_file(tensors | {"embed_tokens.weight": other}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=r"embed_tokens.weight that differs from the target's by (\d+|nan)%"):
            drafted(folder, toy)
    save_file(tensors | {"embed_tokens.weight": toy.embed.bfloat16()}, folder / "model.safetensors")
    drafted(folder, toy)


def test_embeddings_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    theirs = ours + 0.1 * torch.arange(11)[:, None]
    for rows in (4, 100):
        monkeypatch.setattr(_head, "_ROWS", rows)
        assert _head._distance(theirs, ours) == pytest.approx(float((theirs - ours).norm() / ours.norm()))


@pytest.mark.parametrize(
    ("fp8", "switches"), [(False, {}), (True, {}), (False, {"norm_before_fc": True}), (False, {"fc_norm": True})]
)
def test_ours_goes_out_and_comes_back(fp8: bool, switches: dict[str, bool], tmp_path: Path, toy: Toy) -> None:
    config = head_config(toy.config, 96, **switches)
    tensors = {name: x.bfloat16() if x.dim() > 1 else x for name, x in head_tensors(config).items()}
    write_head(tmp_path / "own", config, in_fp8(tensors) if fp8 else tensors)
    main([str(tmp_path / "own"), str(tmp_path / "out"), "--verifier", "some/model"])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["eagle_aux_hidden_state_layer_ids"] == [i + 1 for i in config["feature_layers"]]
    there, back = drafted(tmp_path / "own", toy), drafted(tmp_path / "out", toy)
    assert there[1:] == back[1:]
    vectors = {name for name, x in tensors.items() if x.dim() == 1 and x.is_floating_point()}
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(out[name.replace("midlayer.", "layers.0.")], tensors[name]) for name in vectors)
    if not fp8:  # multiplied out in bfloat16, FP8 weights may round otherwise
        assert there == back
        assert torch.equal(proposed(tmp_path / "own", toy), proposed(tmp_path / "out", toy))


def test_what_is_not_ours_does_not_go_out(tmp_path: Path, toy: Toy) -> None:
    folder = written(safeailab, tmp_path / "a", toy)
    with pytest.raises(SystemExit, match="names no feature_layers"):
        main([str(folder), str(tmp_path / "out"), "--verifier", "some/model"])
