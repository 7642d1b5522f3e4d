"""Proof that a verifier is lossless: `check_verifier` takes any, from inside or outside this project.

1. Enumerated (`specdec.testing.enumeration`): on a 3-token model the joint law of the emitted tokens, completed by the
   target, equals the target's own to 5e-7. Exact over drafts, coins and drawn tokens; the noise hash is left out.
2. Sampled: a 12-token model, real noise, a batch that mixes temperatures, top-k, top-p, greedy and ragged trees;
   chi-square over every pair of neighbouring tokens at a false alarm rate of 1e-6.
3. Invariants: a verdict is a root path inside the real nodes, and a row depends on nothing but itself.
A lossy verifier is held to the third alone. Shapes: R rows, N nodes with the root, D depth, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from specdec.testing.enumeration import NotEnumerableError, enumerate_law
from specdec.testing.errors import ConformanceError
from specdec.testing.prefix_model import PrefixModel, Topology, depth_of, sampling_of
from specdec.types import Acceptance, DraftTree, Sampling
from specdec.verifier import Verifier

__all__ = ["LawCase", "LawReport", "check_verifier"]

CHAIN: Topology = (-1, 0, 1, 2)
TREES: tuple[Topology, ...] = ((-1, 0, 1, 0), (-1, 0, 0, 0))  # depth first, flat
LARGE_TREE: Topology = (-1, 0, 0, 1, 1, 2, 3)  # by level
TOLERANCE = 5e-7  # four coins of 1.2e-7 each
FALSE_ALARM = 1e-6
PER_ROW = ("temperature", "top_k", "top_p", "seed", "position")
SETTINGS = ((1.0, 0, 1.0), (0.7, 5, 1.0), (1.4, 0, 0.8), (0.0, 0, 1.0))  # temperature, top-k, top-p by row


@dataclass(frozen=True)
class LawCase:
    """One comparison. deviation: largest difference of a probability if exact, else 1 - p-value of chi-square."""

    name: str
    exact: bool
    deviation: float
    acceptance_length: float  # tokens a verdict emits on average, drafts of "any" cases taken uniformly


@dataclass
class LawReport:
    """What was compared. enumerated is False when the verifier's noise could not be dictated (the reason says why)."""

    verifier: str
    lossless: bool
    enumerated: bool = False
    reason: str = ""
    cases: list[LawCase] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.lossless:
            return f"{self.verifier}: lossy, held to the structural invariants only"
        exact = "enumerated and sampled" if self.enumerated else f"sampled only ({self.reason})"
        lines = [f"{self.verifier}: lossless, {exact}"]
        for case in self.cases:
            what = "max |difference|" if case.exact else "1 - p-value"
            lines.append(f"  {case.name}: {what} {case.deviation:.1e}, acceptance length {case.acceptance_length:.3f}")
        return "\n".join(lines)


def check_verifier(verifier: Verifier, rows: int = 50_000, seed: int = 0) -> LawReport:
    """Hold a verifier to its promises; raises ConformanceError with the first one broken. CPU, some seconds.

    rows: batch of every sampled case, shared by four sampling settings.
    """
    report = LawReport(type(verifier).__name__, verifier.lossless)
    topologies = (CHAIN, *TREES) if verifier.supports_trees else (CHAIN,)
    laws = ("any", "iid", "distinct") if verifier.law == "any" else ("any", verifier.law)
    generator = torch.Generator().manual_seed(seed)
    for topology in (CHAIN, LARGE_TREE) if verifier.supports_trees else (CHAIN,):
        for law in laws:
            case = _sampled(verifier, topology, law, rows, generator)
            if verifier.lossless:
                report.cases.append(case)
    if not verifier.lossless:
        return report
    try:
        for topology in topologies:
            for law in laws:
                settings = ((1.0, 0), (0.0, 0)) if law == "any" else ((1.0, 0), (0.7, 2))
                report.cases += [_enumerated(verifier, topology, law, setting, seed) for setting in settings]
        report.enumerated = True
    except NotEnumerableError as reason:
        report.reason = str(reason)
    return report


def _enumerated(verifier: Verifier, topology: Topology, law: str, setting: tuple[float, int], seed: int) -> LawCase:
    """Compare exact laws on a 3-token model. setting: temperature, top-k."""
    model = PrefixModel.random(3, depth_of(topology) + 1, seed)
    sampling = sampling_of(1, *setting)
    found, length = enumerate_law(verifier, model, topology, sampling, law)
    deviation = float((found - _target_law(model, sampling)).abs().max())
    name = f"exact {_name(topology)}, {law} drafts, temperature {setting[0]:g}, top-k {setting[1]}"
    if not deviation <= TOLERANCE:
        raise ConformanceError(
            f"{type(verifier).__name__} is not lossless: {name}: the probability of a text of {model.length} tokens is "
            f"off by {deviation:.1e} (tolerance {TOLERANCE:.0e})."
        )
    return LawCase(name, True, deviation, length)


