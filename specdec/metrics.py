"""What a trace means: the one place where acceptance, speed and their intervals are defined.

A trace row is one finished request under one method; a method is a (run, drafter, verifier), so runs are never mixed.
Shapes: U requests (a conversation's turns and all passes of a request count as one), R resamples.

Intervals are 95% percentile bootstrap intervals over requests. All methods of a run share the same draws, so a ratio to
the baseline is resampled in pairs. Fewer than two requests have no interval (NaN).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

BASELINE = "none"
ALL = "all"  # the row over all tasks
RESAMPLES = 2000
METHOD = ["run", "drafter", "verifier"]
UNIT = [*METHOD, "task", "request"]  # what is resampled
KEY = ["drafter", "verifier", "request", "turn", "pass"]  # what makes a trace row unique in its run
COUNT_COLUMNS = ["num_nodes", "draft_depth", "num_accepted", "num_emitted"]
STEP_COLUMNS = [*COUNT_COLUMNS, "step_seconds", "propose_seconds", "verify_seconds", "accept_seconds"]
REQUIRED = [*KEY, "task", "lossless", "equal_to_plain", *STEP_COLUMNS]


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows of a trace.jsonl and the bytes they fill; bytes behind that are a line a killed process left unfinished."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); remove that line to go on") from error
    return rows, whole


def load_trace(run: str | Path) -> pd.DataFrame:
    """One row per request and method of a run folder (or of a trace.jsonl), list columns per step, plus its `run`.

    Warns when the last line was cut off. ValueError: nothing measured, a missing column, a row that stands twice.
    """
    path = Path(run)
    path = path / "trace.jsonl" if path.is_dir() else path
    rows, whole = read_rows(path)
    if whole < path.stat().st_size:
        warnings.warn(f"{path}: the last line was cut off and is left out; run the same command to go on", stacklevel=2)
    if not rows:
        raise ValueError(f"{path} holds no finished request; run the experiment first")
    frame = pd.DataFrame(rows)
    if missing := [column for column in REQUIRED if column not in frame]:
        raise ValueError(f"{path} lacks {missing}; a trace row needs {REQUIRED}")
    if twice := int(frame.duplicated(KEY).sum()):
        raise ValueError(f"{path}: {twice} rows repeat an earlier {KEY}; keep one of each")
    if (frame["task"] == ALL).any():
        raise ValueError(f"{path}: a task is called {ALL!r}, the name of the row over all tasks; rename the task")
    frame.insert(0, "run", path.parent.name)
    return frame


def steps(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per decode step: the method, task, request, turn, pass, step index and the step columns.

    `whole` is False where a stop or the limit cut the step short (num_emitted < num_accepted + 1).
    """
    counts = frame["num_accepted"].map(len).to_numpy()
    for column in STEP_COLUMNS:
        if not np.array_equal(counts, frame[column].map(len)):
            raise ValueError(f"{column} and num_accepted differ in their number of steps; the trace is damaged")
    names = [*METHOD, "task", "request", "turn", "pass"]
    long = frame[names].loc[frame.index.repeat(counts)].reset_index(drop=True)
    long["step"] = np.arange(len(long)) - np.repeat(np.cumsum(counts) - counts, counts)
    for column in STEP_COLUMNS:
        dtype = np.int64 if column in COUNT_COLUMNS else np.float64
        values = (np.nan if value is None else value for row in frame[column] for value in row)
        long[column] = np.fromiter(values, dtype, counts.sum())
    if (long["num_emitted"] > long["num_accepted"] + 1).any():
        raise ValueError("a step emitted more than num_accepted + 1 tokens; the trace is damaged")
    long["whole"] = long["num_emitted"] == long["num_accepted"] + 1
    return long


