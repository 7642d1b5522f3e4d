"""The tables of maverick_shard from its JSON document."""

from __future__ import annotations

from typing import Any

from _bench import table
from _gpu_report import ceilings, head, kernels, spread_us


def render(document: dict[str, Any]) -> str:
    """Markdown of a result. Sections that were not measured are left out."""
    setup, rows = document["setup"], document["rows"]
    dense, routed = setup["dense_bytes"] / 1e9, setup["expert_bytes_held"] / 1e9
    what = f"""One rank ({setup["shard"]}) of Llama 4 Maverick, {setup["num_layers"]} layers, random FP8 weights, batch 1.
No all-reduces. It holds {dense:.2f} GB of dense weights and {routed:.1f} GB of routed experts,
{setup["num_experts"]} in each mixture."""
    parts = [head("A decode step of one rank of Maverick", document, what)]
    by: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["section"], []).append(row)
    read = by["ceiling"][0]["read"] if "ceiling" in by else None
    if "ceiling" in by:
        parts.append(ceilings(by["ceiling"]))
    if "step" in by:
        parts.append(_steps(by["step"], read))
    if "profile" in by:
        parts.append(_profiles(by["profile"], read))
    return "\n".join(parts)


def _steps(rows: list[dict[str, Any]], read: float | None) -> str:
    text = """## Steps

us. Step: from one to the next in the loop's trace. On the device: between two events around the graph, and the gap to the next.
Read: all weights that the step touches and the cache, once. Floor: these bytes at the read ceiling.
"""
    lines = []
    for row in rows:
        floor = "–" if read is None else f"{row['bytes'] / read * 1e6:.0f}"
        share = "–" if read is None else f"{row['bytes'] / read * 1e6 / row['us']['median']:.0%}"
        experts = f"{row['experts']:.2f} ({row['expected_experts']:.2f})"
        times = [spread_us(row[name]) for name in ("us", "device_us", "gap_us")]
        lines.append(
            [row["context"], row["tokens"], row["routing"], experts, *times, f"{row['bytes'] / 1e6:.0f}", floor, share]
        )
    heads = [
        "context", "M", "routing", "D (expected)", "step", "on the device", "gap", "MB read", "floor", "floor / step",
    ]  # fmt: skip
    return f"{text}\n{table(heads, lines)}"


def _profiles(rows: list[dict[str, Any]], read: float | None) -> str:
    text = (
        "## Kernels of a step\n\nOwn time: without what overlaps with the kernels before. Bytes: weights and cache.\n"
    )
    for row in rows:
        p = row["profile"]
        text += f"""
### context {row["context"]}, M = {row["tokens"]}, {row["routing"]}: D = {row["experts"]:.2f}

{p["kernels"]:.0f} kernels; any runs for {p["busy_us"]:.1f} us of {p["span_us"]:.1f} us ({p["idle"]:.1%} nothing).

{kernels(row["kernels"][:16], read)}"""
    return text
