"""The tables of cpu_decoding from its JSON document: ratios, shares and counts; no absolute time of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from _bench import ratio, ratios, table

ALL = "all"
PLAIN, OURS = "transformers", "specdec none"
SUMS = ["prefill_seconds", "decode_seconds", "decode_tokens", "steps", "whole_tokens", "whole_steps", "verify_seconds"]
Cell = Callable[[pd.DataFrame], str]  # a runtime's prompts (of one task, or all) -> what the table says of them


def render(document: dict[str, Any]) -> str:
    """Markdown of a result. Sections that were not measured are left out."""
    rows = pd.DataFrame(document["rows"])
    parts = [_head(document)]
    for name, part in (("decode", _decode), ("batch", _batch), ("forward", _forward), ("product", _products)):
        if (rows["section"] == name).any():
            parts.append(part(rows))
    return "\n".join(parts)


def _head(document: dict[str, Any]) -> str:
    setup, here = document["setup"], document["sessions"][-1]
    versions = ", ".join(f"{name} {v}" for name, v in here["versions"].items() if v and name != "specdec-lab")
    git = here["git"] or {"revision": "unknown", "dirty": False}
    revision = git["revision"] + (" with local changes" if git["dirty"] else "")
    loads = ", ".join(f"{s['load']:.1f}" for s in document["sessions"])
    return f"""# Decoding on the CPU, beside transformers

{setup["checkpoint"]}, batch 1, greedy, exactly {setup["max_new_tokens"]} new tokens, first turns of
{setup["prompts"]} prompts ({setup["dataset"]["path"]}), {setup["passes"]} passes;
all runtimes in turns on the same token ids, weights and dtype.
{here["cpu"]}, {here["cores"]} cores, {here["threads"]} threads; {versions}.
Revision {revision}; {here["date"][:10]}; load average at the start {loads}.

    {here["command"]}

Written by that command from its JSON file. [ ] is a 95% bootstrap interval over prompts.
"""


# ---- decoding --------------------------------------------------------------------------------------------------------


def _plain(rows: pd.DataFrame, runtime: str) -> pd.DataFrame:
    """A plain runtime's rows by dtype, question and pass, with the digest of the output."""
    part = rows[(rows["section"] == "decode") & (rows["runtime"] == runtime)]
    return part.assign(digest=part["digests"].str[0]).set_index(["dtype", "question", "pass"])


def _per_prompt(rows: pd.DataFrame) -> pd.DataFrame:
    """Sums over passes, a row per dtype, runtime, question; base_*, own_*: transformers' and our plain decoding."""
    everything, rows = rows, rows[rows["section"] == "decode"].copy()
    for name in (PLAIN, OURS):
        rows = rows.join(_plain(everything, name)["digest"].rename(name), on=["dtype", "question", "pass"])
    digest, own = rows["digests"].str[0], rows[PLAIN].where(rows["runtime"].str.startswith(PLAIN), rows[OURS])
    rows["same_as_own"], rows["same_as_transformers"] = digest == own, digest == rows[PLAIN]
    groups = rows.groupby(["dtype", "runtime", "task", "question"], sort=False)
    columns = [name for name in SUMS if name in rows]
    sums = groups[columns].sum().join(groups[["same_as_own", "same_as_transformers"]].all()).reset_index()
    for name, prefix in ((PLAIN, "base_"), (OURS, "own_")):
        base = sums[sums["runtime"] == name].set_index(["dtype", "question"])[columns].add_prefix(prefix)
        sums = sums.join(base, on=["dtype", "question"])
    return sums


def _speed(part: pd.DataFrame, prefix: str = "") -> pd.Series:
    return part[f"{prefix}decode_tokens"] / part[f"{prefix}decode_seconds"]


def _median_speedup(part: pd.DataFrame) -> str:
    return ratios((_speed(part) / _speed(part, "base_")).tolist())


def _total_speedup(part: pd.DataFrame) -> str:
    sums = part[["decode_tokens", "decode_seconds", "base_decode_tokens", "base_decode_seconds"]].sum().to_frame().T
    return ratio((_speed(sums) / _speed(sums, "base_")).iloc[0])


def _with_prefill(part: pd.DataFrame) -> str:
    """The wall time's ratio: every runtime makes the same number of tokens."""
    base = part["base_prefill_seconds"].sum() + part["base_decode_seconds"].sum()
    return ratio(base / (part["prefill_seconds"].sum() + part["decode_seconds"].sum()))


