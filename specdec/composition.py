"""From a Hydra config to objects: drafters and verifier first, checked as a whole, only then the target's weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from specdec.decoding import SamplingParams, SpeculativeDecoder, check_pair, check_seed, check_whole, self_test
from specdec.drafter import Drafter
from specdec.target import Target
from specdec.verifier import Verifier

BASELINE = "none"
OF_A_RUN = ("baseline", "dataset", "passes", "run_dir", "sweep", "sweep_dir", "tracking")  # what no decoder heeds
KINDS: dict[str, tuple[tuple[type, ...], str]] = {  # annotation -> what it takes, in Python and in words
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a text (a number in quotes is one)"),
    "None": ((type(None),), "null"),
}


def one_sentence(error: BaseException) -> str:
    """An error as one line; of a config that does not compose, what is unknown and what there is instead."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group == "training":  # it follows the drafter
            return f"drafter={name} is not trained; those that are: {', '.join(error.options)}"
        return f"{group}={name} does not exist; there are {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is not KEY=VALUE: {_remedy(error.override)}"
    cause = error.__cause__ if isinstance(error, HydraException) else error
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key and cause.parent_node is not None:
        parent, _, name = cause.full_key.rpartition(".")
        known = ", ".join(str(key) for key in cause.parent_node if key not in ("_target_", "hydra"))
        return (
            f"{cause.full_key} is not a key of the config; {parent or 'it'} has {known or 'no keys, as it is chosen'}"
        )
    if found := re.match(r"Could not override '(.*?)'\.\s(?:No match|Did you mean to override (.*?)\?)", str(error)):
        return _no_choice(found[1], found[2])
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _remedy(override: str) -> str:
    """What may be wrong with an argument that Hydra's grammar does not take."""
    if "=" not in override:
        return "the one word alone is `train`, which comes first; `specdec --help` shows the keys"
    if override.startswith("drafters="):
        return """settings of one drafter stand in quotes, as in 'drafters=[ngram,"ngram num_draft_tokens=8"]'"""
    return """close every bracket and quote, and put a text with brackets, commas or = in quotes, as in 'KEY="a, b"'"""


def _no_choice(given: str, meant: str | None) -> str:
    """A sentence for a GROUP or GROUP@KEY that the config does not choose; `meant` is where it chooses one of that group."""
    if meant:
        return f"{given} is no choice of this config, but {meant} is: use {meant}=NAME"
    group, _, key = given.partition("@")
    if key:
        parent, _, name = key.rpartition(".")
        return (
            f"{given} is no choice of this config: {parent or 'it'}, as it is chosen, has no {name}; leave {group} out"
        )
    return f"{given} is no choice of this config; a drafter that has a {given} takes {given}@drafter.{given}=NAME"


