"""What a draft law q should be like, given the target's law p of the same token.

Shapes: n predictions, V target vocabulary, W draft vocabulary. A loss maps log q f32 [n, W] and a `Law` to f32 [n].

The draft vocabulary covers a mass c = sum of p over it. EAGLE-3's code drops predictions whose argmax lies outside; here a
prediction weighs c. The terms of KL(p, q) that q can change are c * KL(p / c, q) and a constant, so this is the plain
divergence without a threshold: a token that nobody can draft counts nothing, one that is likely in spite of a foreign argmax
still counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "Judge", "Law", "acceptance_rate", "choose_loss", "target_law"]


@dataclass(slots=True)
class Law:
    """The target's law of n tokens, seen from the draft vocabulary; -1 = not in it."""

    probs: Tensor  # f32 [n, W]  sums to the covered mass c <= 1
    best: Tensor  # int64 [n]  the target's argmax
    text: Tensor  # int64 [n]  the token that stands in the text

    def __getitem__(self, rows: Tensor) -> Law:
        """The same of some of the tokens."""
        return Law(self.probs[rows], self.best[rows], self.text[rows])


_TINY = 1e-30  # for a draft vocabulary without any mass

Loss = Callable[[Tensor, Law], Tensor]


def target_law(hidden: Tensor, head: Tensor, text: Tensor, ids: Tensor | None, index: Tensor | None) -> Law:
    """Law from the final hidden states [n, H] and the target's head [V, H]; text int64 [n] are target ids.

    ids int64 [W]: target ids of the draft vocabulary; index int64 [V]: the way back, -1 outside. None: all ids. Sums are f32;
    a head in a narrower dtype than f32 is for a GPU, whose matrix instructions multiply it exactly.
    """
    if head.dtype == torch.float32:
        logits = F.linear(hidden.float(), head)
    else:
        logits = torch.mm(hidden.to(head.dtype), head.t(), out_dtype=torch.float32)
    if logits.device.type == "cuda":
        from specdec.kernels.gpu.loss import seen_law

        probs, best = seen_law(logits, torch.arange(len(head), device=head.device) if ids is None else ids)
        return Law(probs, best, text) if index is None else Law(probs, index[best], index[text])
    best = logits.argmax(-1)
    probs = logits.softmax(-1)
    if ids is None or index is None:
        return Law(probs, best, text)
    return Law(probs[:, ids], index[best], index[text])


def acceptance_rate(log_q: Tensor, law: Law) -> Tensor:
    """alpha = sum of min(p, q): the chance that speculative sampling keeps a draft drawn from q (2211.17192, eq. 2)."""
    return torch.minimum(law.probs, log_q.exp()).sum(-1)


def kl(log_q: Tensor, law: Law) -> Tensor:
    """c * KL(p / c, q) >= 0; 0 at q = p / c."""
    log_mass = law.probs.sum(-1, keepdim=True).clamp(min=_TINY).log()
    return (torch.xlogy(law.probs, law.probs) - law.probs * (log_q + log_mass)).sum(-1)


def cross_entropy(log_q: Tensor, law: Law) -> Tensor:
    """-log q of the target's argmax: the greedy decoder's token. 0 where the draft vocabulary lacks it."""
    return _label(log_q, law.best)


def text(log_q: Tensor, law: Law) -> Tensor:
    """-log q of the token in the text. 0 where the draft vocabulary lacks it."""
    return _label(log_q, law.text)


def acceptance(log_q: Tensor, law: Law) -> Tensor:
    """-c log(alpha / c) >= 0 (2602.23881, where c = 1): the chance to be accepted itself; 0 at q = p / c.

    The logarithm's 1 / alpha keeps the gradient alive where p and q hardly overlap.
    """
    mass = law.probs.sum(-1)
    return -mass * (acceptance_rate(log_q, law) / mass.clamp(min=_TINY)).clamp(min=1e-6).log()


def hybrid(log_q: Tensor, law: Law, eta: float = 3.0) -> Tensor:
    """lambda * KL + (1 - lambda) * (1 - alpha), lambda = exp(-eta * alpha) held constant in the gradient (2602.23881).

    1 - alpha is the total variation: what is wanted, but flat where p and q hardly overlap; there lambda is near 1 and
    KL pulls them together.
    """
    alpha = acceptance_rate(log_q, law)
    share = torch.exp(-eta * alpha.detach())
    return share * kl(log_q, law) + (1 - share) * (1 - alpha)


LOSSES: dict[str, Loss] = {
    "kl": kl,
    "cross_entropy": cross_entropy,
    "text": text,
    "acceptance": acceptance,
    "hybrid": hybrid,
}


def choose_loss(name: str, eta: float) -> Loss:
    """A loss by its name in the config; ValueError lists them."""
    if name not in LOSSES:
        raise ValueError(f"training.loss={name} is unknown; choose one of {', '.join(LOSSES)}")
    return partial(hybrid, eta=eta) if name == "hybrid" else LOSSES[name]


class Judge:
    """Predictions against the target's law, by a loss of LOSSES; on a GPU in one kernel (kernels/gpu/loss.py)."""

    def __init__(self, name: str, eta: float) -> None:
        self.loss, self.name, self.eta = choose_loss(name, eta), name, eta

    def __call__(self, logits: Tensor, law: Law) -> tuple[Tensor, Tensor]:
        """Draft logits [n, W] -> the summed loss, with its gradient, and sums f64 [4]: loss, alpha, greedy hits, n."""
        count = torch.full((1,), len(logits), dtype=torch.float64, device=logits.device)
        if logits.device.type == "cuda":
            from specdec.kernels.gpu.loss import Judged

            label = law.text if self.name == "text" else law.best
            loss, found = Judged.apply(logits, law.probs, law.best, label, self.name, self.eta)  # type: ignore[no-untyped-call]
            return loss, torch.cat([found.double().sum(0), count])
        log_q = logits.float().log_softmax(-1)
        loss = self.loss(log_q, law).sum()
        with torch.no_grad():
            found = torch.stack([acceptance_rate(log_q, law), (logits.argmax(-1) == law.best).float()])
            return loss, torch.cat([loss.double()[None], found.double().sum(1), count])


def _label(log_q: Tensor, label: Tensor) -> Tensor:
    """-log q of one token a row, int64 [n]; 0 for -1."""
    chosen = -log_q.gather(-1, label.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(label >= 0, chosen, 0.0)
