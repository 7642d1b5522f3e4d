"""A small Llama distilled from the target: what is trained is what is exported, also in FP8, and it learns to be accepted.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import CommandLine, check_mistake
from questions import write_questions
from safetensors.torch import load_file, save_file
from test_train import QUIET, TEXT_LEN, nothing, spoken, trainer
from torch import Tensor

import specdec as package
from specdec.decoding import SpeculativeDecoder
from specdec.drafter.small_model import SmallModel
from specdec.kernels.reference import FP8
from specdec.nn import Shard
from specdec.target.llama import Llama
from specdec.target.loading import make_model, open_source
from specdec.target.toy import Toy
from specdec.testing import check_drafter
from specdec.train.export import export
from specdec.train.small_model import SmallLlama, make_head, principal_table
from specdec.train.vocabulary import draft_vocabulary
from specdec.types import ModelInputs
from specdec.verifier.target_only import TargetOnly

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}


def random_model(target: Any, seed: int = 1, **sizes: int) -> SmallLlama:
    """Of weights so large that every layer matters, and that bfloat16 holds."""
    model = make_head(target, None, None, **{**SIZES, **sizes})
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, mean=1.0 if parameter.dim() == 1 else 0.0, generator=draw)
            if parameter.dim() > 1:
                parameter.copy_(parameter.bfloat16())
    return model


def exported(target: Any, folder: Path, storage: str = "bfloat16", **notes: Any) -> Path:
    """The folder of a random model."""
    export(random_model(target), folder, storage, notes)
    return folder


# ---- what is trained is what drafts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_training_computes_what_the_checkpoint_does(backend: str, toy: Toy, tmp_path: Path) -> None:
    """The state of position t has the logits behind token t + 1; those behind token t are others."""
    head = random_model(toy)
    export(head, tmp_path / "head", "bfloat16", {})
    model = Llama(tmp_path / "head", dtype="float32", backend=backend)
    assert model.tokenizer is None
    assert model.backend == backend
    tokens = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(2))
    model.allocate(2, 16, 9)
    positions = torch.arange(9, dtype=torch.int32).expand(2, -1)
    logits = model.forward(ModelInputs(tokens, positions, torch.zeros(2, dtype=torch.int32))).logits
    with torch.no_grad():
        (states,) = head(tokens, torch.zeros(2, 9, 0), toy.embed)
        trained = head.logits(0, states[:, :-1].flatten(0, 1)).view(2, 8, -1)
    torch.testing.assert_close(trained, logits[:, 1:], rtol=1e-4, atol=1e-4)
    assert (trained - logits[:, :-1]).abs().mean() > 0.5


def test_a_later_token_is_not_seen_and_the_first_is(toy: Toy) -> None:
    head, tokens = random_model(toy), torch.arange(8)[None]
    features = torch.zeros(1, 8, 0)
    later, first = tokens.clone(), tokens.clone()
    later[0, 5:] += 9
    first[0, 0] += 9
    with torch.no_grad():
        before, after, moved = (head(x, features, toy.embed)[0] for x in (tokens, later, first))
    assert torch.equal(before[0, :4], after[0, :4])  # position 3 has seen token 4
    assert not torch.equal(before[0, 4], after[0, 4])
    assert not torch.equal(before[0, 6], moved[0, 6])


@pytest.mark.parametrize("structure", [None, [2, 1]])
def test_it_conforms(structure: Any, toy: Toy, tmp_path: Path) -> None:
    folder = exported(toy, tmp_path / "head", "fp8")
    options = {"num_draft_tokens": 3, "structure": structure}
    check_drafter(lambda: SmallModel(partial(Llama, backend="torch"), checkpoint=folder, **options), TargetOnly(), toy)


# ---- storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_storage_is_multiplied_out(dtype: str, toy: Toy, tmp_path: Path) -> None:
    """The embedding, too; nothing is computed in FP8 unless asked for, so the CPU's kernels take it."""
    exported(toy, tmp_path, "fp8")
    stored = load_file(tmp_path / "model.safetensors")
    matrices = [name for name, tensor in stored.items() if tensor.dim() > 1]
    assert all(stored[name].dtype == FP8 for name in matrices)
    assert "model.embed_tokens.weight" in matrices
    source = open_source(tmp_path, None, "auto", "checkpoint")
    assert not source.quantized
    assert open_source(tmp_path, None, "fp8", "checkpoint").quantized
    shard, kind = Shard(), getattr(torch, dtype)
    model = make_model(source.config, source.tensors, kind, torch.device("cpu"), source.quantized, shard, 0)
    for name, parameter in model.named_parameters():
        wanted = stored[name].float()
        if name in matrices:
            wanted = (wanted * stored[f"{name}_scale"][:, None]).to(kind)
        assert torch.equal(parameter.data, wanted), name
        assert parameter.dtype == (kind if name in matrices else torch.float32)
    assert Llama(tmp_path, dtype=dtype).backend == "native"


