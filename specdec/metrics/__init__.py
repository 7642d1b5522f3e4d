"""What a trace means: the one place where acceptance, speed and their intervals are defined.

A trace row is one finished request under one method; a method is a (run, drafter, verifier), so runs are never mixed.
Shapes: U requests (a conversation's turns and all passes of a request count as one), R resamples.

Intervals are 95% percentile bootstrap intervals over requests. All methods of a run share the same draws, so a ratio to
the baseline is resampled in pairs. Fewer than LEAST requests have no interval (NaN): a few draws of the same few requests
leave the spread out.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from specdec.metrics.trace import ALL, KEY, METHOD, REQUIRED, STEP_COLUMNS, load_trace, read_rows, steps

__all__ = [
    "ALL",
    "BASELINE",
    "KEY",
    "LEAST",
    "METHOD",
    "REQUIRED",
    "RESAMPLES",
    "STEP_COLUMNS",
    "acceptance_by_position",
    "acceptance_length",
    "breakdown",
    "load_trace",
    "method_labels",
    "nll",
    "read_rows",
    "shared_runs",
    "speedup",
    "steps",
    "summary",
]

BASELINE = "none"
RESAMPLES = 2000
LEAST = 6  # requests of an interval
UNIT = [*METHOD, "task", "request"]  # what is resampled


def _units(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Sums per method and request, beside the baseline's."""
    long = steps(frame)
    long["whole_tokens"] = (long["num_accepted"] + 1).where(long["whole"], 0)
    long["drafted"] = long["num_nodes"] - 1
    names = {"whole": "whole_steps", "num_emitted": "emitted", "num_accepted": "accepted", "step_seconds": "seconds"}
    sums = long.rename(columns=names).groupby(UNIT, sort=False)[["whole_tokens", "drafted", *names.values()]].sum()
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
    """Whether a method has enough requests with a count for an interval."""
    return counts.gt(0).sum().ge(LEAST)


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

    The row "all" is the mean over tasks, its interval needs two requests of each; `tau_pooled` weighs every step alike
    instead. acceptance_rate = accepted / drafted tokens, pooled too. Columns tau, tau_low, tau_high, tau_pooled,
    acceptance_rate, indexed by METHOD + task. NaN where every step was cut short, or nothing drafted.
    """
    parts: dict[tuple[str, str], pd.DataFrame] = {}
    tasks: dict[str, list[pd.DataFrame]] = {}
    requests: dict[str, list[pd.Series]] = {}
    for run, task, sums, wide in _resample(_units(frame, BASELINE), seed):
        tau = _count(sums, "whole_tokens") / _count(sums, "whole_steps")
        pooled = tau.iloc[0]
        if task == ALL:  # tasks are fixed: requests are resampled within each
            tau = pd.concat(tasks[run]).groupby(level=0).mean()
            numbers = pd.concat(requests[run], axis=1)
            several = numbers.min(axis=1).gt(1) & numbers.sum(axis=1).ge(LEAST)
        else:
            several = _several(_count(wide, "whole_steps"))
            tasks.setdefault(run, []).append(tau)
            requests.setdefault(run, []).append(_count(wide, "whole_steps").gt(0).sum())
        rate = (_count(sums, "accepted") / _count(sums, "drafted")).iloc[0]
        parts[run, task] = _interval(tau, several, "tau").assign(tau_pooled=pooled, acceptance_rate=rate)
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
    """Long frame METHOD, task, position i >= 1 and the columns below, over all steps ("all": pooled).

    rate alpha_i = accepted / reached = P(accepted at depth i | depth i - 1 accepted and the draft was at least i deep);
    survival s_i = P(num_accepted >= i), so a step without a draft counts against s_i but not against alpha_i;
    acceptance_rate = P(num_accepted >= i | something was drafted), which serving engines log by position.
    """
    long = _with_all(steps(frame))
    parts = []
    for position in range(1, int(long["draft_depth"].max() if len(long) else 0) + 1):
        reached = (long["num_accepted"] >= position - 1) & (long["draft_depth"] >= position)
        part = long.assign(reached=reached, accepted=long["num_accepted"] >= position, steps=1)
        part["drafts"] = part["draft_depth"] > 0
        part = (
            part.groupby([*METHOD, "task"], sort=False)[["reached", "accepted", "steps", "drafts"]].sum().reset_index()
        )
        parts.append(part[part["reached"] > 0].assign(position=position))
    columns = [*METHOD, "task", "position", "reached", "accepted", "rate", "survival", "acceptance_rate"]
    if not parts:
        return pd.DataFrame(columns=columns)
    table = pd.concat(parts, ignore_index=True)
    for name, of in (("rate", "reached"), ("survival", "steps"), ("acceptance_rate", "drafts")):
        table[name] = table["accepted"] / table[of]
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

    Columns: METHOD, task, turns, tau, tau_low, tau_high, tau_pooled, acceptance_rate, alpha_1..k, tokens_per_second,
    speedup, speedup_low, speedup_high, equal (share of requests equal to plain), requests_equal, requests_compared,
    overhead (1 - verify share of the step time), lossless; and those of `nll` where a row has log-probabilities.
    """
    by_position = acceptance_by_position(frame)
    counts = _equality(frame)
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
