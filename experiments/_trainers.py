"""One EAGLE-3 head by our trainer and one by the speculators package's own, from the same batches and features of our target.

Shapes: B rows of a batch, T tokens, F tapped layers, H hidden size, V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar
from unittest import mock

import torch
from _gpu import wait
from rich.console import Console
from torch import Tensor

from specdec.drafter._eagle_formats import format_of
from specdec.metrics import read_rows
from specdec.nn.eagle import EagleConfig, default_feature_layers
from specdec.train.corpus import Batch, Corpus
from specdec.train.eagle3 import Eagle3Head, make_head
from specdec.train.export import export
from specdec.train.features import Features
from specdec.train.params import TrainingParams
from specdec.train.trainer import Trainer
from specdec.weights import checkpoint

BLOCK = 128  # tokens of a block of their attention; their packed rows are whole blocks
RECIPE = (
    "optimizer", "weight_decay", "scheduler_type", "muon_momentum", "muon_weight_decay", "ttt_step_loss_decay",
    "loss_fn", "loss_implementation", "draft_attn_impl",
)  # fmt: skip
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What both trainers share."""

    target: Any
    corpus: Corpus
    d2t: Tensor  # int64 [W]
    t2d: Tensor  # bool [V]
    params: TrainingParams  # of ours; theirs take steps, batch_size, max_len, learning_rate and seed from them
    depth: int
    switches: dict[str, bool]
    attention: str | None  # theirs; None: their default on a GPU, "eager" elsewhere

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch."""
        params = self.params
        return self.corpus.batches(params.batch_size, params.max_len, params.seed, epoch, start_step=start)

    def stream(self) -> Iterator[Batch]:
        """The batches of all steps."""
        return islice((batch for epoch in count() for batch in self.batches(epoch)), self.params.steps)


@dataclass(frozen=True)
class Trained:
    """A finished head, and how its training went."""

    folder: Path  # what drafter.checkpoint takes
    seconds: list[float]  # of every step, the target's part left out
    losses: list[tuple[int, float]]  # step and loss, as the trainer defines it
    parameters: int  # that learn
    recipe: dict[str, Any]


class Clock:
    """Seconds of every step, without what the target computes for it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._target = device, list[float](), 0.0

    def _now(self) -> float:
        wait(self.device)
        return perf_counter()

    def over(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; a step lasts until the next one is asked for."""
        for batch in batches:
            begin, self._target = self._now(), 0.0
            yield batch
            self.seconds.append(self._now() - begin - self._target)

    def without(self, features: Features) -> Callable[[Batch], tuple[Tensor, Tensor]]:
        """The same features, their time left out."""

        def timed(batch: Batch) -> tuple[Tensor, Tensor]:
            begin = self._now()
            found = features(batch)
            self._target += self._now() - begin
            return found

        return timed


# ---- ours ------------------------------------------------------------------------------------------------------------


def train_ours(plan: Plan, folder: Path) -> Trained:
    """A head by our trainer, exported into `folder`."""
    shutil.rmtree(folder, ignore_errors=True)  # the trainer would go on with what lies there
    target, params, clock = plan.target, plan.params, Clock(plan.target.device)
    head = make_head(target, plan.d2t, plan.t2d, params.seed, plan.depth, **plan.switches)
    trainer = Trainer(
        head, target.embed, target.lm_head, clock.without(_features(target, head)),
        lambda epoch, start: clock.over(plan.batches(epoch, start)), params, folder, name_row=plan.corpus.name,
    )  # fmt: skip
    trainer.train(lambda step: {}, Console(stderr=True))
    export(head, folder / "head", "bfloat16", {"steps": params.steps})
    losses = [(row["step"], row["loss"]) for row in read_rows(folder / "train.jsonl")[0] if "loss" in row]
    parameters = sum(parameter.numel() for parameter in head.parameters())
    return Trained(folder / "head", clock.seconds, losses, parameters, asdict(params) | {"depth": plan.depth})


def _features(target: Any, head: Eagle3Head) -> Features:
    return Features(target, [tap for tap in head.taps if isinstance(tap, int)])


def heldout(plan: Plan, folder: Path) -> dict[str, Any]:
    """KL, alpha and accuracy by depth of a head in either format, on the text kept from training."""
    described = checkpoint.read_config(folder)
    form = format_of(described)
    named = {form.rename(name): tensor.read() for name, tensor in checkpoint.iter_tensors(folder)}
    tensors = {name: tensor for name, tensor in named.items() if name is not None}
    config = EagleConfig.from_dict(form.translate(described)).for_target(plan.target.config)
    head = Eagle3Head(config, tensors.get("d2t"), tensors.get("t2d"), plan.depth)
    head.load_state_dict(tensors)
    target, params = plan.target, plan.params
    features = _features(target, head)
    trainer = Trainer(head, target.embed, target.lm_head, features, plan.batches, params, folder)
    rows = plan.corpus.rows("heldout", params.max_len)
    parts = torch.split(rows, params.batch_size) if len(rows) else ()
    return trainer.measure(plan.corpus.batch(part, params.max_len) for part in parts)


# ---- theirs ----------------------------------------------------------------------------------------------------------


def train_theirs(plan: Plan, loss: str, optimizer: str, folder: Path) -> Trained:
    """A head by their Trainer, model, loss and defaults, saved by them into a folder in `folder`."""
    from speculators.train import cli
    from speculators.train.trainer import Trainer as TheirTrainer
    from speculators.train.trainer import TrainerConfig

    shutil.rmtree(folder, ignore_errors=True)
    device, clock = plan.target.device, Clock(plan.target.device)
    args = _their_args(plan, loss, optimizer)
    cli.set_seed(args["seed"])
    model = _their_model(plan, args)
    call, _ = model.get_trainer_kwargs(**args)
    known = {key: args[key] for key in TrainerConfig._fields if key in args}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    known |= {
        "num_epochs": 1,
        "save_path": str(folder),
        "hidden_states_dtype": dtype,
        "log_freq": plan.params.log_interval,
    }
    config = TrainerConfig(**{**known, "train_call_kwargs": call, "val_call_kwargs": call})

    class OnDevice(TheirTrainer):  # theirs trains on an accelerator alone; a CPU is a device like another here
        def setup_trainer(self) -> None:
            super().setup_trainer()
            self.local_rank, self.device_type = device, device.type

    log = _Log()
    metrics = logging.getLogger("speculators.metrics")
    metrics.setLevel(logging.INFO)
    metrics.addHandler(log)
    waiting = mock.patch.object(torch.accelerator, "synchronize") if device.type == "cpu" else nullcontext()
    with waiting:  # their log waits for the accelerator, which torch refuses where there is none
        OnDevice(model, config, _Feed(plan, clock, dtype)).run_training()
    metrics.removeHandler(log)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    recipe = {key: args[key] for key in RECIPE}
    return Trained(folder / "0", clock.seconds, log.losses, parameters, recipe)


def _their_args(plan: Plan, loss: str, optimizer: str) -> dict[str, Any]:
    """Their defaults for everything that is not shared. norm_before_fc, a default of theirs, is a switch of both heads."""
    from speculators.train.config import TrainConfig

    params, on_gpu = plan.params, plan.target.device.type == "cuda"
    taps = default_feature_layers(plan.target.config.num_layers)
    shared = {
        "verifier_name_or_path": str(plan.target.checkpoint), "seed": params.seed, "lr": params.learning_rate,
        "ttt_steps": plan.depth, "loss_fn": loss, "optimizer": optimizer,
        "draft_vocab_size": len(plan.d2t), "norm_before_fc": False, **plan.switches,
        "target_layer_ids": [tap + 1 for tap in taps],  # they count the layers before which the features stand
        "loss_implementation": "fused" if on_gpu else "eager", "full_attention_indices": [0],
        "draft_attn_impl": plan.attention or ("simple_flex_attention" if on_gpu else "eager"),
    }  # fmt: skip
    return dict(TrainConfig.from_flat(shared).flatten())


def _their_model(plan: Plan, args: dict[str, Any]) -> Any:
    """As their command builds it from the target's folder: fresh layer, the target's embedding, norm and head."""
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.train import cli

    layer = cli.create_transformer_layer_config(
        verifier_name_or_path=args["verifier_name_or_path"],
        num_layers=args["num_layers"],
        draft_arch=args["draft_arch"],
        hidden_act=args["draft_hidden_act"],
        sliding_window=args["sliding_window"],
        full_attention_indices=args["full_attention_indices"],
    )
    return Eagle3DraftModel.from_training_args(verifier_config=layer, t2d=plan.t2d, d2t=plan.d2t, **args)


class _Feed:
    """Our batches for their Trainer: rows behind one another in one of a fixed length, shifted and packed by their code.

    Their verifier_last_hidden_states come before the final norm, which their model applies itself. Their loss mask marks
    the token whose law is learnt from, ours the token that is learnt: it moves by one, so that both learn the same tokens.
    """

    batch_sampler = None

    def __init__(self, plan: Plan, clock: Clock, dtype: torch.dtype) -> None:
        from speculators.models.eagle3.data import shift_batch
        from speculators.train.data import CollateFn

        self.plan, self.clock, config = plan, clock, plan.target.config
        taps = default_feature_layers(config.num_layers)
        self.features = Features(plan.target, (*taps, config.num_layers - 1))
        longest = max(int(batch.lengths.sum()) - len(batch.lengths) for batch in plan.stream())
        size = longest + -longest % BLOCK
        self.collate = CollateFn(size, config.hidden_size, len(taps), dtype, preprocess=shift_batch)

    def __len__(self) -> int:
        return self.plan.params.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.clock.over(map(self._packed, self.plan.stream()))

    def _packed(self, batch: Batch) -> dict[str, Any]:
        device, size = self.plan.target.device, self.plan.target.config.hidden_size
        taps, _ = self.features(Batch(batch.tokens.to(device), batch.lengths, batch.loss_mask.to(device), batch.rows))
        learnt = batch.loss_mask.roll(-1, 1)
        rows = []
        for row, length in enumerate(batch.lengths.tolist()):
            mask = learnt[row, :length].clone()
            mask[-1] = False  # nothing stands behind it
            rows.append({
                "hidden_states": taps[row, :length, :-size], "verifier_last_hidden_states": taps[row, :length, -size:],
                "input_ids": batch.tokens[row, :length], "loss_mask": mask, "lengths": torch.tensor([length]),
                "position_ids": torch.arange(length),
            })  # fmt: skip
        packed: dict[str, Any] = self.collate(rows)
        return packed


class _Log(logging.Handler):
    """Their losses, as their metrics logger tells them."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[tuple[int, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        told: Any = record.msg
        if isinstance(told, dict) and "train" in told:
            self.losses.append((told["global_step"] + 1, float(told["train"]["loss"])))
