"""The projection as Markdown, JSON and a figure, beside the record it is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from specdec.projection.band import Band, Quantity
from specdec.projection.formula import Projection
from specdec.projection.machine import Machine
from specdec.projection.measured import OURS, interpolated

# NVIDIA, "Blackwell Breaks the 1,000 TPS/User Barrier With Meta's Llama 4 Maverick", May 2025: 8 x B200, FP8, 3 drafts
RECORD_TPS, RECORD_SERVER_TPS, RECORD_RATIO, RECORD_DRAFTS = 1000.0, 72_000.0, 4.0, 3
# NVIDIA's EAGLE-3 head by number of drafts 1 to 7: README of RedHatAI/Llama4-Maverick-17B-128E-Instruct-speculator.eagle3
ACCEPTANCE_LENGTHS = {
    "HumanEval": (1.83, 2.45, 2.94, 3.26, 3.47, 3.57, 3.62),
    "gsm8k": (1.86, 2.56, 3.08, 3.53, 3.73, 3.91, 4.02),
    "CNN/DM": (1.69, 2.12, 2.37, 2.52, 2.60, 2.63, 2.63),
}
CURVE_STEP = 0.25  # of acceptance length


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a projection."""

    drafts: tuple[int, ...]
    context: int
    target_tps: float = RECORD_TPS
    acceptance_length: float | None = None  # of the server table; the published mean over tasks when left out


def published_acceptance_length(drafts: int) -> float | None:
    """Mean over the published tasks; None beyond what was published."""
    lengths = [by_k[drafts - 1] for by_k in ACCEPTANCE_LENGTHS.values() if 0 < drafts <= len(by_k)]
    return sum(lengths) / len(lengths) if lengths else None


def named(drafts: int) -> str:
    return f"{drafts} draft" if drafts == 1 else f"{drafts} drafts"


def curve(projection: Projection, drafts: int, context: int) -> list[tuple[float, Band]]:
    """(acceptance length, tokens/s per user) from 1 to all drafts accepted."""
    lengths = [1 + i * CURVE_STEP for i in range(round(drafts / CURVE_STEP) + 1)]
    return [(tau, projection.tokens_per_second(tau, drafts, context)) for tau in lengths]


def server_rows(projection: Projection, drafts: int, context: int, acceptance_length: float) -> list[dict[str, Any]]:
    """Per measured batch: tokens/s per server of every runtime, plain and with drafts, and ratios to ours with drafts.

    Ratios are taken edge by edge: both sides run on the same machine with the same all-reduce. A runtime that drafts is
    given our drafting time and acceptance length.
    """
    runtimes = projection.measured.runtimes
    rows = []
    for batch in sorted({row.batch for row in runtimes[OURS].rows if row.context == context}):
        cells = {}
        for name, runtime in runtimes.items():
            tokens = {r.tokens for r in runtime.rows if (r.batch, r.context) == (batch, context)}
            if 1 in tokens:
                cells[f"{name}, plain"] = projection.server_throughput(1.0, 0, context, batch, name)
            if tokens and min(tokens) <= drafts + 1 <= max(tokens):
                tps = projection.server_throughput(acceptance_length, drafts, context, batch, name)
                cells[f"{name}, {named(drafts)}"] = tps
        ours = cells.get(f"{OURS}, {named(drafts)}")
        ratios = {name: ours.ratio(tps) for name, tps in cells.items() if tps is not ours} if ours else {}
        if ours or f"{OURS}, plain" in cells:
            rows.append({"batch": batch, "tokens_per_second": cells, "ratios": ratios})
    return rows


def _band(band: Band, digits: int = 0) -> str:
    """`1,202 [980, 1,410]`."""
    low, mid, high = (f"{value:,.{digits}f}" for value in band.edges)
    return mid if low == high else f"{mid} [{low}, {high}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def _inputs(machine: Machine) -> str:
    quantities = ((field.name, getattr(machine, field.name)) for field in fields(machine))
    rows = [
        (name, _band(value, 2), value.kind, value.source) for name, value in quantities if isinstance(value, Quantity)
    ]
    return _table(("input", "mid [low, high]", "kind", "source"), rows)


def _latency(projection: Projection, question: Question) -> str:
    """Iteration and break-even by number of drafts, with the published acceptance lengths beside them."""
    rows = []
    for k in (0, *question.drafts):
        time = projection.iteration_time(k, question.context)
        share = projection.floor(1 + k, question.context, drafts=k) / time.mid
        need = projection.break_even_acceptance_length(k, question.context, question.target_tps)
        reach = "" if need.mid <= k + 1 else ", out of reach"
        draft = projection.draft_time(k)
        tps = [
            _band(projection.tokens_per_second(by_k[k - 1], k, question.context)) if 0 < k <= len(by_k) else ""
            for by_k in ACCEPTANCE_LENGTHS.values()
        ]
        rows.append((str(k), _band(time), _band(draft), f"{share:.0%}", _band(need, 2) + reach, *tps))
    need_head = f"acceptance length for {question.target_tps:,.0f} TPS/user"
    head = ("drafts", "iteration us", "of it drafting us", "memory floor / iteration", need_head)
    return _table((*head, *(f"TPS/user at {task}" for task in ACCEPTANCE_LENGTHS)), rows)


