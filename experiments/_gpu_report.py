"""The tables of gpu_decoding from its JSON document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from _bench import ratio, ratios, table
from _gpu_quality import perplexity

SUMS = ["prefill_seconds", "decode_seconds", "decode_tokens", "steps", "whole_tokens", "whole_steps"]
Rows = list[dict[str, Any]]


def render(document: dict[str, Any]) -> str:
    """Markdown of a result. Sections that were not measured are left out."""
    sections: dict[str, Rows] = {}
    for row in document["rows"]:
        sections.setdefault(row["section"], []).append(row)
    ceiling = sections["ceiling"][0] if "ceiling" in sections else None
    parts = [head("Decoding on one GPU", document, _what(document["setup"]))]
    makers: dict[str, Callable[[Rows], str]] = {
        "ceiling": ceilings, "decode": _decode, "batch": _batch, "forward": lambda rows: _forward(rows, ceiling),
        "host": _host, "prefill": lambda rows: _prefill(rows, ceiling), "fp8": _fp8, "bits": _bits,
    }  # fmt: skip
    return "\n".join([*parts, *(maker(sections[name]) for name, maker in makers.items() if name in sections)])


def _what(setup: dict[str, Any]) -> str:
    return f"""{setup["checkpoint"]}, {setup["dtype"]}, greedy, exactly {setup["max_new_tokens"]} new tokens, first turns of
{setup["prompts"]} prompts ({setup["dataset"]["path"]}), {setup["passes"]} passes, methods in turns."""


def head(title: str, document: dict[str, Any], what: str) -> str:
    """Title, what was measured, on what, by which commands."""
    here = document["sessions"][-1]
    versions = ", ".join(f"{name} {v}" for name, v in here["versions"].items() if v and name != "specdec-lab")
    git = here["git"] or {"revision": "unknown", "dirty": False}
    revision = git["revision"] + (" with local changes" if git["dirty"] else "")
    commands = "\n".join(dict.fromkeys(f"    {session['command']}" for session in document["sessions"]))
    return f"""# {title}

{what}
{here["gpu"] or here["cpu"]}, CUDA {here["cuda"] or "none"}; {versions}.
Revision {revision}; {here["date"][:10]}.

{commands}

Written by these commands from their JSON file. [ ] is a 95% bootstrap interval over prompts; ( ) the 10th and 90th percentile.
"""


def ceilings(rows: Rows) -> str:
    """What plain torch reaches."""
    row = rows[0]
    cells = [f"{row['read'] / 1e12:.2f}", f"{row['copy'] / 1e12:.2f}", f"{row['matmul'] / 1e12:.0f}"]
    return f"## Ceilings\n\n{table(['read, TB/s', 'copy (read and written), TB/s', 'bf16 product, TFLOP/s'], [cells])}"


def spread_us(value: dict[str, float] | None, scale: float = 1.0) -> str:
    """`310 (305, 322)`; scale: what makes them us."""
    if value is None:
        return "–"
    median, low, high = (value[name] * scale for name in ("median", "p10", "p90"))
    return f"{median:.1f} ({low:.1f}, {high:.1f})"


# ---- decoding --------------------------------------------------------------------------------------------------------


def _decode(rows: Rows) -> str:
    frame = pd.DataFrame(rows)
    frame["digest"] = frame["digests"].str[0]
    plain = frame[frame["drafter"] == "none"].set_index(["question", "pass"])["digest"].rename("plain")
    frame = frame.join(plain, on=["question", "pass"])
    frame["same"] = frame["digest"] == frame["plain"]
    groups = frame.groupby(["drafter", "task", "question"], sort=False)
    prompts = groups[SUMS].sum().join(groups["same"].all()).reset_index()
    base = prompts[prompts["drafter"] == "none"].set_index("question")[SUMS].add_prefix("base_")
    prompts = prompts.join(base, on="question")
    heads = [
        "", "decode tokens/s", "with prefill, tokens/s", "ratio to none, median", "ratio, total", "tau", "equal to none",
    ]  # fmt: skip
    text = """## Decode speed

