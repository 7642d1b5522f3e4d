"""Log-probabilities of emitted tokens: those of one forward over the finished text, whoever drafted and judged it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command import QUICK, CommandLine, check_mistake
from rich.console import Console
from synthetic_trace import row, rows, write_trace
from test_conformance import DRAFTERS

from specdec import load, metrics, report
from specdec.decoding import GenerationResult, RequestTrace, SamplingParams, SpeculativeDecoder, state
from specdec.drafter.layer_skip import LayerSkip
from specdec.drafter.ngram import NGram
from specdec.drafter.none import NoDraft
from specdec.drafter.token_recycling import TokenRecycling
from specdec.target.toy import Toy
from specdec.testing import ConformanceError, Replay, check_no_sync, syncs
from specdec.types import DraftTree
from specdec.verifier.rrs import RRS
from specdec.verifier.speculative_sampling import SpeculativeSampling
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.typical import Typical

PROMPTS = [[7, 8, 9, 7, 8, 9, 7, 8], [1], [30, 31] * 20, list(range(40, 57)), [7, 8, 9]]
NEW = 24
GREEDY, SAMPLED = SamplingParams(), SamplingParams(2.0, 100, 0.99)  # the second far from the target's own law
SAMPLINGS = {"greedy": GREEDY, "sampled": SAMPLED}


@cache
def toy(dtype: str = "float32", backend: str = "auto") -> Toy:
    return Toy(dtype=dtype, backend=backend)


def generate(drafter: Any, verifier: Any = None, sampling: SamplingParams = GREEDY, **options: Any) -> GenerationResult:
    """Five prompts in three rows, so that some wait; `options` are those of `generate`."""
    target = options.pop("target", None) or toy()
    decoder = SpeculativeDecoder(target, drafter, verifier or TargetOnly(), sampling, 3, logprobs=True)
    return decoder.generate(PROMPTS, **{"max_new_tokens": NEW, "seed": 5, "ignore_eos": True} | options)


@cache
def plain(law: str, dtype: str = "float32") -> GenerationResult:
    return generate(NoDraft(), sampling=SAMPLINGS[law], target=toy(dtype))


def replay(law: str, dtype: str = "float32", tree: bool = False) -> Replay:
    """Drafts of which the plain output of the same law takes about two thirds."""
    return Replay([p + t for p, t in zip(PROMPTS, plain(law, dtype).tokens, strict=True)], tree=tree)


def error(result: GenerationResult) -> float:
    """The largest difference from log_softmax of one forward over prompt and answer, on another backend."""
    target, worst = toy(backend="torch"), 0.0
    for prompt, tokens, found in zip(PROMPTS, result.tokens, result.logprobs, strict=True):
        text = torch.tensor(prompt + tokens)
        target.allocate(1, len(text), len(text))
        logits = target.verify(DraftTree.chain(text[:1], text[None, 1:])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, text[len(prompt) :, None]).squeeze(1)
        assert len(found) == len(tokens)
        worst = max(worst, float((torch.tensor(found) - wanted).abs().max()))
    return worst


# ---- the values ------------------------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[str], tuple[Any, Any]]] = {
    "plain": lambda law: (NoDraft(), TargetOnly()),
    "chain": lambda law: (replay(law), TargetOnly()),
    "tree": lambda law: (replay(law, tree=True), TargetOnly()),
    "observing": lambda law: (TokenRecycling(), TargetOnly()),
    "drawn": lambda law: (LayerSkip(1, 3), SpeculativeSampling()),
    "drawn tree": lambda law: (LayerSkip(1, structure=[2, 2]), RRS()),
    "lossy": lambda law: (LayerSkip(1, structure=[2, 2]), Typical(delta=0.9)),
}


@pytest.mark.parametrize("law", SAMPLINGS)
@pytest.mark.parametrize("method", METHODS)
def test_they_are_those_of_one_forward_over_the_text(method: str, law: str) -> None:
    """Whatever was warped: the sampled law is hotter than the target's, and cut off."""
    result = generate(*METHODS[method](law), SAMPLINGS[law])
    assert error(result) < 1e-4
    assert result.trace.acceptance_length > 1 or method == "plain"


@pytest.mark.parametrize("tree", [False, True])
def test_a_stop_or_the_limit_inside_a_draft_cuts_both(tree: bool) -> None:
    for at in range(3, 12):
        stopped = generate(replay("greedy", tree=tree), stop=[plain("greedy").tokens[0][at]])
        limited = generate(replay("greedy", tree=tree), max_new_tokens=at)
        assert max(error(stopped), error(limited)) < 1e-4
        cut = [r for run in (stopped, limited) for r in run.trace.requests if r.num_emitted]
        assert any(r.num_emitted[-1] <= r.num_accepted[-1] for r in cut)


