"""The loop's bookkeeping on the device: committed tokens, lengths, who runs, and the stop test. No host reads.

Shapes: B rows, L token buffer, N nodes, D tree depth, F features, V vocabulary, E = D + 1 tokens a step can emit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels import steps
from specdec.kernels.steps import LENGTH, STOP
from specdec.types import Acceptance, DraftInputs, DraftTree, ModelOutput, Sampling

RECORD_FIELDS = 5  # num_nodes, draft_depth, num_accepted, num_emitted, finished; then tokens and, if asked, logprobs


@dataclass(slots=True)
class DecodeState:
    """Static buffers of one batch. A row that does not run keeps its length; nothing of it advances."""

    tokens: Tensor  # int64 [B, L]  committed tokens, then the root, then garbage
    lengths: Tensor  # int32 [B]  root included
    running: Tensor  # bool [B]
    limits: Tensor  # int32 [B]  length at which a row ends
    stop_ids: Tensor  # int64 [S]
    sampling: Sampling
    num_new: Tensor  # int32 [B]
    max_new: int
    features: Tensor | None  # [B, max_new, F]
    logprobs: bool  # whether records tell the emitted tokens' log-probabilities

    @classmethod
    def empty(cls, batch: int, max_len: int, stop_ids: Tensor, sampling: Sampling, logprobs: bool) -> DecodeState:
        """Nothing runs yet. max_len: longest row, with room for a whole tree behind it."""
        device = stop_ids.device
        zeros = torch.zeros(batch, dtype=torch.int32, device=device)
        tokens = torch.zeros(batch, max_len, dtype=torch.int64, device=device)
        return cls(tokens, zeros + 1, zeros.bool(), zeros + max_len, stop_ids, sampling, zeros, 0, None, logprobs)

    def begin(self, rows: Tensor, prompts: Tensor, lengths: Tensor, limits: Tensor, seeds: Tensor) -> None:
        """Put prompts int64 [B, P] of `lengths` [B] into the rows bool [B]; their roots follow with `set_roots`."""
        width = prompts.shape[1]
        self.tokens[:, :width] = torch.where(rows[:, None], prompts, self.tokens[:, :width])
        self.lengths = torch.where(rows, lengths + 1, self.lengths)
        self.limits = torch.where(rows, limits, self.limits)
        self.sampling.seed = torch.where(rows, seeds, self.sampling.seed)
        self.sampling.position = self.lengths - 1

    def set_roots(self, rows: Tensor, roots: Tensor, output: ModelOutput) -> Tensor:
        """Start the rows from the tokens chosen from prefill's output. Returns their record, like `advance`; E = 1."""
        index = (self.lengths - 1).long()[:, None]
        self.tokens.scatter_(1, index, torch.where(rows[:, None], roots[:, None], self.tokens.gather(1, index)))
        stopped = torch.isin(roots, self.stop_ids)
        ended = rows & (stopped | (self.lengths >= self.limits))
        self.running = torch.where(rows, ~ended, self.running)
        self.sampling.position = self.lengths
        if output.features is not None:
            self.features = self._joined(rows, output.features)
        self.num_new = torch.where(rows, self.lengths - 1, self.num_new)
        finished = ended * torch.where(stopped, STOP, LENGTH)
        zero = torch.zeros_like(roots)
        record = torch.stack([zero, zero, zero - 1, rows.long(), finished, roots], 1)
        return _with_logprobs(record, output.logits) if self.logprobs else record

    def _joined(self, rows: Tensor, features: Tensor) -> Tensor:
        """Prompt features [B, P, F] for the rows that begin, the last step's for the others."""
        if self.features is None:
            return features
        width = max(features.shape[1], self.features.shape[1])
        begun, others = (F.pad(f, (0, 0, 0, width - f.shape[1])) for f in (features, self.features))
        return torch.where(rows[:, None, None], begun, others)

    def keep_last(self, width: int) -> None:
        """Offer of every row its last `width` new tokens alone: the drafter has read those before."""
        behind = (self.num_new - width).clamp(min=0)
        if self.features is not None:
            at = behind[:, None] + torch.arange(width, device=behind.device)
            at = at.clamp(max=self.features.shape[1] - 1).long()[:, :, None].expand(-1, -1, self.features.shape[2])
            self.features = self.features.gather(1, at)
        self.num_new, self.max_new = self.num_new - behind, width

    def draft_inputs(self) -> DraftInputs:
        return DraftInputs(self.tokens, self.lengths, self.num_new, self.max_new, self.features, self.sampling)

    def advance(self, tree: DraftTree, output: ModelOutput, acceptance: Acceptance) -> Tensor:
        """Append what the step emitted, up to a stop token or the limit. Returns the record int64 [B, 5 + E], or 5 + 2E."""
        count: Tensor
        self.lengths, count, self.running, record = steps.advance(
            tree.tokens, tree.parents, tree.num_nodes,
            acceptance.path, acceptance.num_accepted, acceptance.next_token,
            self.tokens, self.lengths, self.limits, self.running, self.stop_ids,
        )  # fmt: skip
        if output.features is not None:
            self.features = _along(acceptance.path, output.features)
        self.num_new, self.max_new = count, acceptance.path.shape[1]
        self.sampling.position = self.lengths
        return _with_logprobs(record, _along(acceptance.path, output.logits)) if self.logprobs else record


def _along(path: Tensor, values: Tensor) -> Tensor:
    """What the nodes of a path hold. path int32 [B, E], values [B, N, X] -> [B, E, X]."""
    return values.gather(1, path.long()[:, :, None].expand(-1, -1, values.shape[2]))


def _with_logprobs(record: Tensor, logits: Tensor) -> Tensor:
    """The record [B, 5 + E] with its tokens' log-probabilities behind them, bits of f64: int64 [B, 5 + 2E].

    logits f32 [B, E, V]: what each token was chosen from, taken as they are: temperature 1, nothing cut off.
    """
    logprobs = logits.log_softmax(-1).gather(-1, record[:, RECORD_FIELDS:, None]).squeeze(-1)
    return torch.cat([record, logprobs.double().view(torch.int64)], 1)