Batch 1. Decoding runs from the first token to the last. tau: tokens a forward, the mean of the tasks'.
"""
    tasks = [str(task) for task in prompts["task"].unique()]
    text += f"\n{table(heads, [[name, *_cells(part)] for name, part in prompts.groupby('drafter', sort=False)])}"
    for task in tasks if len(tasks) > 1 else []:
        part = prompts[prompts["task"] == task]
        lines = [[name, *_cells(group)] for name, group in part.groupby("drafter", sort=False)]
        text += f"\n### {task} ({part['question'].nunique()} prompts)\n\n{table(heads, lines)}"
    return text


def _cells(part: pd.DataFrame) -> list[str]:
    total = part[[*SUMS, *(f"base_{name}" for name in SUMS)]].sum()
    speed, base = (
        part["decode_tokens"] / part["decode_seconds"],
        part["base_decode_tokens"] / part["base_decode_seconds"],
    )
    both = total["decode_seconds"] + total["prefill_seconds"]
    tau = part.groupby("task")[["whole_tokens", "whole_steps"]].sum()
    ours = total["decode_tokens"] / total["decode_seconds"]
    return [
        f"{ours:.0f}",
        f"{total['decode_tokens'] / both:.0f}",
        ratios((speed / base).tolist()),
        ratio(ours * total["base_decode_seconds"] / total["base_decode_tokens"]),
        ratio((tau["whole_tokens"] / tau["whole_steps"].where(tau["whole_steps"] > 0)).mean()),
        f"{part['same'].sum()}/{len(part)}",
    ]


def _batch(rows: Rows) -> str:
    frame = pd.DataFrame(rows)
    spans = {"to the last row": "decode", "while all run": "full"}
    spans = {title: name for title, name in spans.items() if f"{name}_tokens" in frame}  # older files lack the second
    for name in spans.values():
        frame[name] = frame[f"{name}_tokens"] / frame[f"{name}_seconds"]
    plain = frame[frame["drafter"] == "none"].set_index(["batch", "pass"])[[*spans.values(), "digests"]]
    frame = frame.join(plain.add_prefix("base_"), on=["batch", "pass"])
    pairs = zip(frame["digests"], frame["base_digests"], strict=True)
    frame["same"] = [sum(a == b for a, b in zip(ours, base, strict=True)) for ours, base in pairs]
    lines, pays = [], {}
    for (size, name), part in frame.groupby(["batch", "drafter"], sort=False):
        cells = []
        for span in spans.values():
            gains = part[span] / part[f"base_{span}"]
            cells += [f"{part[span].median():.0f}", ratios(gains.tolist())]
        pays[str(name), int(part["batch"].iloc[0])] = float(gains.median())
        tau = part["whole_tokens"].sum() / max(part["whole_steps"].sum(), 1)
        lines.append([size, name, *cells, ratio(tau), f"{part['same'].sum()}/{part['batch'].sum()}"])
    text = """## Batches

Prompts that begin together; rows that end early stay empty, so to the last row a batch is as slow as its slowest one.
Intervals are over passes.
"""
    speeds = [head for title in spans for head in (f"tokens/s {title}", "ratio to none")]
    heads = ["batch", "drafter", *speeds, "tau", "equal to none"]
    crossover = f"\n{_crossover(pays)}" if len(spans) == 2 else ""
    return f"{text}\n{table(heads, lines)}{crossover}"


def _crossover(pays: dict[tuple[str, int], float]) -> str:
    """From which batch on drafting is no faster than not drafting."""
    lines = []
    for name in dict.fromkeys(name for name, _ in pays if name != "none"):
        sizes = sorted(size for other, size in pays if other == name)
        last = max((i for i, size in enumerate(sizes) if pays[name, size] > 1), default=-1)
        if last + 1 < len(sizes):
            lines.append(f"{name} stops paying at batch {sizes[last + 1]}.")
        else:
            lines.append(f"{name} pays up to batch {sizes[-1]}, the largest measured.")
    return "\n".join(lines) + "\n"


# ---- where the time goes ---------------------------------------------------------------------------------------------


def _forward(rows: Rows, ceiling: dict[str, Any] | None) -> str:
    text = """## A forward of M tokens

