"""The training loop of a draft head beside a frozen target.

Shapes: B rows, T positions, H hidden size, V target vocabulary, W draft vocabulary, J predictions of a position, n of a chunk.

A step's gradient is the sum over every prediction of the whole batch, divided once by the number of those of depth 0: neither
micro-batches nor the number of processes change what is computed, but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from specdec.target.ranks import Ranks
from specdec.train import checkpoint
from specdec.train.checkpoint import Standing
from specdec.train.corpus import Batch
from specdec.train.heads import TrainableHead
from specdec.train.log import COUNT, LOSS, TrainLog, averages
from specdec.train.losses import Judge, target_law
from specdec.train.params import TrainingParams

__all__ = ["Batches", "Features", "Trainer"]

Batches = Callable[[int, int], Iterator[Batch]]  # (epoch, batches of it to leave out), the same for the same numbers
Features = Callable[[Batch], tuple[Tensor, Tensor]]  # taps [B, T, F * H] and final hidden states [B, T, H]


class Trainer:
    """Trains a head in place. `train` goes on from the newest checkpoint in its folder.

    embed, lm_head: the target's [V, H]. ranks: the processes that share the work, each with a target of its own; each
    takes every world-th row of a batch.
    """

    def __init__(
        self,
        head: TrainableHead,
        embed: Tensor,
        lm_head: Tensor,
        features: Features,
        batches: Batches,
        params: TrainingParams,
        folder: Path,
        ranks: Ranks | None = None,
        name_row: Callable[[int], str] = str,
    ) -> None:
        self.device = embed.device
        self.head, self.embed = head.to(self.device), embed
        self.lm_head = lm_head if self.device.type == "cuda" else lm_head.float()  # see target_law
        self.features, self.batches, self.params, self.folder = features, batches, params, folder
        self.ranks, self.name_row = ranks, name_row
        self.rank, self.world = (ranks.rank, ranks.world) if ranks else (0, 1)
        self.judge = Judge(params.loss, params.eta)
        self.amp = params.precision == "bfloat16" or (params.precision == "auto" and self.device.type == "cuda")
        matrices, vectors = ([p for p in head.parameters() if (p.dim() > 1) == many] for many in (True, False))
        groups = [{"params": matrices, "weight_decay": params.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=params.learning_rate, betas=(0.9, 0.95))
        self.standing = Standing()

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def train(self, evaluate: Callable[[int], Mapping[str, Any]], console: Console) -> None:
        """Steps until params.steps; `evaluate` gives what is logged every eval_interval and after the last step."""
        self._resume()
        params, at = self.params, self.standing
        log = TrainLog(self.folder / "train.jsonl", at, self.rank == 0)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("training", total=params.steps, completed=at.step)
            self._evaluate(log, evaluate)  # a run may have been killed while it did
            for batch in self._stream():
                sums, norm = self._step(batch)
                log.add(sums, int(batch.lengths.sum()))
                if at.step % params.log_interval == 0 or at.step == params.steps:
                    row = log.step(params.rate(at.step - 1), norm, at)
                    bar.update(task, description=f"loss {row['loss']:.3f}  first draft right {row['accuracy'][0]:.0%}")
                if (at.step % params.checkpoint_interval == 0 or at.step == params.steps) and self.rank == 0:
                    checkpoint.save(self.folder / "checkpoints", self.head, self.optimizer, at)
                bar.update(task, completed=at.step)
                self._evaluate(log, evaluate)

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        place = checkpoint.latest(self.folder / "checkpoints")
        if place is not None:
            self.standing = checkpoint.restore(place, self.head, self.optimizer)

    def _evaluate(self, log: TrainLog, evaluate: Callable[[int], Mapping[str, Any]]) -> None:
        """Where it is due, and not done yet."""
        step, params = self.standing.step, self.params
        due = step > 0 and (step % params.eval_interval == 0 or step == params.steps)
        if due and step not in log.evaluated:
            log.write({"step": step, **evaluate(step)})

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Losses, alpha and accuracy by depth on text that is not trained on; every rank must ask."""
        sums = [self._accumulate(batch, rows) for batch in batches for rows in self._parts(batch)]
        zero = torch.zeros(self.head.depth, 4, dtype=torch.float64, device=self.device)
        return averages(self._sum(torch.stack([zero, *sums]).sum(0)).cpu())

    def _stream(self) -> Iterator[Batch]:
        """Batches from where the run stands to its last step."""
        at = self.standing
        while at.step < self.params.steps:
            begun = at.step
            for batch in self.batches(at.epoch, at.batch):
                if at.step == self.params.steps:
                    return
                at.step, at.batch, at.tokens = at.step + 1, at.batch + 1, at.tokens + int(batch.lengths.sum())
                yield batch
            if at.step == begun and at.batch == 0:
                raise ValueError("the training text holds no batch: write more of it with data.tokens")
            at.epoch, at.batch = at.epoch + 1, 0

    def _step(self, batch: Batch) -> tuple[Tensor, float]:
        """One update. Sums f64 [J, 4] over the whole batch, and the gradient's norm. ValueError where it is not finite."""
        params = self.params
        for parameter in self.head.parameters():
            parameter.grad = torch.zeros_like(parameter)
        parts = self._parts(batch)
        sums = [self._accumulate(batch, rows) for rows in parts]
        zero = torch.zeros(self.head.depth, 4, dtype=torch.float64, device=self.device)
        stats = self._sum(torch.stack([zero, *sums]).sum(0)).cpu()
        count = max(1.0, float(stats[0, COUNT]))
        for parameter in self.head.parameters():
            assert parameter.grad is not None
            parameter.grad = self._sum(parameter.grad) / count
        norm = float(torch.nn.utils.clip_grad_norm_(self.head.parameters(), params.clip))
        if not math.isfinite(norm + float(stats[:, LOSS].sum())):
            failed = [rows for rows, part in zip(parts, sums, strict=True) if not part[:, LOSS].isfinite().all()]
            self._stop(batch, failed)
        for group in self.optimizer.param_groups:
            group["lr"] = params.rate(self.standing.step - 1)
        self.optimizer.step()
        return stats, norm

    def _parts(self, batch: Batch) -> list[list[int]]:
        """This process's rows of a batch, a micro-batch each."""
        mine, size = list(range(self.rank, len(batch.tokens), self.world)), self.params.micro_batch
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def _accumulate(self, batch: Batch, rows: list[int]) -> Tensor:
        """Add some rows' gradients. Sums f64 [J, 4]."""
        lengths = batch.lengths[rows]
        tokens, mask = (x[rows, : int(lengths.max())] for x in (batch.tokens, batch.loss_mask))
        on_device = Batch(tokens.to(self.device), lengths, mask.to(self.device), batch.rows[rows])
        with torch.no_grad():
            taps, hidden = self.features(on_device)
            read = torch.cat([taps, hidden], -1) if "hidden" in self.head.taps else taps
        if torch.is_grad_enabled():
            read = self.head.augment(read, self._keys(batch.rows[rows]))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            states = self.head(on_device.tokens, read, self.embed)
            return self._predict(states, tokens, hidden, mask)

    def _predict(self, states: list[Tensor], tokens: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """Losses and gradients of all predictions, a chunk of tokens at a time, so that V logits exist for a chunk alone.

        The law of a token's predecessor s is computed once and judges every prediction of that token: the one of depth j
        was made at position s - 1 - j. Gradients gather at the states, then run through the head once. tokens and mask are
        the host's, which knows from them what is predicted and need not wait for the device.
        """
        leaves = [state.detach().flatten(0, 1).requires_grad_() for state in states]  # [B * T, H]
        goals, stats = hidden.flatten(0, 1), torch.zeros(len(states), 4, dtype=torch.float64, device=self.device)
        rows, at = mask[:, 2:].nonzero(as_tuple=True)
        at = at + 1  # position before the token that counts
        for r, s in zip(*(torch.split(x, self.params.chunk) for x in (rows, at)), strict=True) if len(at) else ():
            place, text = (r * mask.shape[1] + s).to(self.device), tokens[r, s + 1].to(self.device)
            with torch.autocast(self.device.type, enabled=False), torch.no_grad():
                goal = goals[place]
                law = target_law(goal, self.lm_head, text, self.head.ids, self.head.index)
            for j, leaf in enumerate(leaves):
                made, judged, wanted = place - 1 - j, law, goal
                if int(s.min()) < 1 + j:  # some stand too near the row's beginning to have been predicted so deep
                    inside = (s > j).nonzero().squeeze(1).to(self.device)
                    made, judged, wanted = made[inside], law[inside], goal[inside]
                predicted = leaf.index_select(0, made)
                loss, sums = self.judge(self.head.logits(j, predicted), judged)
                stats[j] += sums
                if torch.is_grad_enabled():
                    loss = self.head.objective(loss, predicted, wanted)
                    torch.autograd.backward(loss * self.params.depth_decay**j)
        reached = [(s, leaf.grad.view_as(s)) for s, leaf in zip(states, leaves, strict=True) if leaf.grad is not None]
        if reached:
            torch.autograd.backward([s for s, _ in reached], [grad for _, grad in reached])
        return stats

    def _keys(self, rows: Tensor) -> Tensor:
        """A number for each row of this epoch, by which a head draws its noise. int64 [B] -> int64 [B]."""
        epoch = (self.params.seed * 1_000_003 + self.standing.epoch) % (1 << 31)
        return rows.to(self.device) + (epoch << 32)

    # ---- beside it ---------------------------------------------------------------------------------------------------

    def _sum(self, x: Tensor) -> Tensor:
        return x if self.ranks is None else self.ranks.sum(x)

    def _stop(self, batch: Batch, parts: list[list[int]]) -> None:
        """Say which rows a step failed on, and from where the run can go on."""
        bad = torch.zeros(len(batch.tokens), device=self.device)
        for rows in parts:
            bad[rows] = 1.0
        rows = self._sum(bad).nonzero().squeeze(1).tolist()
        names = (
            "; ".join(self.name_row(row) for row in batch.rows[rows].tolist()) or "every loss is, the gradient is not"
        )
        at, kept = self.standing, checkpoint.latest(self.folder / "checkpoints")
        raise ValueError(
            f"the loss is not finite at step {at.step} (epoch {at.epoch}, batch {at.batch - 1}: {names}); "
            f"{kept or 'no checkpoint'} is kept from before: lower training.learning_rate or training.clip in a new "
            "run_dir, or look at these rows"
        )
