"""The answers of specdec.analysis on traces whose truth is known, and that its figures draw."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from synthetic_trace import TASKS, row, rows, step_seconds, write_trace

from specdec import analysis


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("runs") / "run", rows(10, 120))


@pytest.fixture(scope="module")
def frame(run: Path) -> pd.DataFrame:
    return analysis.load(run)


def true_speedup(rate: float, depth: int, propose: float) -> float:
    """Tokens per second of a chain of this depth over that of no drafting, by the law of the synthetic trace."""
    tau = sum(rate**i for i in range(depth + 1))
    return tau / step_seconds(depth, propose)["step_seconds"] * step_seconds(0, 0.0)["step_seconds"]


def test_best_drafter_names_the_winner_and_its_margin(frame: pd.DataFrame) -> None:
    best = analysis.best_drafter(analysis.summary(frame)).set_index("task")
    assert best["drafter"].tolist() == ["ngram"] * 4  # the same acceptance for less time
    assert best["runner_up"].tolist() == ["draft_model"] * 4
    assert best["beats_plain"].all()
    assert best["beats_runner_up"].all()


def test_no_drafting_wins_where_drafts_cost_more_than_they_give(tmp_path: Path) -> None:
    slow = {"step_seconds": [1.0] * 2, "propose_seconds": [0.9] * 2}
    trace = [one for r in range(6) for one in (row("none", r, [0] * 3, 0), row("d", r, [1, 0], 1, **slow))]
    best = analysis.best_drafter(analysis.summary(analysis.load(write_trace(tmp_path, trace))))
    assert best["drafter"].tolist() == ["none", "none"]
    assert best["beats_plain"].tolist() == [False, False]
    assert best["beats_runner_up"].tolist() == [True, True]


def test_what_no_interval_says_is_unknown(tmp_path: Path) -> None:
    trace = [row(name, r, [2] * 3, 2 * (name != "none")) for r in range(5) for name in ("none", "d", "e")]
    for one in trace:
        one["num_accepted"], one["num_emitted"] = ([0] * 3, [1] * 3) if one["drafter"] == "none" else ([2] * 3, [3] * 3)
    best = analysis.best_drafter(analysis.summary(analysis.load(write_trace(tmp_path, trace))))
    assert best["drafter"].tolist() == ["d", "d"]
    assert best[["beats_plain", "beats_runner_up"]].isna().all(axis=None)


def test_a_lossy_method_competes_only_when_asked(frame: pd.DataFrame) -> None:
    table = analysis.summary(frame.assign(lossless=frame["drafter"] != "ngram"))
    strict = analysis.best_drafter(table).set_index("task")["drafter"]
    assert strict["code"] == "draft_model"
    assert set(strict) <= {"draft_model", "none"}
    assert set(analysis.best_drafter(table, lossless_only=False)["drafter"]) == {"ngram (lossy)"}


@pytest.mark.parametrize(("drafter", "propose"), [("ngram", 0.0002), ("draft_model", 0.004)])
def test_expected_speedup_finds_the_cost_law(frame: pd.DataFrame, drafter: str, propose: float) -> None:
    expected = analysis.expected_speedup(frame)
    expected = expected[expected["drafter"] == drafter]
    for task, rate in TASKS.items():
        found = expected[expected["task"] == task].set_index("num_drafts")["speedup"]
        assert found.index.tolist() == [0, 1, 2, 3, 4]
        for depth in range(5):
            assert found[depth] == pytest.approx(true_speedup(rate, depth, propose), rel=0.12)


def test_best_num_drafts_is_the_optimum_of_the_law(frame: pd.DataFrame) -> None:
    best = analysis.best_num_drafts(analysis.expected_speedup(frame)).set_index(["drafter", "task"])["num_drafts"]
    for task, rate in TASKS.items():
        truth = {depth: true_speedup(rate, depth, 0.004) for depth in range(5)}
        assert truth[best["draft_model", task]] == pytest.approx(max(truth.values()), rel=0.03)
    assert best["draft_model", "chat"] < best["draft_model", "code"]


def test_the_depth_measured_is_predicted_as_measured(frame: pd.DataFrame) -> None:
    expected = analysis.expected_speedup(frame).query("drafter == 'draft_model' and task == 'code' and num_drafts == 4")
    measured = analysis.summary(frame).query("drafter == 'draft_model' and task == 'code'")
    assert expected["tau"].iloc[0] == pytest.approx(measured["tau"].iloc[0])
    assert expected["speedup"].iloc[0] == pytest.approx(measured["speedup"].iloc[0], rel=0.05)


def test_a_trace_without_a_drafter_has_no_draft_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no drafter but 'none'"):
        analysis.expected_speedup(analysis.load(write_trace(tmp_path, [row("none", 0, [0], 0)])))


def test_runs_stay_apart(run: Path, tmp_path: Path) -> None:
    other = write_trace(tmp_path / "other", rows(2, 20))
    table = analysis.summary(analysis.load([run, other]))
    alone = analysis.summary(analysis.load(other))
    pd.testing.assert_series_equal(
        table.loc[table["run"] == "other", "speedup"].reset_index(drop=True), alone["speedup"]
    )
    with pytest.raises(ValueError, match="repeat"):
        analysis.load([run, run])


def test_folders_that_are_no_run_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run folder was given"):
        analysis.load([])
    with pytest.raises(ValueError, match=r"there is no .*name a run folder"):
        analysis.load(tmp_path / "none")
    (tmp_path / analysis.CELLS).touch()
    with pytest.raises(ValueError, match=r"is the folder of a sweep: analysis\.load_sweep"):
        analysis.load([run, tmp_path])


def test_a_table_of_the_wrong_kind_is_named(frame: pd.DataFrame) -> None:
    for plot in (analysis.plot_acceptance, analysis.plot_steps, analysis.plot_breakdown):
        with pytest.raises(ValueError, match="no trace"):
            plot(analysis.summary(frame))
    for plot in (analysis.plot_speedup, analysis.plot_length):
        with pytest.raises(ValueError, match="no summary"):
            plot(frame)


def test_answers_that_end_at_their_first_token_are_drawn(tmp_path: Path) -> None:
    """No decode step was made, so there is nothing to show; the figures say so by being empty."""
    frame = analysis.load(write_trace(tmp_path, [row(name, 0, [], 2) for name in ("none", "ngram")]))
    for plot in (analysis.plot_acceptance, analysis.plot_steps, analysis.plot_breakdown):
        plot(frame).draw_without_rendering()
    assert analysis.picture(tmp_path).exists()
    with pytest.raises(ValueError, match="no step was measured; raise max_new_tokens"):
        analysis.expected_speedup(frame)


def test_figures_draw(run: Path, frame: pd.DataFrame, tmp_path: Path) -> None:
    table = analysis.summary(frame)
    figures = [
        analysis.plot_speedup(table),
        analysis.plot_acceptance(frame, task="code"),
        analysis.plot_steps(frame),
        analysis.plot_breakdown(frame),
    ]
    for number, figure in enumerate(figures):
        assert isinstance(figure, Figure)
        figure.savefig(tmp_path / f"{number}.png")
    speed = figures[0].axes[0]
    assert "95% interval" in speed.get_xlabel()
    assert speed.get_yticklabels()[0].get_text() == "chat (n=10)"
    points = speed.lines[0].get_xdata()
    assert sorted(points) == pytest.approx(sorted(table.query("drafter == 'ngram'")["speedup"]))


def test_a_step_in_one_piece_is_drawn(tmp_path: Path) -> None:
    """A CUDA graph has no times of its parts."""
    parts = {f"{part}_seconds": [None] * 3 for part in ("propose", "verify", "accept")}
    trace = [row("none", 0, [0] * 3, 0, step_seconds=[0.5] * 3, **parts)]
    axes = analysis.plot_breakdown(analysis.load(write_trace(tmp_path, trace))).axes[0]
    assert "one graph" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert max(bar.get_width() for bar in axes.patches) == pytest.approx(1)  # in steps of plain decoding


def test_a_shared_machine_gives_no_answer_about_time(frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="one run at a time"):
        analysis.expected_speedup(frame.assign(concurrent=True))
    assert analysis.best_drafter(analysis.summary(frame.assign(concurrent=True))).empty


@pytest.mark.parametrize("drafters", [["none"], ["none", "ngram"], ["ngram"]])
@pytest.mark.parametrize("shared", [False, True])
def test_the_picture_of_the_smallest_run(tmp_path: Path, drafters: list[str], shared: bool) -> None:
    trace = [row(name, 0, [0], 0 if name == "none" else 2, concurrent=shared) for name in drafters]
    write_trace(tmp_path, trace)
    assert analysis.picture(tmp_path).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))