def test_fp8_storage_must_say_so(toy: Toy, tmp_path: Path) -> None:
    """Control: the same file without the entry is taken for a model that computes in FP8."""
    exported(toy, tmp_path, "fp8")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "fp8_storage"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_source(tmp_path, None, "auto", "checkpoint").quantized
    exported(toy, tmp_path, "bfloat16")
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "scale", "words"),
    [
        ("model.embed_tokens.weight", None, "it lacks model.embed_tokens.weight_scale"),
        ("model.layers.1.mlp.up_proj.weight", None, "it lacks model.layers.1.mlp.up_proj.weight_scale"),
        ("model.embed_tokens.weight", torch.ones(7), r"embed_tokens.weight_scale \[7\] is neither one scale"),
        ("model.layers.0.mlp.up_proj.weight", torch.ones(96, 2), r"up_proj.weight_scale \[96, 2\] is neither"),
        ("model.embed_tokens.weight", torch.full((260,), torch.nan), "model.embed_tokens.weight holds NaN as loaded"),
        ("model.embed_tokens.weight", torch.ones(260, dtype=torch.int32), "embed_tokens.weight_scale is torch.int32"),
    ],
)
def test_wrong_scales_are_named(name: str, scale: Tensor | None, words: str, toy: Toy, tmp_path: Path) -> None:
    tensors = load_file(exported(toy, tmp_path, "fp8") / "model.safetensors")
    assert tensors.pop(f"{name}_scale").shape == tensors[name].shape[:1]
    if scale is not None:
        tensors[f"{name}_scale"] = scale
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words) as error:
        Llama(tmp_path)
    assert "\n" not in str(error.value)


# ---- how it begins ---------------------------------------------------------------------------------------------------


def test_the_embedding_begins_on_the_principal_directions() -> None:
    """A table of 5 directions and a common row is kept whole on 5 channels, and cannot be on 4."""
    draw = torch.Generator().manual_seed(0)
    points, directions, common = (torch.randn(shape, generator=draw) for shape in ((50, 5), (5, 16), (16,)))
    table = points @ directions + 10 * common

    def lost(size: int) -> float:
        small, apart = principal_table(table, size), torch.cdist(table, table)
        assert small.shape == (50, size)
        assert float(small.square().mean().sqrt()) == pytest.approx(0.02)
        near = torch.cdist(small, small)
        return float((near * (apart.norm() / near.norm()) - apart).norm() / apart.norm())

    assert lost(5) < 1e-3
    assert lost(4) > 0.02


