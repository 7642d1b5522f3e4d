"""One head's training and measurements, and the folder they leave."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from specdec import metrics, report
from specdec.decoding.self_test import known_prompt_length
from specdec.drafter import Drafter
from specdec.target import ranks
from specdec.tracking.environment import environment
from specdec.tracking.run_folder import RunFolder
from specdec.train.corpus import Batch, Corpus
from specdec.train.evaluate import Evaluation, acceptance_lengths
from specdec.train.export import card, export
from specdec.train.features import FeatureSource
from specdec.train.generate import identity
from specdec.train.heads import TrainableHead
from specdec.train.params import TrainingParams
from specdec.train.trainer import Trainer

__all__ = ["Session", "note", "plain", "wait"]

HELDOUT_BATCHES = 8  # read at each measurement


class Session:
    """One head's training and measurements. run_folder: rank 0's, None on the others."""

    def __init__(
        self,
        cfg: DictConfig,
        head: TrainableHead,
        corpus: Corpus,
        evaluation: Evaluation,
        run_folder: RunFolder | None,
        recorded: dict[str, Any],
        argv: list[str],
        group: ranks.Ranks | None,
    ) -> None:
        self.cfg, self.head, self.corpus, self.evaluation, self.group = cfg, head, corpus, evaluation, group
        self.run_folder, self.recorded, self.argv = run_folder, recorded, argv

    def train(self, params: TrainingParams, features: FeatureSource, folder: Path, console: Console) -> None:
        """Measuring on the way. ValueError where the drafter refuses the head, before time is spent on it."""
        target, place = self.evaluation.target, folder / "head"

        def batches(epoch: int, start: int) -> Iterator[Batch]:
            return self.corpus.batches(params.batch_size, params.max_len, params.seed, epoch, start_step=start)

        def evaluate(step: int) -> dict[str, Any]:
            self._export(place, {"steps": step})
            wait(self.group)
            if step == params.steps:  # beside plain decoding, into the run's own folder
                summary = self.evaluation.measure(place, self.run_folder, self.cfg.baseline)
            else:
                with self._place(folder / "eval" / f"step-{step:08d}") as measured:
                    summary = self.evaluation.measure(place, measured)
            lengths = {} if summary is None else acceptance_lengths(summary, self.evaluation.name)
            if lengths:
                note(console, f"step {step}: acceptance length {_length(lengths['all'])}")
            return {"tau": lengths, "heldout": trainer.measure(self._heldout(params))}

        self._export(place, {"steps": 0})
        wait(self.group)
        for decoder in self.evaluation.decoders(place, baseline=False).values():
            _check_weights(decoder.drafter, self.evaluation.name, place)
            decoder.drafter.setup(target, 1, 64, decoder.verifier.law)
        trainer = Trainer(
            self.head, target.embed, target.lm_head, features, batches, params, folder, self.group, self.corpus.name
        )
        try:
            trainer.train(evaluate, console)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the GPU's memory is full ({str(error).split('. ')[0]}): lower training.micro_batch (now "
                f"{params.micro_batch}), training.max_len (now {params.max_len}) or training.chunk (now {params.chunk})"
            ) from error
        self.standing = trainer.standing

    def _export(self, place: Path, notes: dict[str, Any], text: str | None = None) -> None:
        if self.run_folder is not None:
            export(self.head, place, self.cfg.storage, notes, text)

    def _place(self, place: Path) -> AbstractContextManager[RunFolder | None]:
        """A run folder for one measurement, begun anew: a killed one may have left another head's."""
        if self.run_folder is None:
            return nullcontext()
        shutil.rmtree(place, ignore_errors=True)
        return RunFolder(place, self.recorded, self.argv)

    def _heldout(self, params: TrainingParams) -> Iterator[Batch]:
        rows = self.corpus.rows("heldout", params.max_len)[: HELDOUT_BATCHES * params.batch_size]
        parts = torch.split(rows, params.batch_size) if len(rows) else ()
        return (self.corpus.batch(part, params.max_len) for part in parts)

    def finish(self, params: TrainingParams, facts: dict[str, Any]) -> pd.DataFrame:
        """Write the head again with its card; returns the summary of its last measurement."""
        assert self.run_folder is not None
        cfg, name, at, path = self.cfg, self.evaluation.name, self.standing, self.run_folder.path
        summary, target = metrics.summary(metrics.load_trace(path)), HydraConfig.get().runtime.choices.target
        facts = {
            **{fact: value for fact, value in facts.items() if value},  # a model of its own reads no layers
            "training": f"{at.step} steps of {params.batch_size} rows, {at.tokens} tokens read, loss {params.loss}, "
            f"learning rate {params.learning_rate:g}, seed {params.seed}",
            "measured": f"{len(self.evaluation.job.conversations)} prompts kept for development, up to "
            f"{cfg.max_new_tokens} tokens each, temperature {cfg.sampling.temperature:g}, batch size {cfg.batch_size}",
        }
        limits = [
            f"It drafts for this target alone ({target}, embedding {identity(self.evaluation.target)['embedding']}).",
            f"It was trained on rows of up to {params.max_len} tokens; behind that its drafts may be accepted less.",
            "It knows the kinds of text and the languages that the text above holds; acceptance elsewhere may be lower.",
            "The intervals cover the choice of prompts, not another kind of prompt, another template or training run.",
        ]
        use = f"specdec drafter={name} drafter.checkpoint=THIS_FOLDER target={target}"
        text = card(
            f"{name} head for {target}", use, report.acceptance(summary, name), facts, environment(self.argv), limits
        )
        drafter = {key: value for key, value in plain(cfg.drafter).items() if key not in ("_target_", "checkpoint")}
        reached = {"drafter": drafter, "sampling": plain(cfg.sampling), "tau": acceptance_lengths(summary, name)}
        notes = {"steps": at.step, "tokens": at.tokens, "trained_on": facts, "acceptance": reached}
        decoder = self.evaluation.decoders(path / "head", baseline=False)[name]
        if (tau := known_prompt_length(decoder)) is not None:
            notes["self_test"] = {"depth": decoder.drafter.depth, "tau": round(tau, 4)}
        self._export(path / "head", notes, text)
        return summary


def _check_weights(drafter: Drafter, name: str, place: Path) -> None:
    """ValueError where a drafter did not take the head that was just written, untrained: others would be measured."""
    if not drafter.trained or drafter.card.get("steps", 0) != 0:
        raise ValueError(
            f"drafter={name} drafts with other weights than those in training, {place}: leave out what names them (as "
            "drafter.model.checkpoint does), or, in a drafter of your own, load its checkpoint and say trained = True"
        )


def plain(cfg: Any) -> dict[str, Any]:
    """A part of the config as plain values."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def wait(group: ranks.Ranks | None) -> None:
    """Until every process is here."""
    if group is not None:
        group.gather(torch.zeros(1))


def note(console: Console, line: str) -> None:
    """A line as it is: brackets are no markup, and a path stays whole for copying."""
    console.print(Text(line), soft_wrap=True)


def _length(values: list[float | None]) -> str:
    tau, low, high = (f"{value:.2f}" if value is not None else "?" for value in values)
    return f"{tau} [{low}, {high}]"