@pytest.mark.parametrize("law", SAMPLINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafting_leaves_their_bits_alone(dtype: str, law: str) -> None:
    """On the compiled kernels, where verify equals decode."""
    wanted = plain(law, dtype)
    for tree in (False, True):
        drafted = generate(replay(law, dtype, tree), sampling=SAMPLINGS[law], target=toy(dtype))
        assert drafted.trace.acceptance_length > 1.5
        assert drafted.tokens == wanted.tokens
        assert drafted.logprobs == wanted.logprobs


def test_the_wrong_nodes_logits_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a tree's first nodes in place of its accepted path."""
    monkeypatch.setattr(state, "_along", lambda path, values: values[:, : path.shape[1]])
    assert error(generate(replay("greedy"))) < 1e-4  # of a chain they are the path
    assert error(generate(replay("greedy", tree=True))) > 1


def test_streaming_gives_them_too() -> None:
    decoder = SpeculativeDecoder(toy(), replay("greedy"), TargetOnly(), batch_size=3, logprobs=True)
    found: list[list[float]] = [[] for _ in PROMPTS]
    for chunk in decoder.stream(PROMPTS, NEW, ignore_eos=True):
        assert len(chunk.logprobs) == len(chunk.tokens)
        found[chunk.request] += chunk.logprobs
    assert found == plain("greedy").logprobs


def test_nothing_is_kept_unless_asked_for() -> None:
    decoder = SpeculativeDecoder(toy(), NGram(), TargetOnly())
    result = decoder.generate([[1, 2, 3]], 6)
    assert result.logprobs == [[]]
    assert "logprobs" not in result.trace.requests[0].as_row()
    assert decoder.record is not None
    assert decoder.record.shape[1] - state.RECORD_FIELDS in range(1, 6)  # tokens alone
    decoder.logprobs = True
    assert len(decoder.generate([[1, 2, 3]], 6).logprobs[0]) == 6


# ---- no host read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, make in DRAFTERS.items() if make().graphable])
def test_no_step_reads_on_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syncs, "SpeculativeDecoder", partial(SpeculativeDecoder, logprobs=True))
    check_no_sync(DRAFTERS[name](), TargetOnly())


