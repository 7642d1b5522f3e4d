"""The tables of acceptance from its JSON document: every method, adaptive chains, lossy verifiers, what theory orders.

R resamples, of which row 0 is what was measured; M methods. Sums leave out the steps that a stop or the limit cut short.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from _bench import ratio, table

from specdec import metrics

GREEDY, DRAWN = "T = 0", "T = 1"
EXACT, SPECULATIVE, DISTINCT = "target_only", "speculative_sampling", "rrs replacement=false"
FIXED, ADAPTIVE = "eagle3 chain of ", "eagle3 adaptive "
CHAIN, LONG, TREE, WIDER = f"{FIXED}3", f"{FIXED}7", "eagle3 tree 2-2-1", "eagle3 tree 4-2-1"
RULES = {"path": (0.1, 0.4), "confidence": (0.3, 0.5), "entropy": (0.1, 0.3)}  # adaptive chains: min_probability

Name = tuple[str, str]  # drafter and verifier
Row = dict[str, Any]


def _nested() -> list[tuple[str, Name, Name]]:
    """Greedy chains, each with one that it goes on from."""
    pairs = [(f"{FIXED}{k + 1}", f"{FIXED}{k}") for k in range(1, 7)]
    for rule, (low, high) in RULES.items():
        chains = [LONG, f"{ADAPTIVE}{rule} {low}", f"{ADAPTIVE}{rule} {high}", f"{FIXED}1"]
        pairs += pairwise(chains)
    return [(GREEDY, (more, EXACT), (less, EXACT)) for more, less in pairs]


# Law, more, less: each a theorem about one step behind a given prefix.
# - Greedy: a tree or chain accepts what any part of it does; relaxed_acceptance and fly keep all that target_only accepts.
# - block and traversal: by the proofs of their papers (2403.10444, 2505.12398).
# - The others, where siblings have subtrees alike: a draft x is emitted with probability min(target, rho * draft). One draft
#   has rho = 1; k independent siblings under rrs the sum of the chances that each is judged, and as every rejection leaves a
#   target that overlaps less, that sum is at most kseq's rho, where each is kept as readily as the first. static_ensemble
#   emits (1 - weight) * (draft - target)+ more than min(target, draft).
ORDERED: list[tuple[str, Name, Name]] = [
    *_nested(),
    (GREEDY, (TREE, EXACT), (CHAIN, EXACT)),
    (GREEDY, (WIDER, EXACT), (TREE, EXACT)),
    (GREEDY, (CHAIN, "relaxed_acceptance"), (CHAIN, EXACT)),
    (GREEDY, (LONG, "fly"), (LONG, EXACT)),
    (GREEDY, (LONG, "fly window=2"), (LONG, "fly")),
    (DRAWN, (CHAIN, "block"), (CHAIN, SPECULATIVE)),
    (DRAWN, (CHAIN, "static_ensemble"), (CHAIN, SPECULATIVE)),
    (DRAWN, (LONG, "fly window=2"), (LONG, EXACT)),
    (DRAWN, (TREE, "rrs"), (CHAIN, SPECULATIVE)),
    (DRAWN, (TREE, "kseq"), (TREE, "rrs")),
    (DRAWN, (TREE, DISTINCT), (CHAIN, SPECULATIVE)),
    (DRAWN, (TREE, "traversal"), (TREE, DISTINCT)),
]


def render(document: dict[str, Any]) -> str:
    """The Markdown file; what was not measured is left out."""
    rows = document["rows"]
    tables = [_lengths(rows, GREEDY), _lengths(rows, DRAWN), _adaptive(rows), _lossy(rows), _theory(rows)]
    return "\n\n".join(part.rstrip() for part in [_head(document), *tables] if part) + "\n"


def _head(document: dict[str, Any]) -> str:
    setup, here = document["setup"], document["sessions"][-1]
    commands = "\n".join(f"    {session['command']}" for session in document["sessions"])
    return f"""# Acceptance lengths

{setup["target"][0].partition("=")[2]}, first turns of {setup["prompts"]} prompts ({setup["dataset"]["path"]}),
up to {setup["max_new_tokens"]} tokens each; sampled methods {setup["passes"]} times. Tokens a forward, the
target's own included, with 95% bootstrap intervals over prompts; all: the mean over tasks. Drafts:
nodes proposed in a step. Lossless but where marked.