One verification by itself, us. Floor: all weights and the cache read once, at the read ceiling.
"""
    lines = []
    for row in rows:
        seconds = row["seconds"]["median"]
        floor = "–" if ceiling is None else f"{row['bytes'] / ceiling['read'] / seconds:.0%}"
        times = [spread_us(row["seconds"], 1e6), spread_us(row["eager"], 1e6)]
        lines.append([row["context"], row["tokens"], times[0], floor, f"{row['bytes'] / 1e6:.1f}", times[1]])
    return f"{text}\n{table(['context', 'M', 'one graph', 'floor / time', 'MB read', 'without graphs'], lines)}"


def kernels(rows: Rows, read: float | None) -> str:
    """Kernels of a step; own time: without what overlaps with kernels before."""
    lines = []
    for row in rows:
        rate = None if row["bytes"] is None or row["us"] == 0 else row["bytes"] / row["us"] * 1e6
        size = "–" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
        cells = [f"{row['calls']:.1f}", f"{row['us']:.1f}", f"{row['duration_us']:.1f}", size]
        share = "–" if rate is None or read is None else f"{rate / read:.0%}"
        lines.append([row["name"][:60], *cells, "–" if rate is None else f"{rate / 1e9:.0f}", share])
    heads = ["kernel", "calls a step", "own us a step", "durations, us", "MB", "GB/s", "of the read ceiling"]
    return table(heads, lines)


def _host(rows: Rows) -> str:
    text = """## The host, and what is between kernels

us. From launch to launch as the host sees it; on the device a step between two events and the gap to the next one; from
the profiler the kernels of a step, the time in which any runs, and the share of the time in which none does.
"""
    lines, tables = [], ""
    for row in rows:
        profile, captures = row["profile"], row["capture_seconds"]
        cells = [spread_us(row[name]) for name in ("launch_us", "step_us", "gap_us")]
        cells += [f"{profile['kernels']:.1f}", f"{profile['kernel_us']:.1f}", f"{profile['busy_us']:.1f}"]
        cells += [f"{profile['span_us']:.1f}", f"{profile['idle']:.1%}"]
        lines.append([row["drafter"], *cells, ", ".join(f"{s:.2f}" for s in captures) or "–"])
        tables += f"\n### Kernels of a step, {row['drafter']}\n\n{kernels(row['kernels'][:20], None)}"
    heads = [
        "", "launch to launch", "step", "gap", "kernels", "durations", "busy", "span", "nothing runs", "captures, s",
    ]  # fmt: skip
    return f"{text}\n{table(heads, lines)}{tables}"


def _prefill(rows: Rows, ceiling: dict[str, Any] | None) -> str:
    lines = []
    for row in rows:
        seconds = row["seconds"]["median"]
        rate = row["flops"] / seconds
        share = "–" if ceiling is None else f"{rate / ceiling['matmul']:.0%}"
        cells = [spread_us(row["seconds"], 1e3), f"{row['tokens'] / seconds:.0f}", f"{rate / 1e12:.1f}", share]
        lines.append([row["tokens"], row["chunk"], *cells])
    heads = ["tokens", "chunk", "ms", "tokens/s", "TFLOP/s", "of the matrix ceiling"]
    return f"## Prefill\n\nRandom tokens, batch 1.\n\n{table(heads, lines)}"


def _fp8(rows: Rows) -> str:
    frame = pd.DataFrame(rows)
    lines = []
    for writer, part in frame.groupby("writer", sort=False):
        total = part[["tokens", "plain_nll", "fp8_nll", "agree", "kl", "decode_tokens", "decode_seconds"]].sum()
        scores = [perplexity(total[name], total["tokens"]) for name in ("plain_nll", "fp8_nll")]
        cells = [f"{scores[0]:.3f}", f"{scores[1]:.3f}", f"{total['agree'] / total['tokens']:.2%}"]
        cells += [f"{total['kl'] / total['tokens']:.4f}", f"{total['decode_tokens'] / total['decode_seconds']:.0f}"]
        lines.append([writer, len(part), *cells])
    heads = [
        "text by", "prompts", "perplexity, plain", "perplexity, FP8", "same first choice", "KL(plain, FP8), nats", "tokens/s",
    ]  # fmt: skip
    return f"## FP8\n\nGreedy answers of either, scored by both token by token.\n\n{table(heads, lines)}"


def _bits(rows: Rows) -> str:
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        part = [row for row in rows if row["shape"] == shape]
        bad = sum(row["differing"] > 0 for row in part)
        tokens = sum(row["differing"] for row in part), sum(row["compared"] for row in part)
        lines.append(
            [shape, ", ".join(str(row["tokens"]) for row in part), f"{bad}/{len(part)}", f"{tokens[0]}/{tokens[1]}"]
        )
    heads = ["", "M", "forwards that differ", "tokens that differ"]
    return f"## Bits\n\nLogits against those of decoding one token at a time; must be 0.\n\n{table(heads, lines)}"