def _record(projection: Projection, context: int) -> str:
    """Where NVIDIA's record falls: the iteration it implies at each published acceptance length, beside ours."""
    k = RECORD_DRAFTS
    ours = projection.iteration_time(k, context)
    rows = []
    for task, by_k in ACCEPTANCE_LENGTHS.items():
        implied = Band.exactly(by_k[k - 1] / RECORD_TPS * 1e6)
        rows.append((task, f"{by_k[k - 1]:.2f}", _band(implied), _band(ours), _band(implied.ratio(ours), 2)))
    head = (
        "acceptance length of",
        f"tau at {k} drafts",
        "iteration us implied by the record",
        "projected us",
        "record / projected",
    )
    return _table(head, rows)


def _server(projection: Projection, drafts: int, context: int, tau: float) -> str:
    rows = server_rows(projection, drafts, context, tau)
    names = list(dict.fromkeys(name for row in rows for name in row["tokens_per_second"]))
    ratios = [name for name in names if name != f"{OURS}, {named(drafts)}"]
    lines = []
    for row in rows:
        speeds = [_band(row["tokens_per_second"][n]) if n in row["tokens_per_second"] else "" for n in names]
        gains = [_band(row["ratios"][n], 2) if n in row["ratios"] else "" for n in ratios]
        best = max(tps.mid for name, tps in row["tokens_per_second"].items() if name.startswith(f"{OURS}, "))
        lines.append([str(row["batch"]), *speeds, *gains, f"{best / RECORD_SERVER_TPS:.0%}"])
    head = ["batch", *names, *(f"ours / {name}" for name in ratios), f"best of ours / {RECORD_SERVER_TPS:,.0f}"]
    return _table(head, lines)


def _measured_drafts(projection: Projection, question: Question) -> tuple[int, ...]:
    """The drafts asked for; ValueError when one of them (or plain decoding) was not measured at batch 1."""
    for k in (0, *question.drafts):
        interpolated(OURS, projection.measured.runtimes[OURS].rows, 1, 1 + k, question.context)
    return question.drafts


def _server_questions(question: Question) -> Iterator[tuple[int, float]]:
    """(drafts, acceptance length) of the server tables: those with a length given or published."""
    for k in question.drafts:
        tau = question.acceptance_length or published_acceptance_length(k)
        if tau is not None:
            yield k, tau


def markdown(projection: Projection, question: Question) -> str:
    """All tables of one machine."""
    drafts, context = _measured_drafts(projection, question), question.context
    parts = [
        f"## {projection.model.name} on {projection.machine.name}: a projection\n",
        f"From {projection.measured.source}, measured on {projection.measured.machine.name} as one of "
        f"{projection.measured.ranks} ranks; draft head {projection.head.name}; context {context}; batch 1; "
        "mid [low, high]. Acceptance lengths are published ones of the bf16 full-vocabulary head.\n",
        _latency(projection, question),
    ]
    if RECORD_DRAFTS in drafts:
        parts += [
            f"NVIDIA's record ({RECORD_TPS:,.0f} TPS/user on 8 x B200) on the same curve:\n",
            _record(projection, context),
        ]
    for k in drafts:
        points = [(f"{tau:.2f}", _band(tps)) for tau, tps in curve(projection, k, context)]
        parts += [f"Tokens/s per user over acceptance length, {named(k)}:\n", _table(("tau", "TPS/user"), points)]
    for k, tau in _server_questions(question):
        parts += [
            f"Tokens/s per server over batch size, {named(k)} at acceptance length {tau:.2f} (NVIDIA's best "
            f"throughput configuration: {RECORD_SERVER_TPS:,.0f}, {RECORD_RATIO:g}x its prior baseline):\n",
            _server(projection, k, context, tau),
        ]
    return "\n".join([*parts, "Inputs of the machine:\n", _inputs(projection.machine)])


def as_json(projection: Projection, question: Question) -> dict[str, Any]:
    """The same numbers as plain data; bands are {"low", "mid", "high"}."""
    drafts, context = _measured_drafts(projection, question), question.context
    by_drafts = {
        str(k): {
            "iteration_us": asdict(projection.iteration_time(k, context)),
            "floor_us": projection.floor(1 + k, context, drafts=k),
            "break_even": asdict(projection.break_even_acceptance_length(k, context, question.target_tps)),
            "curve": [{"acceptance_length": tau, **asdict(tps)} for tau, tps in curve(projection, k, context)],
        }
        for k in (0, *drafts)
    }
    servers = {}
    for k, tau in _server_questions(question):
        rows = [
            {key: {n: asdict(b) for n, b in v.items()} if isinstance(v, dict) else v for key, v in row.items()}
            for row in server_rows(projection, k, context, tau)
        ]
        servers[str(k)] = {"acceptance_length": tau, "rows": rows}
    return {
        "source": projection.measured.source,
        "model": asdict(projection.model),
        "head": asdict(projection.head),
        "machine": asdict(projection.machine),
        "question": asdict(question),
        "by_drafts": by_drafts,
        "server": servers,
    }
