"""Every file under conf/ composes and builds what it says; what does not fit is one sentence, before any weights."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from parity import llama_config

import specdec
from specdec.composition import build, build_methods, compose_config
from specdec.decoding import SpeculativeDecoder, check_pair
from specdec.drafter import Drafter
from specdec.drafter.none import NoDraft
from specdec.drafter.small_model import SmallModel
from specdec.structure import Structure
from specdec.target import Target
from specdec.target.huggingface import HuggingFace
from specdec.target.llama import Llama
from specdec.target.toy import Toy
from specdec.types import Law
from specdec.verifier import Verifier
from specdec.verifier.rrs import RRS
from specdec.verifier.target_only import TargetOnly

CONF = Path(__file__).parents[1] / "conf"
PACKAGES = {  # config group -> package of its classes, and the interface they have
    "target": ("specdec.target", Target),
    "structure": ("specdec.structure", Structure),
    "drafter": ("specdec.drafter", Drafter),
    "verifier": ("specdec.verifier", Verifier),
    "dataset": ("specdec.data", None),
    "tracking": ("specdec.tracking", None),
}
DIFFS = ("experiment", "sweep", "debug")  # groups of changes to the whole config
TRAINING = "training"  # a group of conf/train.yaml, not of conf/config.yaml
FILES = sorted(
    path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/*.yaml") if path.parent.name != TRAINING
)
CHOICES = [name for name in FILES if name.split("/")[0] in PACKAGES]
NAMES = {group: [name.split("/")[1] for name in FILES if name.startswith(f"{group}/")] for group in (*PACKAGES, *DIFFS)}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained heads, of which only the description is there: weights are read with the first request."""
    folder = tmp_path_factory.mktemp("heads")
    for name, kind in (("medusa", "MedusaModel"), ("hydra", "HydraModel")):
        (folder / name).mkdir()
        sizes = {"hidden_size": 64, "vocab_size": 260, "num_heads": 4}
        (folder / name / "config.json").write_text(json.dumps({"architectures": [kind], **sizes}))
    (folder / "eagle").mkdir()
    layer = llama_config(num_hidden_layers=1).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (folder / "eagle" / "config.json").write_text(json.dumps(layer))
    return folder


def needed(group: str, name: str, checkpoint: Path, heads: Path) -> list[str]:
    """Values for the keys that have none of their own."""
    values = {
        "drafter/eagle": [f"drafter.checkpoint={heads / 'eagle'}"],
        "drafter/medusa": [f"drafter.checkpoint={heads / 'medusa'}"],
        "drafter/hydra": [f"drafter.checkpoint={heads / 'hydra'}"],
        "target/llama": [f"target.checkpoint={checkpoint}"],
        "target/maverick": [f"target.checkpoint={checkpoint}"],
        "target/huggingface": [f"target.checkpoint={checkpoint}"],
        "drafter/small_model": ["target@drafter.model=toy"],
        "dataset/jsonl": ["dataset.path=some.jsonl"],
        "dataset/huggingface": ["dataset.name=json", "dataset.column=text"],
    }
    optional = "+" if group == "structure" else ""  # no choice of a whole run, but of a drafter
    return [f"{optional}{group}={name}", *values.get(f"{group}/{name}", [])]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, building any target is an error."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"{type(self).__name__} is being built")

    for target in (Llama, Toy, HuggingFace):
        monkeypatch.setattr(target, "__init__", refuse)


