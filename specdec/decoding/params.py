"""What a user may ask of a decoder, checked before any weight is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from numbers import Integral
from pkgutil import iter_modules
from typing import Literal

import torch

from specdec import verifier as verifiers
from specdec.drafter import Drafter
from specdec.target import Target
from specdec.types import Sampling
from specdec.verifier import Verifier

LARGEST_SEED = 2**31 - 1  # the noise of a request is keyed by 63 bits, of which its prompt takes 32


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen: temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int | float):
                raise ValueError(f"sampling.{name}={value!r} must be a number")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"sampling.temperature={self.temperature} must be 0 (greedy) or above")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise ValueError(f"sampling.top_k={self.top_k} must be a whole number, 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p} must be above 0 and at most 1 (off)")
        if self.temperature == 0 and (self.top_k > 0 or self.top_p < 1):
            warnings.warn(
                f"sampling.top_k={self.top_k} and top_p={self.top_p} change nothing at temperature 0: set sampling.temperature",
                stacklevel=3,
            )

    def tensors(self, batch: int, device: torch.device) -> Sampling:
        """The same values for every row; seeds and positions are set as requests begin."""
        mode: Literal["greedy", "sampled", "warped"]
        mode = "greedy" if self.temperature == 0 else "sampled" if self.top_k == 0 and self.top_p == 1 else "warped"
        zeros = torch.zeros(batch, device=device)
        return Sampling(
            zeros + self.temperature, zeros.int() + self.top_k, zeros + self.top_p, zeros.long(), zeros.int(), mode
        )


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """ValueError unless the value is a whole number from `least` to `most`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r} must be a whole number {bounds}")


def check_seed(seed: object, passes: int = 1) -> None:
    """ValueError for a seed whose bits would not all count; later passes take the seeds that follow."""
    check_whole("seed", seed, 0, LARGEST_SEED - (passes - 1))


def needs_whole_logits(drafter: Drafter, verifier: Verifier, sampling: Sampling, logprobs: bool = False) -> bool:
    """Whether more of the logits is looked at than which token is chosen, so that no part of the vocabulary will do."""
    observes = type(drafter).observe is not Drafter.observe
    return verifier.reads_logits or observes or sampling.mode == "warped" or logprobs


def check_pair(drafter: Drafter, verifier: Verifier) -> None:
    """ValueError where a verifier cannot judge what a drafter proposes: says what each needs and offers."""
    if misfit := _misfit(drafter, verifier):
        others = [one for one in _verifiers() if type(one) is not type(verifier) and one.lossless == verifier.lossless]
        fitting = [config_name(one) for one in others if not _misfit(drafter, one)]
        raise ValueError(f"{misfit}: use another drafter, or a verifier that fits: {', '.join(fitting)}")


def config_name(part: Drafter | Verifier | Target) -> str:
    """What a config calls a part of ours, which is its file's name; of a part from elsewhere its class's name."""
    package, _, name = type(part).__module__.rpartition(".")
    return name if package.startswith("specdec.") else type(part).__name__


def _misfit(drafter: Drafter, verifier: Verifier) -> str:
    """Why a verifier cannot judge what a drafter proposes, or nothing."""
    names = config_name(drafter), config_name(verifier)
    if not verifier.supports_trees and drafter.depth != drafter.num_draft_tokens:
        return (
            f"{names[1]} judges chains only, and {names[0]} proposes trees ({drafter.num_draft_tokens} drafts, depth "
            f"{drafter.depth})"
        )
    if verifier.law not in drafter.laws | {"any"} and "any" not in drafter.laws:
        return f"{names[1]} needs drafts of law {verifier.law!r}, and {names[0]} offers {sorted(drafter.laws)}"
    return ""


def _verifiers() -> Iterator[Verifier]:
    """Every verifier that ships, as its config has it by default."""
    for file in iter_modules(verifiers.__path__):
        module = import_module(f"{verifiers.__name__}.{file.name}")
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, Verifier) and kind.__module__ == module.__name__:
                yield kind()
