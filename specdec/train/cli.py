"""`specdec train`: text, training, measurement, export, each from where it stopped. Composed by Hydra from conf/train.yaml."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from specdec import composition, report
from specdec.experiment import Job
from specdec.target import Target, ranks
from specdec.target.backends import choose_device
from specdec.target.llama import Llama
from specdec.tracking.run_folder import RunFolder
from specdec.train import shards
from specdec.train.corpus import Corpus
from specdec.train.evaluate import Evaluation, acceptance_lengths
from specdec.train.export import STORAGE
from specdec.train.features import CachedFeatures, Features, FeatureSource, cache_features
from specdec.train.generate import identity, write_corpus
from specdec.train.heads import TrainableHead
from specdec.train.params import TrainingParams
from specdec.train.session import Session, note, plain, wait
from specdec.train.turns import DatasetText, Source
from specdec.train.vocabulary import coverage, draft_vocabulary, special_tokens

TOGETHER = 16384  # tokens of prompts that a GPU reads in a forward while it writes text


def run(cfg: DictConfig, console: Console, folder: Path, volatile: Sequence[str]) -> float | None:
    """Train as composed, into rank 0's `folder`; returns the acceptance length over all tasks.

    volatile: keys of the config that may change between the parts of an interrupted run.
    """
    composition.check_values(cfg)
    choices, group = HydraConfig.get().runtime.choices, ranks.joined()
    folder, argv = Path(ranks.share(str(folder))), [_word(word) for word in sys.argv]
    params, source, job = _params(cfg), _source(cfg), _job(cfg, choices.verifier)
    verifier, sampling = composition.build(cfg.verifier, "verifier"), composition.build_sampling(cfg)
    tracker, recorded = composition.build(cfg.tracking, "tracking"), _recorded(cfg, choices, volatile)
    writes = group is None or group.rank == 0
    with RunFolder(folder, recorded, argv) if writes else nullcontext() as run_folder:
        if ranks.share((folder / "head" / "README.md").exists()):
            note(console, f"{folder} is done already; give another run_dir to train again")
            return None
        console.print(f"target {choices.target}: loading ...", style="dim")
        target = _target(cfg, group)
        corpus = _text(cfg, target, source, group, console)
        head, facts = _head(cfg, target, corpus)
        if writes:
            made_of = {"target": identity(target), "text": corpus.fingerprint, "head": head.settings()}
            shards.bind(folder / "checkpoints", {**recorded, **made_of})
        evaluation = Evaluation(target, choices.drafter, cfg.drafter, verifier, sampling, cfg.batch_size, job)
        session = Session(cfg, head, corpus, evaluation, run_folder, recorded, argv, group)
        session.train(params, _features(cfg, target, head, corpus, group, console), folder, console)
        if run_folder is None:
            return None
        summary = session.finish(params, facts)
    report.print_summary(summary, console)
    note(console, f"head: {folder / 'head'}; drafter.checkpoint={folder / 'head'} drafts with it")
    if where := tracker.log(folder):
        note(console, f"W&B: {where}")
    return acceptance_lengths(summary, choices.drafter)["all"][0]


# ---- the parts of a run ----------------------------------------------------------------------------------------------


def _word(word: str) -> str:
    """An argument as it was given."""
    return "train" if word == "--config-name=train" else word


def _job(cfg: DictConfig, verifier: str) -> Job:
    """What a measurement decodes."""
    conversations = composition.build(cfg.dataset, "dataset").load()
    return Job(conversations, cfg.max_new_tokens, cfg.seed, cfg.passes, cfg.ignore_eos, verifier)


def _on_gpu(cfg: DictConfig) -> bool:
    """Whether the target will be on a GPU, which wants more work at once than a CPU."""
    return choose_device(cfg.target.get("device", "cpu")).type == "cuda"


def _params(cfg: DictConfig) -> TrainingParams:
    """The training group without what describes the head; what is null by the device."""
    if cfg.storage not in STORAGE:
        raise ValueError(f"storage={cfg.storage} is unknown; choose one of {', '.join(STORAGE)}")
    values, usual = plain(cfg.training), {"micro_batch": (8, 64), "chunk": (1024, 8192)}
    values |= {key: sizes[_on_gpu(cfg)] for key, sizes in usual.items() if values[key] is None}
    return TrainingParams(**{key: values[key] for key in values if key not in ("head", "draft_vocab_size")})


def _source(cfg: DictConfig) -> Source:
    """Who writes the user's side."""
    if "prompts" in cfg.data:
        return DatasetText(composition.build(cfg.data.prompts, "dataset"))
    source: Source = composition.build(cfg.data.turns, "data.turns")
    return source