# ---- every file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CHOICES)
def test_each_choice_builds(file: str, tiny_llama: Path, heads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.target.gguf.smollm2_checkpoint", lambda: tiny_llama)
    group, name = file.split("/")
    built = build(compose_config(needed(group, name, tiny_llama, heads))[group], group)
    interface = PACKAGES[group][1]
    assert interface is None or isinstance(built, interface)
    assert interface is not None or hasattr(built, {"dataset": "load", "tracking": "log"}[group])


@pytest.mark.parametrize("file", CHOICES)
def test_conf_mirrors_the_package(file: str) -> None:
    """conf/GROUP/NAME.yaml builds a class of the module NAME, or of the file it inherits from."""
    group, name = file.split("/")
    config = yaml.safe_load((CONF / f"{file}.yaml").read_text())
    if "_target_" not in config:
        name = next(entry for entry in config["defaults"] if entry != "_self_")
        config = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    module, _, attribute = config["_target_"].rpartition(".")
    package = PACKAGES[group][0]
    assert module == f"{package}.{name}" or (module == package and name == "none")
    assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("group", ["drafter", "verifier"])
def test_each_method_has_a_file(group: str) -> None:
    folder = CONF.parent / "specdec" / group
    methods = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert methods == set(NAMES[group])


def test_each_group_is_known() -> None:
    assert {path.name for path in CONF.iterdir() if path.is_dir() and path.name[0] not in "._"} == {
        *PACKAGES,
        *DIFFS,
        TRAINING,
    }


@pytest.mark.parametrize("file", [name for name in FILES if name not in CHOICES])
def test_each_diff_composes(file: str) -> None:
    group, name = file.split("/")
    with initialize_config_module("specdec.conf", version_base="1.3"):
        config = compose("config", overrides=[f"{group}={name}"], return_hydra_config=True)
        swept = config.hydra.sweeper.params or {}
        for key, values in swept.items():  # each swept value is one that the config takes
            for value in str(values).split(","):
                compose("config", overrides=[f"{group}={name}", f"{key}={value}"])
    assert (group == "sweep") == bool(swept)
    assert {str(key) for key in config if key != "hydra"} == {str(key) for key in compose_config([])}
    for drafter in config.drafters:
        assert drafter in NAMES["drafter"]


@pytest.mark.parametrize("path", sorted((CONF / TRAINING / "debug").glob("*.yaml")), ids=lambda path: path.stem)
def test_debug_changes_training_too(path: Path) -> None:
    """And nothing where it was not asked for; it adds no key."""
    usual, changed = (compose_config(words, "train") for words in ([], [f"debug={path.stem}"]))
    assert usual.training.steps == yaml.safe_load((CONF / "train.yaml").read_text())["training"]["steps"]
    assert changed.training.steps < usual.training.steps
    assert changed.target == compose_config(["target=toy"]).target
    for part in (TRAINING, "data"):
        assert changed[part].keys() == usual[part].keys()
    assert changed.keys() == usual.keys()


def test_the_demo_compares_methods_that_fit() -> None:
    config = compose_config(["experiment=demo"])
    verifier = build(config.verifier, "verifier")
    drafters = {name: compose_config([f"drafter={name}"]).drafter for name in config.drafters}
    assert list(build_methods(drafters, verifier)) == list(config.drafters)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", PACKAGES)
def test_a_wrong_name_lists_what_exists(group: str) -> None:
    with pytest.raises(ValueError, match="wrong_name") as error:
        compose_config(
            ["drafter=layer_skip", "structure@drafter.structure=wrong_name"]
            if group == "structure"
            else [f"{group}=wrong_name"]
        )
    assert "\n" not in str(error.value)
    for name in NAMES[group]:
        assert name in str(error.value)


WORDS = ("yes", "no", "on", "off")  # which are texts, and so all true, to Python


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["drafterr=ngram"], ["drafterr"]),
        (["+drafterr=ngram"], ["drafterr is not a key", "drafter, verifier"]),
        (["drafter.num_drafts=3"], ["num_drafts"]),
        (["+drafter.num_drafts=3"], ["num_drafts"]),
        (["sampling.min_p=0.1"], ["min_p"]),
        (["+sampling.min_p=0.1"], ["min_p", "top_p"]),
        (["verifier=typical", "verifier.epsilon=2"], ["epsilon", "2"]),
        (["drafter.max_ngram=0"], ["max_ngram=0", "min_ngram=1"]),
        (["sampling.temperature=-0.5"], ["temperature", "-0.5"]),
        (["sampling.temperature=inf"], ["temperature", "inf"]),
        (["sampling.top_k=-1"], ["top_k", "-1"]),
        (["sampling.top_k=2.5"], ["top_k", "2.5"]),
        (["sampling.top_p=0"], ["top_p", "0"]),
        (["sampling.top_p=1.01"], ["top_p", "1.01"]),
        (["batch_size=0"], ["batch_size=0"]),
        (["max_new_tokens=0"], ["max_new_tokens=0"]),
        (["max_new_tokens=many"], ["max_new_tokens='many'"]),
        (["passes=0"], ["passes=0"]),
        (["target=llama"], ["target.checkpoint"]),
        (["drafters=[ngram,suffix]"], ["drafters=", "use drafter=NAME"]),
        (["experiment=demo"], ["drafters=", "use drafter=NAME"]),
        *[
            ([key], [key, "is for a run", "leave it out"])
            for key in ("passes=2", "dataset=jsonl", "tracking.mode=offline")
        ],
        (["drafter.max_spec_factor=true"], ["drafter.max_spec_factor=True must be a number"]),
        (["drafter.max_ngram=2.0"], ["drafter.max_ngram=2.0 must be a whole number"]),
        (["drafter.max_ngram=null"], ["drafter.max_ngram=None must be a whole number"]),
        (["drafter=suffix", "drafter.corpus=3"], ["drafter.corpus=3 must be a text", "or null"]),
        *[
            (["drafter=suffix", f"drafter.tree={word}"], [f"drafter.tree='{word}' must be true or false"])
            for word in WORDS
        ],
        (["verifier=rrs", "verifier.replacement=1"], ["verifier.replacement=1 must be true or false"]),
        (["drafter=hybrid", "drafter.first.max_ngram=x"], ["drafter.first.max_ngram='x' must be a whole number"]),
        (
            ["drafter=layer_skip", "structure@drafter.structure=dynamic", "drafter.structure.depth=x"],
            ["drafter.structure.depth='x' must be a whole number"],
        ),
    ],
)
def test_a_mistake_is_a_sentence(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0].replace(".", r"\.")) as error:
        specdec.load(*overrides)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_types_are_those_of_the_annotations() -> None:
    """A whole number is a number, null where there is None, other annotations are let be; a model built later is checked."""
    assert (
        build(OmegaConf.create({"_target_": "specdec.drafter.ngram.NGram", "max_spec_factor": 2}), "drafter").depth == 5
    )
    with pytest.raises(ValueError, match=r"^drafter\.model\.threads='x' must be a whole number or null$"):
        build(compose_config(["drafter=small_model", "drafter.model.threads=x"]).drafter, "drafter")
    assert build(compose_config(["drafter=layer_skip", "drafter.structure=[2,2]"]).drafter, "drafter").depth == 2
    assert build(compose_config(["drafter=suffix", "drafter.corpus=null"]).drafter, "drafter").depth == 5