def test_a_host_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the guard sees the step with log-probabilities."""
    monkeypatch.setattr(syncs, "SpeculativeDecoder", partial(SpeculativeDecoder, logprobs=True))
    honest = state._with_logprobs
    monkeypatch.setattr(state, "_with_logprobs", lambda record, logits: (logits.tolist(), honest(record, logits))[1])
    with pytest.raises(ConformanceError, match="on the host"):
        check_no_sync(NGram(), TargetOnly())


# ---- the figure ------------------------------------------------------------------------------------------------------


def with_logprobs(trace_row: dict[str, Any], *logprobs: float | None) -> dict[str, Any]:
    return {**trace_row, "logprobs": list(logprobs)}


def summary(folder: Path, trace: list[dict[str, Any]]) -> pd.DataFrame:
    table = metrics.summary(metrics.load_trace(write_trace(folder, trace)))
    return table.set_index(["drafter", "task"])


def test_nll_is_a_mean_over_tokens_and_its_excess_is_paired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LEAST", 2)  # requests that give an interval: as few as can be counted by hand
    lossy: Any = {"lossless": False, "verifier": "typical"}
    trace = [
        with_logprobs(row("none", 0, [0], 0, **lossy), -1.0, -2.0),
        with_logprobs(row("none", 1, [0], 0, **lossy), -6.0, -6.0),
        with_logprobs(row("none", 2, [0], 0, task="code", **lossy), -0.5, -0.5),
        with_logprobs(row("d", 0, [2], 2, **lossy), -2.0, -2.0, -2.0, -4.0),
        with_logprobs(row("d", 1, [0], 2, **lossy), -7.0, -7.0),
        with_logprobs(row("d", 2, [0], 2, task="code", **lossy), -0.5, -1.5),
        with_logprobs(row("d", 9, [0], 2, **lossy), -100.0, -100.0),  # the baseline has no such request
    ]
    table = summary(tmp_path, trace)
    assert table["nll"].tolist() == pytest.approx([15 / 4, 0.5, 16 / 6, 224 / 8, 1.0, 226 / 10])
    assert table["nll_excess"].tolist() == pytest.approx([0, 0, 0, 24 / 6 - 15 / 4, 0.5, 26 / 8 - 16 / 6])
    low, high = table.loc[("d", "chat"), ["nll_low", "nll_high"]]
    assert low < 28 < high
    assert table.loc["d", "nll_low"].isna().tolist() == [False, True, False]  # one request has no spread


def test_the_interval_of_a_constant_excess_is_that_constant(tmp_path: Path) -> None:
    """What requests have in common falls out: their own nll lies far apart."""
    trace = []
    for request, own in enumerate([0.1, 5.0, 2.0, 9.0, 1.0, 4.0]):
        trace.append(with_logprobs(row("none", request, [0], 0), -own, -own))
        trace.append(with_logprobs(row("d", request, [0], 1), -own - 0.25, -own - 0.25))
    found = summary(tmp_path, trace).loc[("d", "chat")]
    assert found[["nll_excess", "nll_excess_low", "nll_excess_high"]].tolist() == pytest.approx([0.25] * 3)
    assert found["nll_high"] - found["nll_low"] > 1


def test_traces_without_them_still_load_also_beside_others(tmp_path: Path) -> None:
    old = metrics.load_trace(write_trace(tmp_path / "old", [row("d", 0, [1], 1)]))
    new = metrics.load_trace(write_trace(tmp_path / "new", [with_logprobs(row("d", 0, [1], 1), -1.0, None, -3.0)]))
    assert "nll" not in metrics.summary(old)
    both = metrics.summary(pd.concat([old, new], ignore_index=True)).set_index("run")
    assert both.loc["old", "nll"].isna().all()
    assert both.loc["new", "nll"].tolist() == [2.0, 2.0]  # of the tokens that have one
    assert "nll" not in metrics.summary(pd.concat([old, new], ignore_index=True).query("run == 'old'"))


def test_a_logprob_that_is_no_number_becomes_null() -> None:
    request = RequestTrace(1, [2, 3], [float("nan"), -0.5])
    assert json.loads(json.dumps(request.as_row(), allow_nan=False))["logprobs"] == [None, -0.5]


@pytest.mark.parametrize("width", [80, 120])
def test_tables_show_it_where_it_was_kept(tmp_path: Path, width: int) -> None:
    drawn = np.random.default_rng(0)
    trace = [{**one, "logprobs": (-drawn.exponential(size=len(one["tokens"]))).tolist()} for one in rows(6, 20)]
    for name, kept in (("kept", trace), ("not", rows(6, 20))):
        table = metrics.summary(metrics.load_trace(write_trace(tmp_path / name, kept)))
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        report.print_summary(table, console)
        text, written = console.export_text(), report.markdown(table)
        assert max(map(len, text.splitlines())) <= width
        assert ("nll" in text, "nll" in written) == ((True, True) if name == "kept" else (False, False))
        assert len({line.count("|") for line in written.splitlines() if line.startswith("|")}) == 1
        if name == "kept":
            found = table[(table["drafter"] == "ngram") & (table["task"] == "code")].iloc[0]
            for shown in (text, written):
                assert f"{found['nll_excess']:.2f} [{found['nll_excess_low']:.2f}" in shown
                assert "-0.00" not in shown


# ---- the option ------------------------------------------------------------------------------------------------------


def test_the_command_line_keeps_and_reports_them(specdec: CommandLine) -> None:
    command = [*QUICK, "verifier=typical", "sampling.temperature=0.7", "run_dir=r"]
    done = specdec(*command, "logprobs=true")
    assert done.code == 0, done.err
    assert "nll excess" in done.out
    assert all(len(one["logprobs"]) == len(one["tokens"]) for one in specdec.rows("r/trace.jsonl"))
    written = json.loads((specdec.folder / "r/metrics.json").read_text())["summary"]
    assert all(one["nll"] > 0 for one in written)
    assert "| nll |" in (specdec.folder / "r/table.md").read_text()
    assert [len(x) for x in pd.read_parquet(specdec.folder / "r/trace.parquet")["logprobs"]] == [8] * 4
    check_mistake(specdec(*command), "r was started with another config: config.logprobs: True -> False")
    check_mistake(specdec(*command, "logprobs=some"), "logprobs='some' must be true or false")


def test_a_loaded_decoder_keeps_them() -> None:
    result = load("logprobs=true", "target=toy", "drafter=ngram").generate([1, 2, 3], 5, ignore_eos=True)
    assert [len(values) for values in result.logprobs] == [5]