Revision {(here["git"] or {}).get("revision", "unknown")[:12]}; {here["date"][:10]}; torch {here["versions"]["torch"]}.

{commands}"""


# ---- sums ------------------------------------------------------------------------------------------------------------


def frame(rows: Sequence[Row], law: str) -> pd.DataFrame:
    """The rows of one law as a trace, whose times are not known; all passes of a prompt are one request."""
    lines = []
    for row in (row for row in rows if row["section"] == law):
        method = {"run": law, "drafter": row["drafter"], "verifier": row["verifier"], "turn": 0}
        prompts = sum(request["pass"] == 0 for request in row["requests"])
        for number, request in enumerate(row["requests"]):
            unknown = [np.nan] * len(request["num_accepted"])
            times = {name: unknown for name in metrics.STEP_COLUMNS if name.endswith("_seconds")}
            lines.append({**method, "request": number % prompts, **times, **request})
    return pd.DataFrame(lines)


def sums(trace: pd.DataFrame) -> pd.DataFrame:
    """Tokens, drafts and steps, indexed by drafter, verifier, task and request."""
    steps = metrics.steps(trace)
    steps = steps[steps["whole"]]
    steps = steps.assign(tokens=steps["num_accepted"] + 1, drafts=steps["num_nodes"] - 1, steps=1)
    return steps.groupby(["drafter", "verifier", "task", "request"])[["tokens", "drafts", "steps"]].sum()


def resampled(found: pd.DataFrame, methods: Sequence[Name]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and drafts a step, each [R, M]: means over tasks, over requests that are drawn for all methods alike."""
    draw, tasks = np.random.default_rng(0), []
    for task in found.index.unique("task"):
        parts = [found.loc[(*method, task)] for method in methods]
        shared = reduce(pd.Index.intersection, (part.index for part in parts))
        picked = np.vstack([np.arange(len(shared)), draw.integers(0, len(shared), (metrics.RESAMPLES, len(shared)))])
        totals = [part.loc[shared, ["tokens", "drafts", "steps"]].to_numpy()[picked].sum(1) for part in parts]
        tokens, drafts, steps = np.stack(totals, 1).transpose(2, 0, 1)
        tasks.append((tokens / steps, drafts / steps))
    tokens, drafts = np.mean(tasks, axis=0)
    return tokens, drafts


def with_interval(values: np.ndarray) -> tuple[float, float, float]:
    """What was measured of values [R], and the 95% interval."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)


def at_drafts(wanted: np.ndarray, drafts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Tokens [R] that chains of `drafts` and `tokens` a step [R, M], ascending, reach between them at `wanted` [R] drafts."""
    lines = zip(wanted, drafts, tokens, strict=True)
    return np.array([np.interp(x, known, values, left=np.nan, right=np.nan) for x, known, values in lines])


# ---- the tables ------------------------------------------------------------------------------------------------------


def _shown(value: float, low: float, high: float, digits: str) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:{digits}}" + ("" if np.isnan(low) else f" [{low:{digits}}, {high:{digits}}]")


def _verifier(row: Row) -> str:
    return str(row["verifier"]) + ("" if row["lossless"] else " (lossy)")


def _lengths(rows: Sequence[Row], law: str) -> str:
    """Every method of a law but plain decoding, which is at 1."""
    rows = [row for row in rows if row["section"] == law and row["drafter"] != metrics.BASELINE]
    if not rows:
        return ""
    trace, lines = frame(rows, law), []
    tau, found, tasks = metrics.acceptance_length(trace), sums(trace), list(dict.fromkeys(trace["task"]))
    for row in rows:
        method = (row["drafter"], row["verifier"])
        whole, *cells = (tau.loc[(law, *method, task)] for task in (metrics.ALL, *tasks))
        by_task = found.loc[method].groupby("task").sum()
        drafts = (by_task["drafts"] / by_task["steps"]).mean()
        lines.append([
            row["drafter"], _verifier(row), row["nodes"], ratio(drafts),
            _shown(whole["tau"], whole["tau_low"], whole["tau_high"], ".2f"), *(ratio(cell["tau"]) for cell in cells),
        ])  # fmt: skip
    heads = ["drafter", "verifier", "drafts, at most", "on average", metrics.ALL, *tasks]
    return f"## {law}\n\n{table(heads, lines)}"