def test_load_composes_what_generate_takes() -> None:
    """The keys of the config are what generate and stream do where they are told nothing."""
    words = "target=toy", "drafter=none", "sampling.temperature=1", "ignore_eos=true"
    composed, usual = specdec.load(*words, "max_new_tokens=5", "seed=3"), specdec.load(*words)
    answer = usual.generate("hi", 5, seed=3).tokens
    assert composed.generate("hi").tokens == answer
    assert [token for chunk in composed.stream("hi") for token in chunk.tokens] == answer[0]
    assert len(usual.generate("hi", seed=1).tokens[0]) == compose_config([]).max_new_tokens
    assert usual.generate("hi", 5, seed=1).tokens != answer
    assert len(composed.generate("hi", 7, seed=0).tokens[0]) == 7  # told otherwise


def test_load_composes_whether_answers_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "target=toy", "drafter=none", "max_new_tokens=5"
    for ignore in (True, False):
        decoder = specdec.load(*words, f"ignore_eos={ignore}")
        monkeypatch.setattr(decoder.tokenizer, "eos_token_id", decoder.generate("hi", 1).tokens[0][0])
        assert len(decoder.generate("hi").tokens[0]) == (5 if ignore else 1)
        assert len(decoder.generate("hi", ignore_eos=not ignore).tokens[0]) == (1 if ignore else 5)


def test_a_decoder_by_itself_starts_from_the_values_of_the_config() -> None:
    config, parameters = compose_config([]), inspect.signature(SpeculativeDecoder).parameters
    for name in ("batch_size", "logprobs", "max_new_tokens", "seed", "ignore_eos"):
        assert parameters[name].default == config[name], name


def test_the_package_shows_what_it_offers() -> None:
    command = "import specdec, sys; print('load' in dir(specdec), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "False"]


# ---- pairs -----------------------------------------------------------------------------------------------------------