def _target_law(model: PrefixModel, sampling: Sampling) -> Tensor:
    """The target's law of its first tokens. f64 [V^L]."""
    nothing = torch.zeros(model.num_prefixes(), dtype=torch.float64)
    nothing[0] = 1.0
    return model.complete(nothing, model.law(model.target_logits, sampling))


def _name(topology: Topology) -> str:
    kind = "chain" if depth_of(topology) == len(topology) - 1 else "tree"
    return f"{kind} {topology[1:]}"


def _sampled(verifier: Verifier, topology: Topology, law: str, rows: int, generator: torch.Generator) -> LawCase:
    """Judge one mixed batch with real noise: invariants, then greedy rows exactly and the others by chi-square."""
    model = PrefixModel.random(12, depth_of(topology) + 1, 1)
    sampling = _mixed(rows, generator)
    tokens = model.draw(topology, sampling, law == "distinct", generator)
    num_nodes = torch.randint(1, len(topology) + 1, (rows,), generator=generator, dtype=torch.int32)
    num_nodes = torch.where(torch.rand(rows, generator=generator) < 0.5, len(topology), num_nodes).to(torch.int32)
    tree, logits = model.judged(tokens, topology, sampling, law != "any", num_nodes)
    kept = copy.deepcopy((tree, logits, sampling))
    verdict = verifier.accept(tree, logits, sampling)

    name, who = f"sampled {_name(topology)}, {law} drafts", type(verifier).__name__
    for got, want in zip(_tensors(tree, logits, sampling), _tensors(*kept), strict=True):
        _require(torch.equal(got, want), f"{who} changes its inputs in place ({name}).")
    _check_structure(verdict, tree, model.vocab, f"{who} ({name})")
    _check_independence(verifier, verdict, tree, logits, sampling, generator, f"{who} ({name})")
    length = float((verdict.num_accepted + 1).double().mean())
    if not verifier.lossless:
        return LawCase(name, False, 0.0, length)
    _check_noise(verifier, verdict, tree, logits, sampling, f"{who} ({name})")

    tail = 1.0
    for s, (temperature, top_k, top_p) in enumerate(SETTINGS):
        one = replace(sampling_of(1, temperature, top_k, top_p), mode="warped")
        target = model.law(model.target_logits, one)
        mine = torch.arange(rows) % len(SETTINGS) == s
        text = _completed(model, model.emitted(tree, verdict)[mine], target, generator)
        setting = f"{name}, temperature {temperature:g}, top-k {top_k}, top-p {top_p:g}"
        tail = min(tail, _check_pairs(text, _target_law(model, one), model, f"{who} is not lossless: {setting}"))
    return LawCase(name, False, 1 - tail, length)


def _mixed(rows: int, generator: torch.Generator) -> Sampling:
    """The settings in turn, row by row, with distinct seeds and random positions."""
    sampling = sampling_of(rows)
    which = torch.arange(rows) % len(SETTINGS)
    sampling.temperature = torch.tensor([s[0] for s in SETTINGS])[which]
    sampling.top_k = torch.tensor([s[1] for s in SETTINGS], dtype=torch.int32)[which]
    sampling.top_p = torch.tensor([s[2] for s in SETTINGS])[which]
    sampling.position = torch.randint(1, 5000, (rows,), generator=generator, dtype=torch.int32)
    sampling.mode = "warped"
    return sampling


def _completed(model: PrefixModel, prefix: Tensor, law: Tensor, generator: torch.Generator) -> Tensor:
    """Sample the target behind every emitted prefix up to the model's length. int64 [R] -> text's index in V^L."""
    first = model.num_prefixes() - model.vocab**model.length
    for _ in range(model.length):
        token = torch.multinomial(law[prefix.clamp(max=first - 1)], 1, generator=generator).squeeze(1)
        prefix = torch.where(prefix < first, prefix * model.vocab + 1 + token, prefix)
    return prefix.sub(first)