def _adaptive(rows: Sequence[Row]) -> str:
    """What greedy adaptive chains accept, beside fixed ones of as many drafts."""
    rows = [row for row in rows if row["section"] == GREEDY and row["verifier"] == EXACT]
    fixed = [row["drafter"] for row in sorted(rows, key=lambda row: row["nodes"]) if row["drafter"].startswith(FIXED)]
    adaptive = [row["drafter"] for row in rows if row["drafter"].startswith(ADAPTIVE)]
    if not (fixed and adaptive):
        return ""
    tau, drafts = resampled(sums(frame(rows, GREEDY)), [(chain, EXACT) for chain in (*fixed, *adaptive)])
    lines = [[chain, ratio(drafts[0, i]), ratio(tau[0, i]), "–", "–"] for i, chain in enumerate(fixed)]
    for i, chain in enumerate(adaptive, len(fixed)):
        level = at_drafts(drafts[:, i], drafts[:, : len(fixed)], tau[:, : len(fixed)])
        gain = _shown(*with_interval(tau[:, i] - level), "+.3f")
        lines.append([chain, ratio(drafts[0, i]), ratio(tau[0, i]), ratio(level[0]), gain])
    heads = ["chain", "drafts a step", "acceptance length", "fixed, as many drafts", "difference"]
    return f"""## What an adaptive chain buys

{GREEDY}. Every draft costs a pass of the head, so an adaptive chain is held against fixed ones of as many
drafts: between two lengths, against taking now the one and now the other.

{table(heads, lines)}"""


def _lossy(rows: Sequence[Row]) -> str:
    """How likely the target finds the texts of lossy verifiers, beside plain ones; of rows with log-probabilities."""
    lines = []
    for law in (GREEDY, DRAWN):
        scored = {}
        for row in (row for row in rows if row["section"] == law and "logprobs" in row["requests"][0]):
            plain = row["drafter"] == metrics.BASELINE
            label = metrics.BASELINE if plain else f"{row['drafter']}, {row['verifier']}"
            scored[label] = {**row, "drafter": label, "verifier": ""}  # one baseline for all verifiers
        if metrics.BASELINE not in scored or len(scored) == 1:
            continue
        found = metrics.nll(frame(list(scored.values()), law))
        for label in scored:
            cell = found.loc[(law, label, "", metrics.ALL)]
            nll = _shown(cell["nll"], cell["nll_low"], cell["nll_high"], ".3f")
            excess = _shown(cell["nll_excess"], cell["nll_excess_low"], cell["nll_excess_high"], "+.3f")
            lines.append([law, label, nll, "–" if label == metrics.BASELINE else excess])
    if not lines:
        return ""
    return f"""## What lossy verifiers change

Negative log-probability of an emitted token under the target at temperature 1, in nats, over all tasks; excess over
plain decoding of the same prompts. Lower is likelier text, not better text.

{table(["law", "method", "nll", "nll excess"], lines)}"""


def _theory(rows: Sequence[Row]) -> str:
    """Whether the pairs of ORDERED that were measured stand as they should."""
    lines = []
    for law in (GREEDY, DRAWN):
        there = {(row["drafter"], row["verifier"]): row for row in rows if row["section"] == law}
        pairs = [(more, less) for of, more, less in ORDERED if of == law and {more, less} <= there.keys()]
        found = sums(frame(rows, law)) if pairs else pd.DataFrame()
        for pair in pairs:
            tokens = resampled(found, pair)[0]
            mean, low, high = with_interval(tokens[:, 0] - tokens[:, 1])
            holds = "yes" if low >= 0 else "no" if high < 0 else "within the interval"
            names = [f"{there[name]['drafter']}, {_verifier(there[name])}" for name in pair]
            lines.append([law, *names, _shown(mean, low, high, "+.3f"), holds])
    if not lines:
        return ""
    return f"""## What theory orders

Theorems about a step behind the same prefix. The steps of whole texts begin behind other prefixes, and a lossy verifier
writes another text, so that a small difference the other way contradicts none of them.

{table(["law", "should accept at least as much", "as", "difference", "holds"], lines)}"""
