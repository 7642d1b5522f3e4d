"""What a head under training is worth: acceptance lengths of the real decoder on prompts kept for development."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from specdec import composition
from specdec.decoding import SpeculativeDecoder
from specdec.drafter import Drafter
from specdec.experiment import Experiment, Job, follow
from specdec.target import Target
from specdec.tracking.run_folder import RunFolder

__all__ = ["Evaluation", "acceptance_lengths"]

BASELINE = composition.BASELINE


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Decodes with an exported head: the drafter of the config, its checkpoint exchanged. Not a second way to measure."""

    target: Target
    name: str  # of the drafter in config and trace
    drafter: DictConfig
    verifier: Any
    sampling: Any
    batch_size: int
    job: Job

    def decoders(self, checkpoint: Path, baseline: bool) -> dict[str, SpeculativeDecoder]:
        """Plain decoding, where wanted, and the head's."""
        drafters: dict[str, Drafter] = {}
        if baseline:
            drafters[BASELINE] = composition.plain_drafter()
        config = OmegaConf.merge(self.drafter, {"checkpoint": str(checkpoint)})
        drafters[self.name] = composition.build(config, "drafter")
        return {
            name: SpeculativeDecoder(self.target, drafter, self.verifier, self.sampling, self.batch_size)
            for name, drafter in drafters.items()
        }

    def measure(self, checkpoint: Path, folder: RunFolder | None, baseline: bool = False) -> pd.DataFrame | None:
        """Decode the prompts into a run folder; its summary. Ranks without a folder decode alike, so that none waits."""
        decoders = self.decoders(checkpoint, baseline)
        if folder is None:
            follow(decoders)
            return None
        return Experiment(decoders, self.job, folder).run(Console(quiet=True))


def acceptance_lengths(summary: pd.DataFrame, name: str) -> dict[str, list[float | None]]:
    """Acceptance length with its 95% interval, by task: {task: [tau, low, high]}, None where there is none."""
    rows = summary[summary["drafter"] == name]
    columns = rows[["task", "tau", "tau_low", "tau_high"]].itertuples(index=False, name=None)
    return {task: [None if math.isnan(value) else round(value, 4) for value in values] for task, *values in columns}