def build(node: Any, group: str) -> Any:
    """Instantiate one config group; a user's mistake in it becomes a ValueError, any other error is passed on."""
    try:
        if isinstance(node, DictConfig):
            _check_types(node, group)
        return instantiate(node)
    except (InstantiationException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        if found := re.match("Error locating target '(.*?)'", str(error)):
            raise ValueError(
                f"{group}: {found[1]} cannot be imported ({str(cause).splitlines()[-1]}): is its folder on PYTHONPATH?"
            ) from error
        if isinstance(cause, OmegaConfBaseException):
            raise ValueError(_missing(cause, group)) from error
        if isinstance(cause, ValueError | OSError):
            raise ValueError(str(cause)) from error
        if isinstance(cause, TypeError):
            values = {key: value for key, value in node.items() if key != "_target_"}
            raise ValueError(f"{group}={values} does not fit: {cause}; `specdec --cfg job` shows its keys") from error
        if error.__cause__ is not None:
            raise cause from None
        raise ValueError(f"{group}: {one_sentence(error)}") from error


def _missing(error: OmegaConfBaseException, group: str) -> str:
    """A sentence for a key without a value, or one that cannot be resolved."""
    key = error.full_key or group
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value: give it one, as in {key}=VALUE"
    return f"{key}: {str(error).splitlines()[0]}"


def _check_types(node: DictConfig, name: str) -> None:
    """ValueError for a value that the constructor's annotation, made of KINDS, does not take; other annotations are let be."""
    annotations = _annotations(node["_target_"]) if "_target_" in node else {}
    for key in map(str, node):
        if OmegaConf.is_missing(node, key):
            continue
        value, kinds = node[key], str(annotations.get(key, "")).split(" | ")
        if isinstance(value, DictConfig):
            _check_types(value, f"{name}.{key}")
        elif all(kind in KINDS for kind in kinds) and not any(type(value) in KINDS[kind][0] for kind in kinds):
            raise ValueError(f"{name}.{key}={value!r} must be {' or '.join(KINDS[kind][1] for kind in kinds)}")


def _annotations(path: str) -> dict[str, Any]:
    """Types of the arguments of a class, with those that it hands on to its parents, or of a function, as they are written."""
    try:
        made = resolve_name(path)
    except (ImportError, AttributeError):
        return {}  # to be said by who builds it
    kinds = reversed(made.__mro__) if isinstance(made, type) else ()
    found: dict[str, Any] = {}
    for function in [vars(kind).get("__init__") for kind in kinds] or [made]:
        found |= getattr(function, "__annotations__", {})
    return {name: kind.__name__ if isinstance(kind, type) else kind for name, kind in found.items()}


def build_sampling(cfg: DictConfig) -> SamplingParams:
    """The sampling group, checked."""
    values = OmegaConf.to_container(cfg.sampling, resolve=True)
    assert isinstance(values, dict)
    try:
        return SamplingParams(**{str(key): value for key, value in values.items()})
    except TypeError as error:
        raise ValueError(f"sampling: {error}; known keys are temperature, top_k and top_p") from error


def check_values(cfg: DictConfig) -> None:
    """ValueError for counts that are no whole numbers or too small, and for switches that are neither on nor off."""
    for key in ("max_new_tokens", "batch_size", "passes"):
        check_whole(key, cfg[key], 1)
    check_seed(cfg.seed, cfg.passes)
    for key in ("baseline", "ignore_eos", "logprobs"):
        if not isinstance(cfg.get(key, False), bool):  # training has no logprobs
            raise ValueError(f"{key}={cfg[key]!r} must be true or false")


def check_keys(cfg: DictConfig, name: str = "config") -> None:
    """ValueError for a key that nothing reads at the top of config `name`: +KEY=VALUE, or a typo in a file, adds one."""
    known = [str(key) for key in compose_config([], name)]
    if unknown := [str(key) for key in cfg if key not in known]:
        raise ValueError(f"{unknown[0]} is not a key of the config; it has {', '.join(known)}")


def drafter_configs(cfg: DictConfig, chosen: str, overrides: Sequence[str]) -> dict[str, DictConfig]:
    """Config of every drafter of a run by its label, the baseline first.

    `chosen` is the name given as drafter=. With several drafters, drafter.KEY=VALUE among the overrides holds for each.
    """
    entries = _labelled(cfg.drafters or chosen)
    if cfg.baseline and BASELINE not in entries:
        entries = {BASELINE: BASELINE, **entries}
    return {
        label: cfg.drafter if words == chosen else _drafter_config(label, words, chosen, overrides)
        for label, words in entries.items()
    }


def _labelled(given: Any) -> dict[str, str]:
    """Entries of `drafters` by label: NAME, "NAME KEY=VALUE ..." with settings of its own, or {LABEL: either of them}."""
    entries: dict[str, str] = {}
    for entry in given if isinstance(given, ListConfig) else [given]:
        named = entry if isinstance(entry, DictConfig) else {str(entry): entry}
        for label, words in named.items():
            label, words = " ".join(str(label).split()), " ".join(str(words).split())
            if label in entries:
                raise ValueError(
                    f"drafters has {label!r} twice ({entries[label]!r} and {words!r}): give one of them another name, as "
                    f"in {{NAME: {words!r}}}"
                )
            if label == BASELINE != words:
                raise ValueError(f"drafters calls {words!r} {BASELINE}, the name of plain decoding: name it otherwise")
            entries[label] = words
    return entries


def _drafter_config(label: str, words: str, chosen: str, overrides: Sequence[str]) -> DictConfig:
    """A choice of the drafter group with the user's values for its keys, its own last; the baseline has no keys."""
    name, settings = words.partition(" ")[0], words.split()[1:]
    options = GlobalHydra.instance().config_loader().get_group_options("drafter")
    if name not in options:
        raise ValueError(f"drafters names {name!r}, which does not exist; there are {', '.join(options)}")
    shared = [one for one in overrides if one.startswith("drafter.")] if name != BASELINE else []
    given = overrides if name == chosen else [f"drafter={name}", *shared]
    try:
        node: DictConfig = compose_config([*given, *map(_of_drafter, settings)]).drafter
    except ValueError as error:
        raise ValueError(f"{error} (of {label}; drafter.KEY holds for each of drafters)") from error
    return node


def _of_drafter(setting: str) -> str:
    """KEY=VALUE or GROUP@KEY=CHOICE of one drafter as the whole config takes it; `drafter.` before KEY may be there already."""
    return re.sub(r"^([+~]*)([^=@]*@)?(drafter\.)?", r"\1\2drafter.", setting)


def plain_drafter() -> Drafter:
    """The baseline."""
    drafter: Drafter = build(compose_config([f"drafter={BASELINE}"]).drafter, "drafter")
    return drafter


def exact_verifier() -> Verifier:
    """The verifier under which every drafter's output equals plain output."""
    verifier: Verifier = build(compose_config(["verifier=target_only"]).verifier, "verifier")
    return verifier


def build_methods(configs: dict[str, DictConfig], verifier: Verifier) -> dict[str, Drafter]:
    """Instantiate the drafters and check each against the verifier."""
    drafters: dict[str, Drafter] = {name: build(node, "drafter") for name, node in configs.items()}
    for drafter in drafters.values():
        check_pair(drafter, verifier)
    return drafters


def load(*overrides: str, config_dir: str | Path | None = None) -> SpeculativeDecoder:
    """A decoder from the same config groups as the command line: load("drafter=ngram", "target=smollm2").

    max_new_tokens, seed and ignore_eos are what its `generate` takes where it is given none. config_dir: a folder with
    groups of your own, as --config-dir. ValueError for a user's mistake, and for keys that only a run has a use for.
    """
    extra = [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"]
    cfg = compose_config([*overrides, *extra])
    check_keys(cfg)
    check_values(cfg)
    _check_for_decoder(cfg, overrides)
    verifier: Verifier = build(cfg.verifier, "verifier")
    drafter: Drafter = build(cfg.drafter, "drafter")
    check_pair(drafter, verifier)
    sampling = build_sampling(cfg)
    target: Target = build(cfg.target, "target")
    decoder = SpeculativeDecoder(
        target, drafter, verifier, sampling, cfg.batch_size,
        logprobs=cfg.logprobs, max_new_tokens=cfg.max_new_tokens, seed=cfg.seed, ignore_eos=cfg.ignore_eos,
    )  # fmt: skip
    self_test(decoder)
    return decoder


def _check_for_decoder(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """ValueError for what a run honours and one decoder cannot."""
    if cfg.drafters:
        raise ValueError(f"drafters={cfg.drafters} is for a run, and load gives one decoder: use drafter=NAME")
    for override in overrides:
        if re.split(r"[=@.]", override.lstrip("+~"))[0] in OF_A_RUN:
            raise ValueError(
                f"{override} is for a run, and load gives a decoder, which has no use for it: leave it out"
            )


def compose_config(overrides: Sequence[str], name: str = "config") -> DictConfig:
    """The composed config, from inside or outside a Hydra application; ValueError says what does not fit."""
    try:
        if GlobalHydra.instance().is_initialized():
            cfg: DictConfig = compose(name, overrides=list(overrides))
            return cfg
        with initialize_config_module("specdec.conf", version_base="1.3"):
            cfg = compose(name, overrides=list(overrides))
            return cfg
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_sentence(error)) from error