def _target(cfg: DictConfig, group: ranks.Ranks | None) -> Target:
    """A whole target for every process, on a device of its own."""
    node = cfg.target
    if group is not None:
        if "shard" not in node:
            raise ValueError(
                f"{group.world} processes were started, and only target=llama gives each a target of its own"
            )
        device = group.place(choose_device(node.device))
        node = OmegaConf.merge(node, {"shard": "0/1", "device": str(device)})
    target: Target = composition.build(node, "target")
    if isinstance(target, Llama) and node.get("prefill_chunk") is None:
        target.prefill_shared = TOGETHER  # nobody asks for the bits of this text but with the same company
    return target


def _text(cfg: DictConfig, target: Target, source: Source, group: ranks.Ranks | None, console: Console) -> Corpus:
    """The first data.tokens of data.folder, once there are so many."""
    rank, world = (group.rank, group.world) if group else (0, 1)
    write_corpus(
        cfg.data.folder, target, source, cfg.data.tokens, composition.build(cfg.data.answers, "data.answers"),
        batch_size=cfg.data.batch_size or (64, 512)[_on_gpu(cfg)], rank=rank, world=world, console=console,
    )  # fmt: skip
    wait(group)
    corpus = Corpus(cfg.data.folder, cfg.data.heldout, cfg.data.tokens)
    corpus.steps(cfg.training.batch_size, cfg.training.max_len)  # enough for a batch
    return corpus


def _head(cfg: DictConfig, target: Target, corpus: Corpus) -> tuple[TrainableHead, dict[str, Any]]:
    """A fresh head, and what the card says of its text and vocabulary."""
    vocab, wanted = target.config.vocab_size, cfg.training.draft_vocab_size
    counts = corpus.counts(vocab)
    d2t: Tensor | None = None
    t2d: Tensor | None = None
    covered = 1.0
    if wanted is not None and wanted != vocab:
        d2t, t2d = draft_vocabulary(counts, wanted, special_tokens(target))
        covered = coverage(corpus.counts(vocab, "heldout"), t2d)
    head: TrainableHead = composition.build(cfg.training.head, "training.head")(
        target=target, d2t=d2t, t2d=t2d, seed=cfg.training.seed
    )
    settings = corpus.settings
    facts = {
        "text": f"{int(corpus.lengths.sum())} tokens in {len(corpus)} answers that the target gave (temperatures "
        f"{settings['temperatures']}, seed {settings['seed']}) to turns of source {settings['source']['name']}; "
        f"{cfg.data.heldout:.0%} of the conversations kept from training; fingerprint {corpus.fingerprint}",
        "draft vocabulary": f"{wanted or vocab} of {vocab} tokens, {covered:.2%} of the tokens in answers held out",
        "layers read": ", ".join(map(str, head.taps)),
    }
    return head, facts


def _features(
    cfg: DictConfig,
    target: Target,
    head: TrainableHead,
    corpus: Corpus,
    group: ranks.Ranks | None,
    console: Console,
) -> FeatureSource:
    """Computed as they are needed, or once, onto the disk."""
    taps = [tap for tap in head.taps if isinstance(tap, int)]
    features = Features(target, taps)
    if not cfg.data.cache:
        return features
    place = Path(cfg.data.folder) / f"features-{'-'.join(map(str, taps))}"
    needed = 2 * int(corpus.lengths.sum()) * (len(taps) + 1) * target.config.hidden_size
    if not place.exists() and needed > (free := shutil.disk_usage(cfg.data.folder).free):
        raise ValueError(
            f"features of this text take {needed / 1e9:.1f} GB, and {place.parent} has {free / 1e9:.1f} GB left: free "
            "some, or leave data.cache off"
        )
    if group is None or group.rank == 0:
        cache_features(place, corpus, features, console=console)
    wait(group)
    return CachedFeatures(place, corpus, taps)


def _recorded(cfg: DictConfig, choices: DictConfig, volatile: Sequence[str]) -> dict[str, Any]:
    """What may not change between the parts of an interrupted run."""
    names = {str(key): value for key, value in choices.items() if not str(key).startswith("hydra") and value}
    names.pop("tracking", None)
    return {"choices": names, "config": {key: value for key, value in plain(cfg).items() if key not in volatile}}