def _units(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Sums per method and request, beside the baseline's."""
    long = steps(frame)
    long["whole_tokens"] = (long["num_accepted"] + 1).where(long["whole"], 0)
    sums = long.rename(columns={"whole": "whole_steps", "num_emitted": "emitted", "step_seconds": "seconds"})
    sums = sums.groupby(UNIT, sort=False)[["whole_tokens", "whole_steps", "emitted", "seconds"]].sum()
    everything = frame[UNIT].drop_duplicates()  # a request that ended with its prefill has no step, but is there
    sums = sums.reindex(pd.MultiIndex.from_frame(everything), fill_value=0).reset_index()
    return _beside_baseline(sums, ["emitted", "seconds"], baseline)


def _beside_baseline(sums: pd.DataFrame, names: list[str], baseline: str) -> pd.DataFrame:
    """Sums per method and request with `base_*` and `paired_*`, only where method and baseline both have the request."""
    key = ["run", "verifier", "task", "request"]
    plain = sums.loc[sums["drafter"] == baseline, [*key, *names]]
    units = sums.merge(plain.rename(columns={name: f"base_{name}" for name in names}), on=key, how="left")
    both = units[f"base_{names[0]}"].notna()
    return units.assign(**{f"paired_{name}": units[name].where(both) for name in names})


def _resample(units: pd.DataFrame, seed: int) -> Iterator[tuple[str, str, pd.DataFrame, pd.DataFrame]]:
    """Per run and task, then over all: its name, sums [R + 1, (count, drafter, verifier)], wide [U, same columns].

    Row 0 of the sums is what was measured, the others are sums over U requests drawn with replacement.
    """
    counts = units.columns.difference(UNIT).tolist()
    for run, part in units.groupby("run", sort=False):
        for number, task in enumerate([*part["task"].unique(), ALL]):
            group = part if task == ALL else part[part["task"] == task]
            wide = group.pivot(index=["task", "request"], columns=["drafter", "verifier"], values=counts)
            num = len(wide)
            draws = np.random.default_rng([seed, number]).multinomial(num, np.full(num, 1 / num), RESAMPLES)
            weights = np.vstack([np.ones((1, num)), draws])
            sums = pd.DataFrame(weights @ wide.fillna(0).to_numpy(float), columns=wide.columns)
            yield str(run), task, sums, wide


def _count(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """One count of a table with columns (count, drafter, verifier), a column per method."""
    return table.loc[:, [name]].droplevel(0, axis=1)


def _several(counts: pd.DataFrame) -> pd.Series:
    """Whether a method has at least two requests with a count; one request says nothing about the spread."""
    return counts.gt(0).sum().gt(1)


def _interval(values: pd.DataFrame, several: pd.Series, name: str) -> pd.DataFrame:
    """Estimate and 95% interval of values [R + 1, method]: columns name, name_low, name_high; one row per method."""
    low, high = (values.iloc[1:].quantile(share).where(several) for share in (0.025, 0.975))
    return pd.DataFrame({name: values.iloc[0], f"{name}_low": low, f"{name}_high": high})


def _collect(parts: dict[tuple[str, str], pd.DataFrame]) -> pd.DataFrame:
    """Parts keyed by (run, task) as one frame indexed by METHOD + task."""
    frame = pd.concat(parts, names=["run", "task", "drafter", "verifier"])
    return frame.reorder_levels([*METHOD, "task"])


def acceptance_length(frame: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """tau = mean of num_accepted + 1 over the steps not cut short, pooled over a task's requests; prefill left out.

    The row "all" is the mean over tasks; `tau_pooled` weighs every step alike instead. Columns tau, tau_low, tau_high,
    tau_pooled, indexed by METHOD + task. NaN where every step was cut short.
    """
    parts: dict[tuple[str, str], pd.DataFrame] = {}
    tasks: dict[str, list[pd.DataFrame]] = {}
    enough: dict[str, list[pd.Series]] = {}
    for run, task, sums, wide in _resample(_units(frame, BASELINE), seed):
        tau = _count(sums, "whole_tokens") / _count(sums, "whole_steps")
        pooled = tau.iloc[0]
        if task == ALL:  # tasks are fixed: requests are resampled within each
            tau = pd.concat(tasks[run]).groupby(level=0).mean()
            several = pd.concat(enough[run], axis=1).fillna(True).all(axis=1)
        else:
            several = _several(_count(wide, "whole_steps"))
            tasks.setdefault(run, []).append(tau)
            enough.setdefault(run, []).append(several)
        parts[run, task] = _interval(tau, several, "tau").assign(tau_pooled=pooled)
    return _collect(parts)


def speedup(frame: pd.DataFrame, baseline: str = BASELINE, seed: int = 0) -> pd.DataFrame:
    """Decode tokens/s = sum(num_emitted) / sum(step_seconds), prefill apart, and its ratio to the baseline's.

    The ratio pools the requests that both have under the same verifier; "all" pools every task's requests. Columns
    tokens_per_second, speedup, speedup_low, speedup_high, indexed by METHOD + task. NaN without a baseline, and all
    NaN for a run marked `concurrent`: where runs share a machine, no speed means anything.
    """
    parts = {}
    for run, task, sums, wide in _resample(_units(frame, baseline), seed):
        speed = _count(sums, "paired_emitted") / _count(sums, "paired_seconds")
        ratio = speed / (_count(sums, "base_emitted") / _count(sums, "base_seconds"))
        table = _interval(ratio, _several(_count(wide, "base_seconds")), "speedup")
        table.insert(0, "tokens_per_second", (_count(sums, "emitted") / _count(sums, "seconds")).iloc[0])
        parts[run, task] = table
    table = _collect(parts)
    table.loc[table.index.get_level_values("run").isin(shared_runs(frame))] = np.nan
    return table


def nll(frame: pd.DataFrame, baseline: str = BASELINE, seed: int = 0) -> pd.DataFrame:
    """nll = mean of -log-probability over the emitted tokens, the prefill's included; nll_excess = less the baseline's.

    In nats, under the target at temperature 1. The difference pools the requests that both have under the same verifier;
    "all" pools every task's tokens. Each with _low and _high, indexed by METHOD + task, of the rows with `logprobs`.
    """
    tokens = frame.loc[frame["logprobs"].notna(), [*UNIT, "logprobs"]].explode("logprobs").astype({"logprobs": float})
    logs = tokens.groupby(UNIT, sort=False)["logprobs"].agg(logs="sum", tokens="count").reset_index()
    parts = {}
    for run, task, sums, wide in _resample(_beside_baseline(logs, ["logs", "tokens"], baseline), seed):
        mean, own, base = (-_count(sums, f"{of}logs") / _count(sums, f"{of}tokens") for of in ("", "paired_", "base_"))
        excess = _interval(own - base, _several(_count(wide, "base_tokens")), "nll_excess")
        parts[run, task] = _interval(mean, _several(_count(wide, "tokens")), "nll").join(excess)
    return _collect(parts)


def shared_runs(frame: pd.DataFrame) -> list[str]:
    """Runs with a row marked `concurrent`, an optional column: others used the machine at the same time."""
    if "concurrent" not in frame:
        return []
    return [str(run) for run in frame.loc[frame["concurrent"].eq(True), "run"].unique()]


def _with_all(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows once under their task and once under "all"."""
    return pd.concat([frame, frame.assign(task=ALL)], ignore_index=True)


def acceptance_by_position(frame: pd.DataFrame) -> pd.DataFrame:
    """Long frame METHOD, task, position i >= 1, reached, accepted, rate, survival, over all steps ("all": pooled).

    rate alpha_i = P(accepted at depth i | depth i - 1 accepted and the draft was at least i deep);
    survival s_i = P(num_accepted >= i), so a step without a draft counts against s_i but not against alpha_i.
    """
    long = _with_all(steps(frame))
    parts = []
    for position in range(1, int(long["draft_depth"].max() if len(long) else 0) + 1):
        reached = (long["num_accepted"] >= position - 1) & (long["draft_depth"] >= position)
        part = long.assign(reached=reached, accepted=long["num_accepted"] >= position, steps=1)
        part = part.groupby([*METHOD, "task"], sort=False)[["reached", "accepted", "steps"]].sum().reset_index()
        parts.append(part[part["reached"] > 0].assign(position=position))
    columns = [*METHOD, "task", "position", "reached", "accepted", "rate", "survival"]
    if not parts:
        return pd.DataFrame(columns=columns)
    table = pd.concat(parts, ignore_index=True)
    table["rate"], table["survival"] = table["accepted"] / table["reached"], table["accepted"] / table["steps"]
    return table[columns]


def breakdown(frame: pd.DataFrame) -> pd.DataFrame:
    """Share of the step time in propose, verify, accept and host (all else), and seconds_per_step. METHOD + task.

    The shares are NaN where the device runs behind the host and the parts of a step are not known.
    """
    long = _with_all(steps(frame)).assign(steps=1)
    parts = ["propose_seconds", "verify_seconds", "accept_seconds"]
    sums = long.groupby([*METHOD, "task"], sort=False)[["step_seconds", "steps", *parts]].sum(min_count=1)
    shares = sums[parts].div(sums["step_seconds"], axis=0).rename(columns=lambda name: name.removesuffix("_seconds"))
    return shares.assign(
        host=1 - shares.sum(axis=1, skipna=False), seconds_per_step=sums["step_seconds"] / sums["steps"]
    )


def _equality(frame: pd.DataFrame) -> pd.DataFrame:
    """turns, equal, requests_equal, requests_compared, lossless. A request is equal when it is in every pass."""
    rows = _with_all(frame)
    group = [*METHOD, "task"]
    turns = rows.drop_duplicates([*group, "request", "turn"])
    table = turns.groupby(group, sort=False).agg(turns=("request", "size"))
    table["lossless"] = rows.groupby(group)["lossless"].all()
    known = rows[rows["equal_to_plain"].notna()]
    known = known.assign(equal=known["equal_to_plain"].astype(int))
    same = known.groupby([*group, "request", "turn"])["equal"].min().groupby(group).agg(["sum", "size"])
    same = same.reindex(table.index, fill_value=0)
    table["requests_equal"], table["requests_compared"] = same["sum"], same["size"]
    table["equal"] = table["requests_equal"] / table["requests_compared"]  # NaN: nothing to compare with
    return table


def summary(frame: pd.DataFrame, baseline: str = BASELINE, seed: int = 0) -> pd.DataFrame:
    """Everything in one table, a row per method and task (and "all"), in the order of the trace.

    Columns: METHOD, task, turns, tau, tau_low, tau_high, tau_pooled, alpha_1..k, tokens_per_second, speedup,
    speedup_low, speedup_high, equal (share of requests equal to plain), requests_equal, requests_compared,
    overhead (1 - verify share of the step time), lossless; and those of `nll` where a row has log-probabilities.
    """
    counts = _equality(frame)
    by_position = acceptance_by_position(frame)
    alphas = by_position.pivot(index=[*METHOD, "task"], columns="position", values="rate").add_prefix("alpha_")
    overhead = (1 - breakdown(frame)["verify"]).rename("overhead")
    parts = [acceptance_length(frame, seed), alphas, speedup(frame, baseline, seed)]
    equality = counts[["equal", "requests_equal", "requests_compared"]]
    table = counts[["turns"]].join([*parts, equality, overhead, counts["lossless"]])
    if "logprobs" in frame and frame["logprobs"].notna().any():
        table = table.join(nll(frame, baseline, seed))
    order = frame.drop_duplicates(METHOD)[METHOD].itertuples(index=False, name=None)
    tasks = [*frame["task"].unique(), ALL]
    wanted = [(*method, task) for method in order for task in tasks if (*method, task) in table.index]
    return table.loc[wanted].reset_index()


def method_labels(summary: pd.DataFrame) -> pd.Series:
    """A name per row: the drafter, its verifier and run where the table has several, and "lossy" where it is."""
    labels = summary["drafter"].astype(str)
    if summary["verifier"].nunique() > 1:
        labels = labels + " + " + summary["verifier"]
    if summary["run"].nunique() > 1:
        labels = labels + " @ " + summary["run"]
    return labels.where(summary["lossless"].astype(bool), labels + " (lossy)")
