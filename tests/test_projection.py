"""The projection's accounting equals hand-made tables, its answers move the right way, and bad input gets one sentence."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.projection import (
    B200,
    EAGLE3_HEADS,
    H200,
    MAVERICK,
    Band,
    DraftHead,
    Machine,
    Model,
    Projection,
    Quantity,
    expected_experts,
    load_machine,
    load_measured,
    parse_measured,
)
from specdec.projection.__main__ import main
from specdec.projection.figure import figure
from specdec.projection.tables import Question, as_json, markdown, server_rows

# every number in here is made up, none was measured
MADE_UP: dict[str, Any] = {
    "source": "MADE-UP NUMBERS for tests",
    "machine": "h200",
    "ranks": 8,
    "runtimes": {
        "specdec": {
            "stub_us": 2.0,
            "stubs": 96,
            "overhead_us": [10, 20, 40],
            "rows": [
                {"batch": 1, "tokens": 1, "context": 1024, "us": [1000, 1010, 1030]},
                {"batch": 1, "tokens": 2, "context": 1024, "us": [1100, 1110, 1130]},
                {"batch": 1, "tokens": 4, "context": 1024, "us": [1290, 1300, 1330], "experts": 3.95},
                {"batch": 1, "tokens": 8, "context": 1024, "us": [1700, 1720, 1760], "experts": 7.8},
                {"batch": 16, "tokens": 1, "context": 1024, "us": 2600},
                {"batch": 16, "tokens": 4, "context": 1024, "us": 4900},
            ],
        },
        "other engine": {
            "stub_us": 0,
            "stubs": 0,
            "overhead_us": 0,
            "rows": [
                {"batch": 1, "tokens": 1, "context": 1024, "us": 5000},
                {"batch": 16, "tokens": 1, "context": 1024, "us": 6000},
            ],
        },
    },
    "all_reduce": {
        "gpus": 2,
        "rows": [
            {"bytes": 10240, "us": [4.4, 4.5, 4.7]},
            {"bytes": 40960, "us": [4.9, 5.0, 5.3]},
            {"bytes": 81920, "us": [5.6, 5.8, 6.2]},
        ],
    },
}
HEAD = EAGLE3_HEADS["bf16-full"]


def made_up(**changes: Any) -> Any:
    return parse_measured({**copy.deepcopy(MADE_UP), **changes})


def project(machine: Machine = H200, **changes: Any) -> Projection:
    return Projection(MAVERICK, HEAD, machine, made_up(**changes))


def scaled(machine: Machine, field: str, factor: float) -> Machine:
    old = getattr(machine, field)
    return replace(machine, **{field: Quantity(*(edge * factor for edge in old.edges), old.kind, old.source)})


def no_slower(a: Band, b: Band) -> bool:
    return all(x <= y * (1 + 1e-9) for x, y in zip(a.edges, b.edges, strict=True))


# ---- accounting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "tokens", "megabytes"),
    [
        (1024, 1, 2191),
        (1024, 2, 2566),
        (1024, 4, 3306),
        (1024, 8, 4752),
        (8192, 1, 2279),
        (8192, 4, 3394),
        (8192, 8, 4840),
    ],
)
def test_rank_bytes_of_maverick(context: int, tokens: int, megabytes: float) -> None:
    assert sum(MAVERICK.rank_bytes(tokens, context, 8).values()) / 1e6 == pytest.approx(megabytes, rel=0.005)


def test_parts_of_maverick() -> None:
    """By hand: FP8 shards of 896 + 640 rows of attention, 3 x 2048 dense, 3 x 1024 an expert, 1 KV head."""
    parts = MAVERICK.rank_bytes(4, 1024, 8, experts=3)
    assert parts == {
        "attention": 48 * 5120 * (896 + 640),
        "dense": 24 * 5120 * 3 * 2048,
        "shared": 24 * 5120 * 3 * 1024,
        "experts": 3 * 24 * 5120 * 3 * 1024,
        "router": 24 * 128 * 5120 * 2,
        "head": 25256 * 5120 * 2,
        "kv": 48 * 1024 * 2 * 128,
    }
    assert MAVERICK.rank_bytes(1, 1024, 8, batch=4)["kv"] == 4 * parts["kv"]
    assert MAVERICK.rank_bytes(1, 16384, 8)["kv"] == (12 * 16384 + 36 * 8192) * 256  # 36 layers see a chunk


@pytest.mark.parametrize(
    ("zipf", "experts"),
    [(0.0, (1, 1.99, 3.95, 7.79)), (1.0, (1, 1.95, 3.70, 6.79)), (1.2, (1, 1.90, 3.48, 6.09))],
)
def test_expected_experts(zipf: float, experts: tuple[float, ...]) -> None:
    found = [expected_experts(tokens, 128, zipf=zipf) for tokens in (1, 2, 4, 8)]
    assert found == pytest.approx(experts, rel=0.005)


@pytest.mark.parametrize(
    ("name", "step", "three"),
    [("bf16-full", 409, 1248), ("bf16-32k", 192, 595), ("fp8-full", 205, 624), ("fp8-32k", 96, 297)],
)
def test_draft_head_bytes(name: str, step: float, three: float) -> None:
    head = EAGLE3_HEADS[name]
    assert head.step_bytes(8) / 1e6 == pytest.approx(step, rel=0.005)
    assert head.rank_bytes(3, 8) / 1e6 == pytest.approx(three, rel=0.005)
    whole = replace(head, fc_sharded=False)
    assert whole.rank_bytes(3, 8) - head.rank_bytes(3, 8) == pytest.approx(7 / 8 * whole.fc_bytes(8))


def test_a_dense_model_from_its_config() -> None:
    """A toy: q 4 x 16, kv 2 x 16, I 128, V 1000, two layers; every weight once."""
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 1000}
    parts = Model.from_huggingface(config).rank_bytes(4, 10, 1)
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 64 * 1000
    assert sum(parts.values()) == 2 * weights + 2 * 10 * 2 * 2 * 16 * 2
    with pytest.raises(ValueError, match="lacks vocab_size"):
        Model.from_huggingface({key: value for key, value in config.items() if key != "vocab_size"})
    with pytest.raises(ValueError, match="num_local_experts = 8"):
        Model.from_huggingface({**config, "num_local_experts": 8})


def test_heads_must_split() -> None:
    with pytest.raises(ValueError, match="40 heads do not split over 7 GPUs"):
        MAVERICK.rank_bytes(1, 1024, 7)


# ---- the formula -----------------------------------------------------------------------------------------------------


def test_all_reduce_extends_what_was_measured() -> None:
    """On the measured GPUs the measured times come back; each further peer costs a + bytes / bw."""
    times = made_up().all_reduce
    for size, us in times.rows:
        two = replace(H200, gpus=2).all_reduce(size, times.start(size, H200))
        assert two.edges == pytest.approx(us.edges)
    eight = H200.all_reduce(40960, times.start(40960, H200))
    wire = [40960 / (rate * 1e3) for rate in (450, 405, 360)]
    expected = [4.9 + 6 * wire[0], 5.0 + 6 * (0.2 + wire[1]), 5.3 + 6 * (0.5 + wire[2])]
    assert eight.edges == pytest.approx(expected)
    assert H200.all_reduce(40960).mid == pytest.approx(6.1, abs=0.2)  # the planning value, nothing measured
    assert replace(H200, gpus=1).all_reduce(40960) == Band.exactly(0)


def test_large_messages_go_in_two_phases() -> None:
    """8 MB: 7 / 8 of it twice over the wire, not seven times."""
    size = 8e6
    assert H200.all_reduce(size).mid == pytest.approx(2 * (4.0 + 7 * (0.2 + size / 8 / 405e3)))


def test_step_time_by_hand() -> None:
    """Same machine: (measured - stubs) * skew + 96 all-reduces + the gather of the best token."""
    projection = project()
    rank = (1300 - 96 * 2.0) * 1.02
    assert projection.step_time(4, 1024).mid == pytest.approx(
        rank + 96 * projection.all_reduce_time(40960).mid + projection.all_reduce_time(32).mid
    )
    assert projection.step_time(6, 1024).mid == pytest.approx(  # between 4 and 8 tokens: half way, its own messages
        (1510 - 192) * 1.02 + 96 * projection.all_reduce_time(61440).mid + projection.all_reduce_time(48).mid
    )


def test_one_gpu_has_no_collectives() -> None:
    one = replace(H200, gpus=1)
    assert project(one, ranks=1).step_time(4, 1024).mid == pytest.approx(1300 - 192)


def test_another_memory_scales_the_bandwidth_bound_part() -> None:
    """b = bytes / (exposed BW) shrinks by the ratio of bandwidths, the rest of the step stays."""
    double = scaled(H200, "hbm_tb_s", 2)
    size = sum(MAVERICK.rank_bytes(4, 1024, 8, experts=3.95).values())
    saved = project().step_time(4, 1024).mid - project(double).step_time(4, 1024).mid
    assert saved == pytest.approx(1.02 * size / (0.79 * 4.37e6) / 2)
    endless = scaled(H200, "hbm_tb_s", 1e9)
    assert project(endless).step_time(4, 1024).low > 96 * 5  # all-reduces and launches remain


def test_modelled_drafter_by_hand() -> None:
    projection = project()
    size = 3 * HEAD.step_bytes(8) + HEAD.fc_bytes(8)
    rank = (size / (4.37e6 * 0.79) + 25 * 0.7) * 1.02
    reduces = 7 * projection.all_reduce_time(10240).mid + 3 * projection.all_reduce_time(8).mid
    assert projection.draft_time(3).mid == pytest.approx(rank + reduces)
    assert projection.draft_time(0) == Band.exactly(0)


def test_measured_drafter_takes_the_place_of_the_model() -> None:
    drafter = {"stub_us": 1, "stubs_per_step": 2, "rows": [{"batch": 1, "tokens": 3, "us": 400}]}
    projection = project(drafter=drafter)
    reduces = 7 * projection.all_reduce_time(10240).mid + 3 * projection.all_reduce_time(8).mid
    assert projection.draft_time(3).mid == pytest.approx((400 - 6) * 1.02 + reduces)


def test_shards_and_gpus_agree() -> None:
    with pytest.raises(ValueError, match="has 4 GPUs, the measured step is one of 8 shards"):
        project(replace(H200, gpus=4))


@pytest.mark.parametrize("machine", [H200, B200], ids=lambda machine: machine.name)
@pytest.mark.parametrize("drafts", [0, 1, 3, 5, 7])
def test_break_even_inverts_the_curve(machine: Machine, drafts: int) -> None:
    projection = project(machine)
    tps = projection.tokens_per_second(1.0, drafts, 1024)
    for edge, rate in zip(("low", "mid", "high"), tps.falling, strict=True):
        need = projection.break_even_acceptance_length(drafts, 1024, target_tps=rate)
        assert getattr(need, edge) == pytest.approx(1.0)


@pytest.mark.parametrize("tau", [0.9, 4.1])
def test_acceptance_length_within_the_drafts(tau: float) -> None:
    with pytest.raises(ValueError, match="drafts = 3 gives 1 to 4 tokens"):
        project().tokens_per_second(tau, 3, 1024)


factors = st.floats(1.0, 4.0)


@given(factor=factors, machine=st.sampled_from([H200, B200]), drafts=st.integers(0, 7))
@pytest.mark.parametrize("field", ["hbm_tb_s", "link_gb_s"])
def test_more_bandwidth_is_never_slower(field: str, factor: float, machine: Machine, drafts: int) -> None:
    faster = project(scaled(machine, field, factor)).iteration_time(drafts, 1024)
    assert no_slower(faster, project(machine).iteration_time(drafts, 1024))


@given(factor=factors, drafts=st.integers(0, 7))
@pytest.mark.parametrize("field", ["start_us", "peer_us", "boundary_us"])
def test_more_latency_is_never_faster(field: str, factor: float, drafts: int) -> None:
    measured = {key: value for key, value in MADE_UP.items() if key != "all_reduce"}
    slower = Projection(MAVERICK, HEAD, scaled(H200, field, factor), parse_measured(measured))
    now = Projection(MAVERICK, HEAD, H200, parse_measured(measured))
    assert no_slower(now.iteration_time(drafts, 1024), slower.iteration_time(drafts, 1024))


@given(taus=st.tuples(st.floats(1, 4), st.floats(1, 4)))
def test_higher_acceptance_length_is_never_slower(taus: tuple[float, float]) -> None:
    projection = project()
    low, high = (projection.tokens_per_second(tau, 3, 1024) for tau in sorted(taus))
    assert no_slower(low, high)


@given(
    size=st.floats(8, 1e8),
    gpus=st.tuples(st.integers(2, 16), st.integers(2, 16)),
    machine=st.sampled_from([H200, B200]),
)
def test_more_peers_are_never_faster(size: float, gpus: tuple[int, int], machine: Machine) -> None:
    few, many = (replace(machine, gpus=n).all_reduce(size) for n in sorted(gpus))
    assert no_slower(few, many)


def test_bands_are_ordered_and_open() -> None:
    with pytest.raises(ValueError, match="not 0 <= low <= mid <= high"):
        Band(2, 1, 3)
    for machine in (H200, B200):
        time = project(machine).iteration_time(3, 1024)
        assert time.low < time.mid < time.high


# ---- files -----------------------------------------------------------------------------------------------------------


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


OURS = ("runtimes", "specdec")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("ranks"), "measured.json lacks ranks"),
        (_set("rank", to=8), "measured.json has the unknown keys rank"),
        (_set("ranks", to=8.5), "ranks is 8.5: give a whole number"),
        (_set("machine", to="h300"), "machine 'h300' is neither a file nor one of h200, b200"),
        (lambda data: data["runtimes"].pop("specdec"), 'runtimes lacks "specdec"'),
        (_set(*OURS, to=3), "runtimes.specdec is 3: give an object"),
        (_set(*OURS, "rows", to=[]), "runtimes.specdec.rows is []: give a list"),
        (_set(*OURS, "rows", 2, "us", to="fast"), "runtimes.specdec.rows[2].us is 'fast': give a number"),
        (_set(*OURS, "rows", 2, "us", to=[3, 2, 1]), "runtimes.specdec.rows[2].us: [3.0, 2.0, 1.0] is not"),
        (_set(*OURS, "rows", 2, "us", to=float("nan")), "runtimes.specdec.rows[2].us: [nan"),
        (_set(*OURS, "rows", 2, "tokens", to=2), "runtimes.specdec.rows has batch/tokens/context 1/2/1024 twice"),
        (_set(*OURS, "stub_us", to=192), "stubs take 18432 us of a step of 1000 us"),
        (_set("all_reduce", "gpus", to=1), "all_reduce.gpus is 1: give a whole number of at least 2"),
        (_set("all_reduce", "rows", 1, "bytes", to=10240), "all_reduce.rows has bytes 10240 twice"),
    ],
)
def test_malformed_measurements(change: Callable[[Any], None], message: str) -> None:
    data = copy.deepcopy(MADE_UP)
    change(data)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_measured(data)
    assert "\n" not in str(error.value)


def test_what_was_not_measured_is_not_made_up() -> None:
    with pytest.raises(ValueError, match="nothing measured around batch/tokens/context 1/9/1024"):
        project().iteration_time(8, 1024)
    with pytest.raises(ValueError, match="1/4/8192"):
        project().iteration_time(3, 8192)
    drafter = {"stub_us": 1, "stubs_per_step": 2, "rows": [{"batch": 1, "tokens": 3, "us": 400}]}
    with pytest.raises(ValueError, match="drafter: nothing measured around batch/tokens/context 16/3/0"):
        project(drafter=drafter).iteration_time(3, 1024, batch=16)


def test_an_all_reduce_faster_than_its_wire_is_refused() -> None:
    impossible = {"gpus": 2, "rows": [{"bytes": 40960, "us": 0.1}]}
    with pytest.raises(ValueError, match="less than the"):
        project(all_reduce=impossible).step_time(4, 1024)


def machine_file(folder: Path, **changes: Any) -> str:
    names = ("hbm_tb_s", "exposed", "link_gb_s", "start_us", "peer_us", "boundary_us", "skew")
    made = {name: {"value": getattr(B200, name).mid, "kind": "assumed", "source": "made up"} for name in names}
    path = folder / "machine.json"
    path.write_text(json.dumps({"name": "mine", "gpus": 8, **made, **changes}))
    return str(path)


def test_a_machine_of_ones_own(tmp_path: Path) -> None:
    mine = load_machine(machine_file(tmp_path))
    assert mine.gpus == 8
    assert project(mine).step_time(4, 1024).mid == pytest.approx(project(B200).step_time(4, 1024).mid)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hbm_tb_s": 8}, "hbm_tb_s is 8: give an object"),
        ({"hbm_tb_s": {"value": 8, "kind": "guessed", "source": "x"}}, "hbm_tb_s.kind is 'guessed'"),
        ({"hbm_tb_s": {"value": 8, "kind": "assumed", "source": ""}}, "hbm_tb_s.source is ''"),
        ({"hbm_tb_s": {"value": 0, "kind": "assumed", "source": "x"}}, "hbm_tb_s of machine mine is 0"),
        ({"nvlink": 4}, "has the unknown keys nvlink"),
    ],
)
def test_malformed_machines(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_machine(machine_file(tmp_path, **changes))


@pytest.mark.parametrize("machine", [H200, B200], ids=lambda machine: machine.name)
def test_every_preset_number_says_where_it_comes_from(machine: Machine) -> None:
    numbers = [getattr(machine, name) for name in machine.__slots__]
    quantities = [number for number in numbers if isinstance(number, Quantity)]
    assert len(quantities) == len(numbers) - 2
    assert all(q.kind in ("measured", "published", "assumed") and q.source for q in quantities)


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_server_rows_and_ratios() -> None:
    projection = project()
    rows = {row["batch"]: row for row in server_rows(projection, 3, 1024, 2.8)}
    assert sorted(rows) == [1, 16]
    plain = rows[16]["tokens_per_second"]["specdec, plain"]
    assert plain.mid == pytest.approx(16e6 / projection.iteration_time(0, 1024, 16).mid)
    ours = rows[16]["tokens_per_second"]["specdec, 3 drafts"]
    assert rows[16]["ratios"]["specdec, plain"].mid == pytest.approx(ours.mid / plain.mid)
    assert rows[1]["ratios"]["other engine, plain"].mid > rows[1]["ratios"]["specdec, plain"].mid > 1
    assert "other engine, 3 drafts" not in rows[1]["tokens_per_second"]
    assert server_rows(projection, 3, 8192, 2.8) == []


def test_a_batch_that_answers_nothing_is_left_out() -> None:
    data = copy.deepcopy(MADE_UP)
    data["runtimes"]["specdec"]["rows"].append({"batch": 32, "tokens": 2, "context": 1024, "us": 6000})
    projection = Projection(MAVERICK, HEAD, H200, parse_measured(data))
    assert [row["batch"] for row in server_rows(projection, 3, 1024, 2.8)] == [1, 16]
    assert "| 16 |" in markdown(projection, Question((3,), 1024))


def test_markdown_says_what_it_stands_on() -> None:
    text = markdown(project(B200), Question((1, 3), 1024))
    for part in ("MADE-UP NUMBERS", "8 x B200", "72,000", "1,000 TPS/user", "assumed", "published", "2.94", "gsm8k"):
        assert part in text
    with pytest.raises(ValueError, match="nothing measured"):
        markdown(project(B200), Question((9,), 1024))


def test_json_holds_the_curve() -> None:
    projection = project()
    data = json.loads(json.dumps(as_json(projection, Question((3,), 1024))))
    curve = data["by_drafts"]["3"]["curve"]
    assert [point["acceptance_length"] for point in curve] == [1 + i / 4 for i in range(13)]
    assert curve[-1]["mid"] == pytest.approx(projection.tokens_per_second(4, 3, 1024).mid)
    assert data["machine"]["hbm_tb_s"]["kind"] == "measured"


def test_the_figure_shows_the_record_once() -> None:
    drawn = figure([project(H200), project(B200)], Question((1, 3), 1024))
    labels = [ax.get_legend_handles_labels()[1] for ax in drawn.axes]
    assert [sum("record" in label for label in panel) for panel in labels] == [0, 3]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(MADE_UP))
    assert load_measured(path) == made_up()
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    main([str(path), "--machine", "h200", machine_file(tmp_path), "--json", str(out), "--png", str(png)])
    printed = capsys.readouterr().out
    assert "on 8 x H200" in printed
    assert "on mine" in printed
    assert [entry["machine"]["name"] for entry in json.loads(out.read_text())] == ["8 x H200", "mine"]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_command_line_refuses(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    with pytest.raises(ValueError, match="is not a file"):
        main([str(path)])
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        main([str(path)])
    with pytest.raises(ValueError, match="--drafts 0"):
        main([str(path), "--drafts", "0"])


def test_another_model() -> None:
    """Nothing in the formula is Maverick's alone: bytes of the toy by hand, at the middle bandwidth."""
    model, head = Model("toy", 64, 2, 4, 4, 16, 1000, 128), DraftHead("toy", 64, 4, 4, 16, 128, 1000, 1)
    projection = Projection(model, head, replace(H200, gpus=4), made_up(ranks=4))
    forward = 2 * (64 * 64 * 4 + 3 * 64 * 128) / 4 + 64 * 1000 * 2 / 4 + 2 * 10 * 2 * 16
    draft = 3 * 64 * 64 / 4 + 2 * (64 * 64 * 7 + 3 * 64 * 128 + 64 * 1000) / 4
    assert projection.floor(3, 10, drafts=2) == pytest.approx((forward + draft) / 4.37e6)
