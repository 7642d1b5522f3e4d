"""From a Hydra config to objects: drafters and verifier first, checked as a whole, and only then the target's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from specdec.decoding import SamplingParams, SpeculativeDecoder, check_pair
from specdec.drafter import Drafter
from specdec.target import Target
from specdec.verifier import Verifier

BASELINE = "none"


def build(node: Any, group: str) -> Any:
    """Instantiate one config group; a user's mistake in it becomes a ValueError that names the group."""
    try:
        return instantiate(node)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, MissingMandatoryValue | OmegaConfBaseException):
            raise ValueError(_missing(cause, group)) from error
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from error
        if isinstance(cause, TypeError):
            raise ValueError(f"{group}: {cause}; see `specdec {group}=... --cfg job` for its keys") from error
        raise ValueError(f"{group}: {str(error).splitlines()[0]}") from error
    except OmegaConfBaseException as error:
        raise ValueError(_missing(error, group)) from error


def _missing(error: BaseException, group: str) -> str:
    key = getattr(error, "full_key", None) or "a key"
    return f"{key} has no value: give it one, as in {key}=VALUE ({str(error).splitlines()[0]})"


def build_sampling(cfg: DictConfig) -> SamplingParams:
    """The sampling group, checked."""
    values = OmegaConf.to_container(cfg.sampling, resolve=True)
    assert isinstance(values, dict)
    try:
        return SamplingParams(**{str(key): value for key, value in values.items()})
    except TypeError as error:
        raise ValueError(f"sampling: {error}; known keys are temperature, top_k and top_p") from error


def check_numbers(cfg: DictConfig) -> None:
    """ValueError for counts below their least value."""
    for key, least in (("max_new_tokens", 1), ("batch_size", 1), ("passes", 1)):
        value = cfg[key]
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{key}={value} must be a whole number of at least {least}")


def drafter_configs(cfg: DictConfig, chosen: str) -> dict[str, DictConfig]:
    """Config of every drafter of a run by name, the baseline first. `chosen` is the name given as drafter=."""
    names = [str(name) for name in cfg.drafters] or [chosen]
    if cfg.baseline and BASELINE not in names:
        names = [BASELINE, *names]
    return {name: cfg.drafter if name == chosen else _drafter_config(name) for name in dict.fromkeys(names)}


def _drafter_config(name: str) -> DictConfig:
    """Another choice of the drafter group, with its defaults."""
    loader = GlobalHydra.instance().config_loader()
    options = loader.get_group_options("drafter")
    if name not in options:
        raise ValueError(f"drafters names {name!r}, which does not exist; there are {', '.join(options)}")
    node: DictConfig = compose("config", overrides=[f"drafter={name}"]).drafter
    return node


def build_methods(configs: dict[str, DictConfig], verifier: Verifier) -> dict[str, Drafter]:
    """Instantiate the drafters and check each against the verifier."""
    drafters: dict[str, Drafter] = {name: build(node, "drafter") for name, node in configs.items()}
    for drafter in drafters.values():
        check_pair(drafter, verifier)
    return drafters


def load(*overrides: str, config_dir: str | Path | None = None) -> SpeculativeDecoder:
    """A decoder from the same config groups as the command line: load("drafter=ngram", "target=smollm2").

    config_dir: a folder with groups of your own, as --config-dir. ValueError for a user's mistake.
    """
    extra = [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"]
    cfg = compose_config([*overrides, *extra])
    check_numbers(cfg)
    verifier: Verifier = build(cfg.verifier, "verifier")
    drafter: Drafter = build(cfg.drafter, "drafter")
    check_pair(drafter, verifier)
    sampling = build_sampling(cfg)
    target: Target = build(cfg.target, "target")
    return SpeculativeDecoder(target, drafter, verifier, sampling, cfg.batch_size)


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """The composed config, from inside or outside a Hydra application; ValueError says what does not fit."""
    try:
        if GlobalHydra.instance().is_initialized():
            return compose("config", overrides=list(overrides))
        with initialize_config_module("specdec.conf", version_base="1.3"):
            return compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error