def _prefill(part: pd.DataFrame) -> str:
    times = part["prefill_seconds"] / part["base_prefill_seconds"]
    return f"{ratios(times.tolist())}; {(times <= 1).sum()}/{len(times)}"


def _acceptance(part: pd.DataFrame) -> str:
    """Tokens a forward, pooled over a task's prompts, then the tasks' mean."""
    sums = part.groupby("task")[["whole_tokens", "whole_steps"]].sum()
    return ratio((sums["whole_tokens"] / sums["whole_steps"].replace(0, np.nan)).mean())


def _same(part: pd.DataFrame, column: str = "same_as_own") -> str:
    return f"{part[column].sum()}/{len(part)}"


def _overhead(part: pd.DataFrame) -> str:
    """Share of the decode time outside the target's forward; the other runtime's is not known."""
    if part["runtime"].iloc[0].startswith("transformers"):
        return "–"
    return f"{1 - part['verify_seconds'].sum() / part['decode_seconds'].sum():.1%}"


OVERALL: dict[str, Cell] = {
    "decode, median": _median_speedup,
    "decode, total": _total_speedup,
    "with prefill, total": _with_prefill,
    "prefill time; prompts not slower": _prefill,
    "acceptance length": _acceptance,
    "equal to own plain": _same,
    "equal to transformers' plain": lambda part: _same(part, "same_as_transformers"),
    "outside the forward": _overhead,
}
BY_TASK: dict[str, Cell] = {
    "Decode tokens/s over transformers' plain, median of prompts": _median_speedup,
    "The same, total tokens / total time": _total_speedup,
    "Prefill time over transformers' plain; prompts not slower": _prefill,
    "Acceptance length": _acceptance,
    "Prompts equal to the same runtime's plain output": _same,
}


def _decode(rows: pd.DataFrame) -> str:
    prompts = _per_prompt(rows)
    tasks = [str(task) for task in prompts["task"].unique()]
    text = """## Decode speed

Tokens/s over transformers' plain `generate` of the same dtype. Acceptance length: tokens a decode forward, the mean
of the tasks'. ngram_no_match looks up like ngram and then proposes nothing.
"""
    for dtype, part in prompts.groupby("dtype", sort=False):
        runtimes = {str(name): group for name, group in part.groupby("runtime", sort=False)}
        names = sorted(runtimes, key=lambda name: not name.startswith(PLAIN))
        lines = [[name, *(cell(runtimes[name]) for cell in OVERALL.values())] for name in names]
        text += f"\n### {dtype}\n\n{table(['all tasks', *OVERALL], lines)}"
        counts = [f"{task} ({part.loc[part['task'] == task, 'question'].nunique()})" for task in tasks]
        for title, cell in BY_TASK.items() if len(tasks) > 1 else []:
            lines = [[name, *(cell(runtimes[name].query("task == @task")) for task in tasks)] for name in names]
            text += f"\n{title} (prompts):\n\n{table([str(dtype), *counts], lines)}"
    return text + _idle(prompts)


def _idle(prompts: pd.DataFrame) -> str:
    """What a drafter costs that never proposes: its step time over plain decoding's."""
    part = prompts[prompts["runtime"] == "specdec ngram_no_match"]
    lines = []
    for dtype, group in part.groupby("dtype", sort=False):
        if group["own_steps"].notna().all():
            assert (group["steps"] == group["own_steps"]).all(), "a drafter that finds nothing takes plain steps"
            step = group["decode_seconds"] / group["own_decode_seconds"]
            lines.append([dtype, ratios(step.tolist())])
    if not lines:
        return ""
    return f"\n### A drafter that finds nothing\n\n{table(['dtype', 'step time over specdec none'], lines)}"


# ---- batches ---------------------------------------------------------------------------------------------------------