TREES = {
    "hybrid_tree",
    "lookahead",
    "token_recycling",
    "layer_skip_tree",
    "layer_skip_dynamic",
    "small_model_tree",
    "suffix_tree",
}
CHAINS_ONLY = {"speculative_sampling", "block", "static_ensemble", "fly"}
VARIANTS = {
    "hybrid_tree": ["drafter=hybrid", "drafter@drafter.second=token_recycling"],
    "layer_skip_tree": ["drafter=layer_skip", "drafter.structure=[2,2]"],
    "layer_skip_dynamic": ["drafter=layer_skip", "structure@drafter.structure=dynamic", "drafter.structure.depth=3"],
    "small_model_tree": ["drafter=small_model", "target@drafter.model=toy", "drafter.structure=[2,1]"],
    "suffix_tree": ["drafter=suffix", "drafter.tree=true"],
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("verifier", NAMES["verifier"])
@pytest.mark.parametrize("drafter", sorted({*NAMES["drafter"], *VARIANTS}))
def test_pairs_are_checked_before_a_target_is_built(drafter: str, verifier: str, heads: Path, tiny_llama: Path) -> None:
    """A pair that fits gets as far as the target; one that does not says what each side needs and offers."""
    chosen = VARIANTS.get(drafter) or needed("drafter", drafter, tiny_llama, heads)
    overrides = [*chosen, f"verifier={verifier}", "target=toy"]
    if drafter in TREES and verifier in CHAINS_ONLY:
        with pytest.raises(ValueError, match=r"judges chains only, and [a-z_]+ proposes trees"):
            specdec.load(*overrides)
    else:
        with pytest.raises(ValueError, match=r"^Toy is being built$"):
            specdec.load(*overrides)


class Drawn(NoDraft):
    """Offers independent draws and nothing else."""

    laws: frozenset[Law] = frozenset({"iid"})


def test_a_law_that_is_not_offered_is_named() -> None:
    check_pair(Drawn(), RRS(replacement=True))
    check_pair(Drawn(), TargetOnly())
    with pytest.raises(ValueError, match=r"rrs needs drafts of law 'distinct', and Drawn offers \['iid'\]") as error:
        check_pair(Drawn(), RRS(replacement=False))
    assert offered(error.value) == ["block", "kseq", "speculative_sampling", "target_only"]  # traversal needs the same


def offered(error: BaseException) -> list[str]:
    """The verifiers that a sentence about a pair names."""
    return str(error).rpartition("a verifier that fits: ")[2].split(", ")


def test_the_verifiers_that_are_offered_fit() -> None:
    """Lossless ones for a lossless one, and lossy ones for a lossy one."""
    drafter = build(compose_config(["drafter=token_recycling"]).drafter, "drafter")
    for chosen in sorted(CHAINS_ONLY):
        verifier = build(compose_config([f"verifier={chosen}"]).verifier, "verifier")
        with pytest.raises(ValueError, match=f"{chosen} judges chains only, and token_recycling") as error:
            check_pair(drafter, verifier)
        names = [name for name in NAMES["verifier"] if name not in CHAINS_ONLY]
        others = {name: build(compose_config([f"verifier={name}"]).verifier, "verifier") for name in names}
        assert offered(error.value) == [name for name in names if others[name].lossless == verifier.lossless]


def test_the_command_line_says_it_in_one_sentence(tmp_path: Path) -> None:
    """A pair that does not fit is found before a checkpoint that does not exist; no traceback."""
    command = [sys.executable, "-m", "specdec", "drafter=token_recycling", "verifier=block", "target=llama"]
    done = subprocess.run(
        [*command, "target.checkpoint=nowhere", "tracking=none"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "block judges chains only, and token_recycling proposes trees" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("**/trace.jsonl"))


# ---- a drafter with weights of its own -------------------------------------------------------------------------------


class Counting(Toy):
    """Counts how often its weights are made."""

    made = 0

    def __init__(self, **options: Any) -> None:
        super().__init__(backend="torch", **options)
        type(self).made += 1


def test_a_small_model_is_built_once_and_late(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "made", 0)
    drafter = SmallModel(lambda: Counting(), num_draft_tokens=2)
    assert Counting.made == 0
    decoder = SpeculativeDecoder(toy, drafter, TargetOnly())
    plain = SpeculativeDecoder(toy, NoDraft(), TargetOnly())
    prompt = [[1, 2, 3, 4]]
    for _ in range(2):
        drafted = decoder.generate(prompt, 10, ignore_eos=True)
        assert drafted.tokens == plain.generate(prompt, 10, ignore_eos=True).tokens
        assert Counting.made == 1
    assert drafted.trace.acceptance_length == 3  # the same weights draft what they will verify


def test_a_ready_model_is_taken_as_it_is() -> None:
    model = Toy(backend="torch")
    drafter = SmallModel(model)
    drafter.setup(model, 1, 32, "any")
    assert drafter.model is model


def test_a_small_model_without_a_checkpoint_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="missing a required argument: 'checkpoint'; give it one"):
        specdec.load("drafter=small_model", "drafter.checkpoint=null")
    with pytest.raises(ValueError, match=r"checkpoint=no-such-model is neither a folder, nor a head that ships"):
        specdec.load("drafter=small_model", "drafter.checkpoint=no-such-model")


def test_a_small_model_from_its_config(toy: Toy) -> None:
    config = compose_config(["drafter=small_model", "target@drafter.model=toy", "+drafter.model.vocab_size=16"])
    assert isinstance(config, DictConfig)
    assert OmegaConf.select(config, "drafter.model._partial_") is True
    drafter = build(config.drafter, "drafter")
    assert not isinstance(drafter.model, Toy)
    with pytest.raises(ValueError, match="the draft model has 16 token ids, the target 260"):
        drafter.setup(toy, 1, 32, "any")
    kept = drafter.model
    assert isinstance(kept, Toy)
    with pytest.raises(ValueError, match="16 token ids"):
        drafter.setup(toy, 1, 32, "any")
    assert drafter.model is kept


def test_a_class_that_is_nowhere_is_one_sentence() -> None:
    """A drafter of one's own whose folder Python does not know."""
    with pytest.raises(ValueError, match=r"drafter: nowhere\.Mine cannot be imported .*is its folder on PYTHONPATH\?"):
        build(OmegaConf.create({"_target_": "nowhere.Mine"}), "drafter")