def test_it_begins_with_hardly_an_opinion(toy: Toy) -> None:
    """Its law is nearly even: a table ten times as large would be all but sure that every token repeats."""
    head = make_head(toy, None, None, **SIZES)
    with torch.no_grad():
        (states,) = head(torch.arange(200)[None], torch.zeros(1, 200, 0), toy.embed)
        law = head.logits(0, states[0, :-1]).log_softmax(-1)
    assert 0 < float(-law.mean() - torch.tensor(260.0).log()) < 0.3
    assert torch.equal(head.model.embed_tokens.weight, principal_table(toy.embed, 64))
    others = make_head(toy, None, None, seed=1, **SIZES).state_dict()
    assert not torch.equal(others["model.layers.0.mlp.up_proj.weight"], head.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_layers": 0}, "training.head.num_layers=0 must be at least 1"),
        ({"hidden_size": 128}, "hidden_size=128 is more than the target's 64"),
        ({"num_heads": 3}, "hidden_size=64 does not make num_heads=3 .* take a multiple of 6"),
        ({"num_heads": 4, "num_kv_heads": 3}, "share num_kv_heads=3 evenly"),
    ],
)
def test_sizes_that_make_no_model(sizes: dict[str, int], words: str, toy: Toy) -> None:
    with pytest.raises(ValueError, match=words):
        make_head(toy, None, None, **{**SIZES, **sizes})


def test_a_reduced_vocabulary_is_refused(toy: Toy) -> None:
    tables = draft_vocabulary(torch.arange(260), 200)
    with pytest.raises(ValueError, match=r"draft_vocab_size=200, .* all 260 tokens of the target: use .*=null"):
        make_head(toy, *tables, **SIZES)


# ---- what it learns --------------------------------------------------------------------------------------------------


class Early(SmallLlama):
    """Fault: predicts from a token less, so learns the next token but one."""

    def forward(self, tokens: Tensor, features: Tensor, embed: Tensor) -> list[Tensor]:
        return [state.roll(1, 1) for state in super().forward(tokens, features, embed)]


@pytest.mark.parametrize(("storage", "honest"), [("bfloat16", True), ("fp8", True), ("fp8", False)])
def test_it_learns_what_its_target_says(storage: str, honest: bool, toy: Toy, tmp_path: Path) -> None:
    """In 80 steps models of 5 seeds gain 0.59 to 0.76; predicting from a token less, 0.04 to 0.19."""
    text, head = spoken(toy), make_head(toy, None, None, **SIZES)
    if not honest:
        head.__class__ = Early

    def accepted(place: Path) -> float:
        export(head, place, storage, {})
        drafter = SmallModel(partial(Llama, place), num_draft_tokens=3)
        decoder = SpeculativeDecoder(toy, drafter, TargetOnly(), batch_size=4)
        result = decoder.generate(text.tokens[:, :4].tolist(), TEXT_LEN - 4, ignore_eos=True)
        assert result.tokens[0] == text.tokens[0, 4:].tolist()
        return result.trace.acceptance_length

    before = accepted(tmp_path / "untrained")
    options = {"steps": 80, "learning_rate": 1e-2, "log_interval": 10, "clip": 1.0}
    trainer(toy, text, tmp_path, head, **options).train(nothing, QUIET)  # type: ignore[arg-type]
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()][:-1]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert len(rows[0]["accuracy"]) == 1
    assert before < 1.5
    assert (accepted(tmp_path / "trained") > before + 0.4) == honest


# ---- the drafter's checkpoint and the command ------------------------------------------------------------------------


def test_what_a_checkpoint_says_of_itself_is_tried(toy: Toy, tmp_path: Path) -> None:
    """Made by `specdec train` it is tested on the known prompt; any other Llama is not."""
    card = {"self_test": {"depth": 4, "tau": 4.5}}
    words = "drafter=small_model", "target=toy"
    folder = exported(toy, tmp_path / "head", **card)
    with pytest.raises(ValueError, match=r"SmallModel's head emits 1\.\d\d tokens .* its card says 4\.50"):
        package.load(*words, f"drafter.checkpoint={folder}")
    assert not package.load(*words, f"drafter.checkpoint={exported(toy, tmp_path / 'other')}").drafter.trained


