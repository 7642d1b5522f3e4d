"""How a head is trained: the keys of conf/training/*.yaml, checked before a weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from specdec.train.losses import choose_loss

__all__ = ["TrainingParams"]

PRECISIONS = ("auto", "float32", "bfloat16")
COUNTS = ("steps", "batch_size", "micro_batch", "chunk", "log_interval", "checkpoint_interval", "eval_interval")

KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "whole number"),
    "float": ((int, float), "number"),
    "str": (str, "name"),
}


@dataclass(frozen=True, slots=True)
class TrainingParams:
    """How a head is trained; the keys of conf/training/*.yaml."""

    steps: int
    batch_size: int = 16  # rows of a step, over all processes
    micro_batch: int = 8  # rows a process runs at once: less memory, same result
    max_len: int = 1024  # tokens after which a row is cut
    learning_rate: float = 3e-4
    warmup: int = 100  # steps up to the learning rate; a cosine leads down to `final_share` of it
    final_share: float = 0.05
    weight_decay: float = 0.0  # of matrices
    clip: float = 0.5  # norm of the gradient at most
    loss: str = "kl"
    eta: float = 3.0  # of loss=hybrid
    depth_decay: float = 0.8  # prediction j counts depth_decay ** j
    precision: str = "auto"  # auto: bfloat16 products on a GPU
    chunk: int = 1024  # predictions whose V logits are held at once
    log_interval: int = 10
    checkpoint_interval: int = 200
    eval_interval: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            kinds, words = KINDS[str(field.type)]
            value = getattr(self, field.name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"training.{field.name}={value} must be a {words}")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}={getattr(self, name)} must be at least 1")
        if self.max_len < 3:
            raise ValueError(
                f"training.max_len={self.max_len} must be at least 3: a head predicts the third token first"
            )
        if self.learning_rate <= 0 or self.clip <= 0 or self.warmup < 0:
            raise ValueError("training.learning_rate and clip must be above 0, warmup not below")
        if self.precision not in PRECISIONS:
            raise ValueError(f"training.precision={self.precision} is unknown; choose one of {', '.join(PRECISIONS)}")
        choose_loss(self.loss, self.eta)

    def rate(self, step: int) -> float:
        """Learning rate of a step, the first being 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        low = self.final_share
        return self.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2)