def _batch(rows: pd.DataFrame) -> str:
    """Whole batches against the same prompts one by one, plainly, in our runtime."""
    unit = ["dtype", "runtime", "group"]
    full = ["full_tokens", "full_seconds"] if "full_tokens" in rows else []  # older files lack them
    columns = [*unit, "pass", "questions", "digests", *SUMS, *full]
    batch = rows.loc[rows["section"] == "batch", columns].rename(columns={"questions": "question", "digests": "digest"})
    alone = _plain(rows, OURS)[["decode_tokens", "decode_seconds", "digest"]].add_prefix("own_")
    long = batch.explode(["question", "digest"]).join(alone, on=["dtype", "question", "pass"])
    long["same"] = long["digest"] == long["own_digest"]
    sums = batch.groupby(unit, sort=False)[[*SUMS, *full]].sum()
    sums = sums.join(long.groupby(unit)[["own_decode_tokens", "own_decode_seconds"]].sum())
    same = long.groupby([*unit, "question"])["same"].all().groupby(unit)
    sums["same"], sums["prompts"] = same.sum(), same.size()
    lines = []
    for (dtype, runtime), part in sums.groupby(["dtype", "runtime"], sort=False):
        total = part.sum()
        cells = [ratio(total["whole_tokens"] / max(total["whole_steps"], 1))]
        cells += [
            f"{total['same']:.0f}/{total['prompts']:.0f}",
            f"{1 - total['verify_seconds'] / total['decode_seconds']:.1%}",
        ]
        speeds = [_speed(part), *([part["full_tokens"] / part["full_seconds"]] if full else [])]
        gains = [ratios((speed / _speed(part, "own_")).tolist()) for speed in speeds]
        lines.append([f"{runtime}, {dtype}", *gains, *cells])
    size = len(batch["question"].iloc[0])
    heads = [
        "",
        "decode tokens/s over batch 1, none",
        *(["while all rows run"] if full else []),
        "acceptance length",
        "equal to batch 1, none",
        "outside the forward",
    ]
    text = f"## Batches of {size}\n\nPrompts of mixed tasks decoded together; intervals over batches, not prompts.\n"
    return f"{text}\n{table(heads, lines)}"


# ---- forwards and products -------------------------------------------------------------------------------------------


def _medians(seconds: dict[str, list[float]]) -> dict[tuple[str, int], float]:
    """(implementation, M) -> median seconds."""
    named = {name.rsplit(" ", 1)[0]: None for name in seconds if " " in name}
    sizes = {int(name.rsplit(" ", 1)[1]): None for name in seconds if " " in name}
    return {(name, m): float(np.median(seconds[f"{name} {m}"])) for m in sizes for name in named}


def _forward(rows: pd.DataFrame) -> str:
    text = """## What a forward of M tokens costs

At context 256, medians. Floor: the weights' bytes at the bandwidth of a sum over memory larger than any cache (its best
pass in the same run).
"""
    for _, row in rows[rows["section"] == "forward"].iterrows():
        times = _medians(row["seconds"])
        floor = row["weight_bytes"] / (row["read_bytes"] / min(row["seconds"]["read"]))
        lines = [
            [m, ratio(t / times["ours", 1]), f"{floor / t:.0%}", ratio(times["transformers", m] / t)]
            for (name, m), t in times.items()
            if name == "ours"
        ]
        heads = [f"M, {row['dtype']}", "time over M = 1", "floor / time", "transformers' time over ours"]
        text += f"\n{table(heads, lines)}"
    return text


def _products(rows: pd.DataFrame) -> str:
    """Our kernel's time over torch's, shape by shape and for all products of a forward."""
    text = """## What equal bits cost

Time of our product kernel, whose bits do not depend on M, over torch's F.linear / over oneDNN with weights packed
beforehand for that M. Below 1 ours is faster. Weights come from memory, not from a cache; the last column weighs the
shapes as a forward has them.
"""
    for dtype, part in rows[rows["section"] == "product"].groupby("dtype", sort=False):
        times = [_medians(seconds) for seconds in part["seconds"]]
        totals: dict[tuple[str, int], float] = {
            key: sum(t[key] * count for t, count in zip(times, part["count"], strict=True)) for key in times[0]
        }
        lines = []
        for m in sorted({m for _, m in totals}):
            cells = [
                f"{ratio(t['ours', m] / t['linear', m])} / {ratio(t['ours', m] / t['prepacked', m])}"
                for t in (*times, totals)
            ]
            lines.append([m, *cells])
        shapes = [f"{p.product} {p.outputs:.0f}x{p.inputs:.0f}" for p in part.itertuples()]
        text += f"\n{table([f'M, {dtype}', *shapes, 'a forward'], lines)}"
    return text