def _check_pairs(text: Tensor, law: Tensor, model: PrefixModel, sentence: str) -> float:
    """Chi-square of every pair of neighbouring tokens, rare pairs pooled; the smallest p-value."""
    count = torch.bincount(text, minlength=len(law)).double()
    _require(not bool((count[law == 0] > 0).any()), f"{sentence}: a text was emitted that the target cannot produce.")
    shape, tail = [model.vocab] * model.length, 1.0
    for i in range(model.length - 1):
        others = [d for d in range(model.length) if d not in (i, i + 1)]
        seen, expected = (x.view(shape).sum(others).flatten() if others else x for x in (count, law * len(text)))
        rare = expected < 5
        seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        chi2 = ((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum()
        freedom = torch.tensor(max(1.0, float((expected > 0).sum()) - 1), dtype=torch.float64)
        value = float(torch.special.gammaincc(freedom / 2, chi2 / 2))
        _require(
            value > FALSE_ALARM,
            f"{sentence}: tokens {i + 1} and {i + 2} have chi-square {float(chi2):.0f} at {int(freedom)} degrees of "
            f"freedom (p = {value:.0e}).",
        )
        tail = min(tail, value)
    return tail


def _check_structure(verdict: Acceptance, tree: DraftTree, vocab: int, who: str) -> None:
    """dtypes and shapes, and a path of real nodes from the root whose length is num_accepted."""
    rows, depth = len(tree.tokens), tree.depth
    path, num = verdict.path, verdict.num_accepted
    _require(
        (path.dtype, num.dtype, verdict.next_token.dtype) == (torch.int32, torch.int32, torch.int64)
        and (path.shape, num.shape, verdict.next_token.shape) == ((rows, depth + 1), (rows,), (rows,)),
        f"{who}: a verdict is path int32 [B, D+1], num_accepted int32 [B] and next_token int64 [B].",
    )
    _require(bool(((num >= 0) & (num <= depth)).all()), f"{who}: num_accepted leaves 0..{depth}.")
    _require(bool(((path >= 0) & (path < tree.num_nodes[:, None])).all()), f"{who}: a path leaves the real nodes.")
    _require(bool((path[:, 0] == 0).all()), f"{who}: a path does not start at the root.")
    step = torch.arange(1, depth + 1) <= num[:, None]
    above = torch.where(step, tree.parents.gather(1, path[:, 1:].long()), path[:, 1:])
    _require(
        bool((above == path[:, :-1]).all()),
        f"{who}: a path is not num_accepted steps from parent to child with the last node repeated.",
    )
    legal = (verdict.next_token >= 0) & (verdict.next_token < vocab)
    _require(bool(legal.all()), f"{who}: next_token leaves the vocabulary.")


def _check_independence(
    verifier: Verifier,
    verdict: Acceptance,
    tree: DraftTree,
    logits: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    who: str,
) -> None:
    """A shuffled part of the batch, with other padding, must get the verdicts it got in the whole."""
    rows, width = tree.tokens.shape
    part = torch.randperm(rows, generator=generator)[: min(rows, 2000)]
    padding = torch.arange(width) >= tree.num_nodes[part, None]
    tokens = torch.where(
        padding, torch.randint(0, logits.shape[-1], padding.shape, generator=generator), tree.tokens[part]
    )
    parents = tree.parents[part]
    if not tree.is_chain:
        other = (torch.rand(padding.shape, generator=generator) * torch.arange(width)).to(torch.int32)
        parents = torch.where(padding, other, parents)
    noise = torch.randn(logits[part].shape, generator=generator)
    probs = None
    if tree.probs is not None:
        probs = torch.where(padding[..., None], noise.softmax(-1), tree.probs[part])
    same = DraftTree(tokens, parents, tree.num_nodes[part], tree.depth, probs)
    few = replace(sampling, **{name: getattr(sampling, name)[part] for name in PER_ROW})
    again = verifier.accept(same, torch.where(padding[..., None], noise, logits[part]), few)
    for name in ("path", "num_accepted", "next_token"):
        _require(
            torch.equal(getattr(again, name), getattr(verdict, name)[part]),
            f"{who}: {name} of a row changes with its neighbours, its place, its padding, or between two calls.",
        )


def _check_noise(
    verifier: Verifier, verdict: Acceptance, tree: DraftTree, logits: Tensor, sampling: Sampling, who: str
) -> None:
    """Paths, and next tokens behind equal paths, must move when only the seed or only the position does."""
    seed, position = sampling.seed + len(sampling.seed), sampling.position + 5000
    for name, moved in (("seed", replace(sampling, seed=seed)), ("position", replace(sampling, position=position))):
        other = verifier.accept(tree, logits, moved)
        same = (other.path == verdict.path).all(1)
        fresh = not bool(same.all()) and not torch.equal(other.next_token[same], verdict.next_token[same])
        _require(fresh, f"{who}: noise does not depend on the {name}, so it would repeat from step to step.")


def _tensors(tree: DraftTree, logits: Tensor, sampling: Sampling) -> list[Tensor]:
    probs = [] if tree.probs is None else [tree.probs]
    per_row = [getattr(sampling, name) for name in PER_ROW]
    return [tree.tokens, tree.parents, tree.num_nodes, *probs, logits, *per_row]


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise ConformanceError(sentence)
