"""The definitions against traces small enough to count by hand, and the intervals against their promise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from synthetic_trace import TASKS, row, rows, write_trace

from specdec import metrics, report


def load(folder: Path, trace: list[dict]) -> pd.DataFrame:
    return metrics.load_trace(write_trace(folder, trace))


def at(table: pd.DataFrame, drafter: str, task: str) -> pd.Series:
    """The row of one drafter and task."""
    table = table.reset_index()
    return table[(table["drafter"] == drafter) & (table["task"] == task)].iloc[0]


def with_costs(trace_row: dict, seconds: float, verify: float) -> dict:
    """The row with the same, exact, cost at every step."""
    num = len(trace_row["num_accepted"])
    return {**trace_row, "step_seconds": [seconds] * num, "verify_seconds": [verify] * num}


def test_acceptance_length_leaves_out_steps_cut_short_and_averages_tasks(tmp_path: Path) -> None:
    trace = [
        row("d", 0, [3, 1, 2], 3, num_emitted=[4, 2, 1]),  # the last step is cut: (4 + 2) / 2
        row("d", 1, [0], 3),  # pooled with request 0: (4 + 2 + 1) / 3
        row("d", 2, [1, 1, 1, 1], 3, task="code"),  # 2
    ]
    tau = metrics.acceptance_length(load(tmp_path, trace))
    assert at(tau, "d", "chat")["tau"] == pytest.approx(7 / 3)
    assert at(tau, "d", "all")["tau"] == pytest.approx((7 / 3 + 2) / 2)
    assert at(tau, "d", "all")["tau_pooled"] == pytest.approx(15 / 7)


def test_acceptance_rate_is_conditional_on_the_position_being_reached(tmp_path: Path) -> None:
    trace = [row("d", 0, [2, 0, 1, 0], 2, draft_depth=[2, 2, 1, 0])]
    table = metrics.acceptance_by_position(load(tmp_path, trace)).query("task == 'all'").set_index("position")
    assert table["reached"].tolist() == [3, 1]  # step 3 accepted all it had; step 4 had nothing
    assert table["rate"].tolist() == pytest.approx([2 / 3, 1])
    assert table["survival"].tolist() == pytest.approx([2 / 4, 1 / 4])
    assert table["acceptance_rate"].tolist() == pytest.approx([2 / 3, 1 / 3])  # of three drafts; step 4 made none


def test_the_acceptance_rate_is_accepted_over_drafted_tokens(tmp_path: Path) -> None:
    """Of a tree every node counts as drafted, at any depth, and tasks are pooled."""
    trace = [row("d", 0, [2, 0], 2, num_nodes=[3, 7]), row("d", 1, [1], 2, task="code"), row("none", 0, [0], 0)]
    table = metrics.summary(load(tmp_path, trace))
    assert at(table, "d", "chat")["acceptance_rate"] == pytest.approx(2 / 8)
    assert at(table, "d", "all")["acceptance_rate"] == pytest.approx(3 / 10)
    assert np.isnan(at(table, "none", "all")["acceptance_rate"])


@pytest.mark.parametrize("name", ["tau", "speedup"])
def test_an_interval_needs_six_requests(tmp_path: Path, name: str) -> None:
    """Also where tasks hold fewer each and six together; a task of one request has no spread to resample."""
    sizes = {"few": 5, "more": 6, "single": 1}
    trace = []
    for task, size in sizes.items():
        for request in range(size):
            trace.append(row("none", len(trace), [0] * 4, 0, task=task))
            trace.append(row("d", trace[-1]["request"], [request % 3, 1], 2, task=task))
    known = lambda trace, task: not np.isnan(at(metrics.summary(load(tmp_path, trace)), "d", task)[f"{name}_low"])  # noqa: E731
    assert [known(trace, task) for task in sizes] == [False, True, False]
    assert known(trace, "all") == (name == "speedup")  # which pools the requests; tau averages the tasks
    assert known([one for one in trace if one["task"] != "single"], "all")
    assert not known([one for one in trace if one["task"] == "few"], "all")


def test_speedup_pools_the_requests_both_have(tmp_path: Path) -> None:
    trace = [
        with_costs(row("none", 0, [0] * 4, 0), 0.1, 0.08),  # 10 tokens/s
        with_costs(row("d", 0, [3], 3), 0.2, 0.1),  # 20 tokens/s
        with_costs(row("d", 9, [0, 0], 3), 1.0, 0.1),  # slow, and without a baseline
    ]
    table = metrics.summary(load(tmp_path, trace))
    assert at(table, "d", "chat")["speedup"] == pytest.approx(2)
    assert at(table, "d", "chat")["tokens_per_second"] == pytest.approx(6 / 2.2)
    assert at(table, "d", "chat")["overhead"] == pytest.approx(1 - 0.3 / 2.2)
    assert at(table, "none", "all")["speedup"] == 1


def test_the_baseline_has_the_same_verifier_and_run(tmp_path: Path) -> None:
    trace = [
        with_costs(row("none", 0, [0], 0), 1.0, 0.5),
        with_costs(row("none", 0, [0], 0, verifier="typical", lossless=False), 2.0, 0.5),
        with_costs(row("d", 0, [1], 1, verifier="typical", lossless=False), 1.0, 0.5),
    ]
    frame = load(tmp_path / "a", trace)
    assert at(metrics.summary(frame), "d", "chat")["speedup"] == pytest.approx(4)
    other = load(tmp_path / "b", [with_costs(trace[2], 0.5, 0.5)])  # another run's baseline does not count
    both = metrics.summary(pd.concat([frame, other], ignore_index=True))
    assert np.isnan(both[(both["run"] == "b") & (both["task"] == "chat")]["speedup"].iloc[0])
    assert metrics.method_labels(both).iloc[-1] == "d + typical @ b (lossy)"


def test_a_run_on_a_shared_machine_reports_no_speed(tmp_path: Path) -> None:
    frame = load(tmp_path, rows(6, 15)).assign(concurrent=True)
    quiet = frame.assign(run="quiet", concurrent=False)
    table = metrics.summary(pd.concat([frame, quiet], ignore_index=True)).set_index("run")
    assert table.loc[tmp_path.name, ["tokens_per_second", "speedup", "speedup_low"]].isna().all(axis=None)
    assert table.loc["quiet", ["tokens_per_second", "speedup", "speedup_low"]].notna().all(axis=None)
    assert table["tau"].notna().all()


def test_passes_are_pooled_and_equality_needs_every_pass(tmp_path: Path) -> None:
    trace = [row("d", 0, [1], 1), row("d", 0, [0], 1, **{"pass": 1}, equal_to_plain=False)]
    trace += [row("d", 1, [1], 1), row("d", 2, [1], 1, equal_to_plain=None)]
    table = at(metrics.summary(load(tmp_path, trace)), "d", "chat")
    assert (table["turns"], table["requests_equal"], table["requests_compared"], table["equal"]) == (3, 1, 2, 0.5)
    assert table["tau"] == pytest.approx(7 / 4)


def test_a_request_without_a_step_counts_as_a_prompt_only(tmp_path: Path) -> None:
    table = metrics.summary(load(tmp_path, [row("d", 0, [], 2, equal_to_plain=None), row("d", 1, [2], 2)]))
    assert at(table, "d", "all")["turns"] == 2
    assert at(table, "d", "all")["tau"] == 3
    assert np.isnan(at(metrics.summary(load(tmp_path, [row("none", 0, [], 0)])), "none", "all")["tau"])


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_tau_is_one_plus_the_sum_of_survivals(accepted: list[list[int]]) -> None:
    frame = pd.DataFrame([row("d", request, steps, 4) for request, steps in enumerate(accepted)]).assign(run="r")
    survival = metrics.acceptance_by_position(frame).query("task == 'all'")["survival"].sum()
    assert at(metrics.acceptance_length(frame), "d", "all")["tau"] == pytest.approx(1 + survival)


def test_truth_is_found_and_mostly_covered(tmp_path: Path) -> None:
    """tau of a chain of 4 with rate a is (1 - a^5) / (1 - a); 95% intervals should cover it nearly always."""
    covered = []
    for seed in range(20):
        frame = load(tmp_path / str(seed), [one for one in rows(15, 60, seed) if one["drafter"] == "ngram"])
        tau = metrics.acceptance_length(frame, seed).reset_index()
        for task, rate in TASKS.items():
            truth, found = (1 - rate**5) / (1 - rate), at(tau, "ngram", task)
            assert found["tau"] == pytest.approx(truth, rel=0.2)
            covered.append(found["tau_low"] <= truth <= found["tau_high"])
            assert found["tau_high"] - found["tau_low"] < 0.5 * truth
    assert 0.8 <= np.mean(covered) <= 1  # 60 intervals; a little under 95% is what the percentile bootstrap gives


def test_pairing_removes_the_noise_both_share(tmp_path: Path) -> None:
    trace = []
    for request, noise in enumerate([1, 5, 2, 9, 3, 7]):
        trace.append(with_costs(row("none", request, [0] * 6, 0), 0.1 * noise, 0.1))
        trace.append(with_costs(row("d", request, [2] * 2, 2), 0.1 * noise, 0.1))
    found = at(metrics.speedup(load(tmp_path, trace)), "d", "chat")
    assert found[["speedup", "speedup_low", "speedup_high"]].tolist() == pytest.approx([3, 3, 3])


def test_seeds_repeat(tmp_path: Path) -> None:
    frame = load(tmp_path, rows(3, 20))
    pd.testing.assert_frame_equal(metrics.summary(frame), metrics.summary(frame))
    assert not metrics.summary(frame)["speedup_low"].equals(metrics.summary(frame, seed=1)["speedup_low"])


def test_a_cut_off_last_line_is_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = write_trace(tmp_path, [row("d", 0, [1], 1), row("d", 1, [1], 1)])
    whole = (folder / "trace.jsonl").read_bytes()
    (folder / "trace.jsonl").write_bytes(whole[:-30])
    with pytest.warns(UserWarning, match="cut off"):
        assert metrics.load_trace(folder)["request"].tolist() == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no finished request"),
        ("{broken\n" + json.dumps(row("d", 0, [1], 1)) + "\n", "line 1 is not JSON"),
        (json.dumps({"drafter": "d"}) + "\n", "lacks"),
        ((json.dumps(row("d", 0, [1], 1)) + "\n") * 2, "repeat"),
        (json.dumps(row("d", 0, [1], 1, task="all")) + "\n", "rename the task"),
    ],
)
def test_a_damaged_trace_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        metrics.load_trace(tmp_path)


def test_a_run_that_is_not_there_and_a_table_that_is_no_trace_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*none/trace\.jsonl: name a run folder"):
        metrics.load_trace(tmp_path / "none")
    table = metrics.summary(load(tmp_path, [row("d", 0, [1], 1)]))
    for wrong in (metrics.steps, metrics.summary):
        with pytest.raises(ValueError, match=r"no trace, it lacks request: .* not a summary"):
            wrong(table)


def test_impossible_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ in their number"):
        metrics.steps(load(tmp_path, [row("d", 0, [1, 1], 1, verify_seconds=[0.1])]))
    with pytest.raises(ValueError, match="more than num_accepted"):
        metrics.steps(load(tmp_path, [row("d", 0, [1], 1, num_emitted=[3])]))


@pytest.mark.parametrize("width", [80, 120])
def test_tables_show_every_number_whole(tmp_path: Path, width: int) -> None:
    trace = rows(6, 20)
    for one in trace:
        if one["drafter"] == "draft_model":
            one.update(drafter="a_drafter_of_long_name", lossless=False)
    table = metrics.summary(load(tmp_path, trace))
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.print_summary(table, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "lossy" in text
    ngram = at(table, "ngram", "code")
    assert f"{ngram['speedup']:.2f} [{ngram['speedup_low']:.2f}, {ngram['speedup_high']:.2f}]" in text
    assert f"{ngram['alpha_1']:.2f}".removeprefix("0") in text
    assert "6/6" in text


def test_no_table_of_rates_without_drafts(tmp_path: Path) -> None:
    """And a note beside the summary is printed with it."""
    for drafters, shown in ((("none",), 1), (("none", "ngram"), 2)):
        table = metrics.summary(load(tmp_path, [row(name, 0, [0], 2 * (name != "none")) for name in drafters]))
        assert len(report.tables(table, 80)) == shown
    table.attrs["note"] = "Others were busy."
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.print_summary(table, console)
    text = " ".join(console.export_text().split())
    assert "Others were busy." in text
    assert report.POOLED in text


def test_markdown_has_a_row_per_drafter_and_task(tmp_path: Path) -> None:
    text = report.markdown(metrics.summary(load(tmp_path, rows(2, 20))))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 * 4
    assert len({line.count("|") for line in lines}) == 1
    assert "all = mean over tasks" in text
    assert "all = all drafts pooled" in text
    one_task = metrics.summary(load(tmp_path, [row("d", 0, [1], 1)]))
    assert "| all |" not in report.markdown(one_task)