def test_the_models_own_checkpoint_goes_before(toy: Toy, tmp_path: Path) -> None:
    folder = exported(toy, tmp_path / "own")
    drafter = package.load("drafter=small_model", "target=toy", f"drafter.model.checkpoint={folder}").drafter
    drafter.setup(toy, 1, 64, "any")
    assert str(drafter.model.checkpoint) == str(folder)  # type: ignore[attr-defined]


@pytest.fixture
def specdec(specdec: CommandLine) -> CommandLine:
    """In a folder with questions; the prompts that are measured are among those that are trained on."""
    for name, count in (("questions", 16), ("measured", 3)):
        write_questions(specdec.folder / f"{name}.jsonl", (f"question {i * i}?" for i in range(count)), ("c0", "c1"))
    return specdec


TRAIN = [
    "train", "drafter=small_model", "target=toy", "tracking=none", "run_dir=r", "max_new_tokens=12", "data.tokens=300",
    "data.folder=text", "dataset@data.prompts=jsonl", "data.prompts.path=questions.jsonl", "data.heldout=0.2",
    "data.answers.max_answer=12", "data.answers.conversations=8", "dataset=jsonl", "dataset.path=measured.jsonl",
    "training.steps=4", "training.batch_size=4", "training.eval_interval=3", "training.log_interval=1", "storage=fp8",
    "drafter.num_draft_tokens=2", *(f"training.head.{name}={value}" for name, value in SIZES.items()),
]  # fmt: skip


def test_a_run_leaves_a_model_with_its_card(specdec: CommandLine) -> None:
    done = specdec(*TRAIN)
    assert done.code == 0, done.err
    run = specdec.folder / "r"
    assert "step 3: acceptance length" in done.out
    config = json.loads((run / "head" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert set(config["specdec"]["acceptance"]["tau"]) == {"c0", "c1", "all"}
    assert config["specdec"]["self_test"]["depth"] == 2
    card = (run / "head" / "README.md").read_text()
    for words in ("small_model head for toy", "4 steps of 4 rows", "260 of 260 tokens", "drafter.checkpoint=THIS"):
        assert words in card, words
    assert "layers read" not in card
    assert {path.name for path in (run / "head").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert all(row["equal_to_plain"] for row in specdec.rows("r/trace.jsonl"))
    for key in ("drafter.checkpoint", "drafter.model.checkpoint"):
        drafted = specdec(
            "target=toy", "tracking=none", "drafter=small_model", f"{key}=r/head", "dataset=jsonl",
            "dataset.path=measured.jsonl", "max_new_tokens=8",
        )  # fmt: skip
        assert drafted.code == 0, drafted.err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.draft_vocab_size=200"], ["training.draft_vocab_size=200", "training.draft_vocab_size=null"]),
        (["training.head.hidden_size=100"], ["hidden_size=100 is more than the target's 64"]),
        (["target@drafter.model=toy"], ["drafter=small_model", "other weights than those in training", "r/head"]),
    ],
)
def test_a_mistake_is_one_sentence(specdec: CommandLine, overrides: list[str], words: list[str]) -> None:
    check_mistake(specdec(*TRAIN, *overrides), *words)


def test_another_trained_model_is_not_taken_for_this_one(specdec: CommandLine, toy: Toy) -> None:
    folder = exported(toy, specdec.folder / "old", steps=9)
    done = specdec(*TRAIN, f"drafter.model.checkpoint={folder}")
    check_mistake(done, "other weights than those in training")


def test_a_model_that_does_not_ship_is_one_sentence(specdec: CommandLine) -> None:
    done = specdec("target=toy", "tracking=none", "drafter=small_model", "drafter.checkpoint=toy-small")
    check_mistake(done, "drafter.checkpoint=toy-small is neither a folder", "ships (smollm2-135m-instruct-eagle3")
    assert done.err.count("specdec train") == 1
