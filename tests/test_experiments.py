"""The benchmark against transformers, on a tiny random model: it measures, goes on where it stopped, renders again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec.projection.measured import load_measured

bench, report, cpu_decoding = (importlib.import_module(name) for name in ("_bench", "_cpu_report", "cpu_decoding"))
forward = importlib.import_module("_forward")
gpu_decoding, maverick_shard = (importlib.import_module(name) for name in ("gpu_decoding", "maverick_shard"))
gpu_forward, gpu_report, gpu_steps = (
    importlib.import_module(f"_gpu_{name}") for name in ("forward", "report", "steps")
)

NEW, DRAFTERS = 6, ["none", "ngram", "ngram_no_match"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a checkpoint of random weights with a byte tokenizer, and three prompts of two tasks."""
    folder = tmp_path_factory.mktemp("tiny")
    tokens = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}:"
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    prompts = [("1", "qa", "Who? Who? Who?"), ("2", "qa", "Why so?"), ("3", "math", "1 + 1 + 1 + 1 + 1")]
    lines = [json.dumps({"question_id": i, "category": task, "turns": [text, "more"]}) for i, task, text in prompts]
    (folder / "three.jsonl").write_text("\n".join(lines))
    return [
        f"dataset.path={folder / 'three.jsonl'}", f"checkpoint={folder / 'model'}", f"max_new_tokens={NEW}", "passes=2",
        "dtypes=[float32]", f"drafters=[{','.join(DRAFTERS)}]", "batch=2", "repeats=1",
    ]  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and products of toy size."""
    monkeypatch.setattr(forward, "TOKENS", (1, 3))
    monkeypatch.setattr(forward, "CONTEXT", 8)
    monkeypatch.setattr(forward, "COLD", 2**16)
    monkeypatch.setattr(forward, "reader", lambda: bench.reader(1))


def results(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "cpu_decoding.json").read_text())
    return document


@pytest.mark.usefixtures("small")
def test_measures_everything(options: list[str], tmp_path: Path) -> None:
    cpu_decoding.main([*options, f"results={tmp_path}"])
    document = results(tmp_path)
    decode = [row for row in document["rows"] if row["section"] == "decode"]
    assert len(decode) == 2 * 3 * (2 + len(DRAFTERS))
    for row in decode:
        assert row["prefill_seconds"] > 0 < row["decode_seconds"]
        if "lookup" not in row["runtime"]:  # its first forward may bring several tokens
            assert row["decode_tokens"] == NEW - 1
    digests = {(row["question"], row["runtime"]): row["digests"][0] for row in decode}
    for (question, _), digest in digests.items():  # float32: what is drafted changes nothing, in either runtime
        assert digest == digests[question, "transformers"]
    batches = [row for row in document["rows"] if row["section"] == "batch"]
    assert [len(row["digests"]) for row in batches] == [2] * 4
    assert {row["product"] for row in document["rows"] if row["section"] == "product"} == {
        "qkv", "o", "gate_up", "down", "head",
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu_decoding.json", "cpu_decoding.md"]
    assert str(tmp_path.parent) not in json.dumps(document)  # names of files, never where they lie
    written = (tmp_path / "cpu_decoding.md").read_text()
    for heading in ("## Decode speed", "finds nothing", "## Batches of 2", "What a forward", "What equal bits"):
        assert heading in written
    (tmp_path / "cpu_decoding.md").unlink()
    cpu_decoding.main(["--render", f"results={tmp_path}"])
    assert (tmp_path / "cpu_decoding.md").read_text() == written


def test_goes_on_where_it_stopped(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*options, "passes=1", "sections=[decode]", f"results={tmp_path}"]
    real, calls = cpu_decoding.run_ours, 0

    def dies(*args: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == len(DRAFTERS) + 5:  # behind the warm-up
            raise RuntimeError("power cut")
        return dict(real(*args))

    monkeypatch.setattr(cpu_decoding, "run_ours", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        cpu_decoding.main(arguments)
    journal = tmp_path / "cpu_decoding.partial.jsonl"
    first = journal.read_text().splitlines()
    assert not (tmp_path / "cpu_decoding.json").exists()
    with journal.open("a") as file:
        file.write('{"key": "decode/0/')  # a line that was being written
    with pytest.raises(ValueError, match="max_new_tokens"):
        cpu_decoding.main([*arguments, "max_new_tokens=7"])
    cpu_decoding.main(arguments)
    document = results(tmp_path)
    assert len(document["sessions"]) == 2
    keys = [row["key"] for row in document["rows"]]
    assert len(keys) == len(set(keys)) == 3 * (2 + len(DRAFTERS))
    kept = [row for row in map(json.loads, first[1:]) if row["section"] == "decode"]
    assert 0 < len(kept) < len(keys)
    assert document["rows"][: len(kept)] == kept


def test_tables_say_what_was_measured(tmp_path: Path) -> None:
    """Ours takes half the decode time on one prompt, a fifth on the other; one output differs."""

    def row(runtime: str, question: str, seconds: float, digest: str) -> dict[str, Any]:
        sums = {"decode_seconds": seconds, "decode_tokens": 10, "prefill_seconds": 1.0, "steps": 5}
        counts = {"whole_tokens": 10, "whole_steps": 5, "verify_seconds": 0.9 * seconds, "digests": [digest]}
        key = {"section": "decode", "dtype": "float32", "runtime": runtime, "pass": 0, "question": question}
        return {**key, "task": "qa", **sums, **counts}

    rows = [row("transformers", q, 10.0, q) for q in "ab"]
    rows += [row("specdec none", "a", 5.0, "a"), row("specdec none", "b", 2.0, "z")]
    here: dict[str, Any] = {
        "versions": {},
        "git": None,
        "load": 0.0,
        "cpu": "c",
        "cores": 2,
        "threads": 2,
        "date": "2026-01-01T00",
        "command": "x",
    }
    setup = {"checkpoint": "m", "max_new_tokens": 11, "prompts": 2, "dataset": {"path": "f"}, "passes": 1}
    text = report.render({"setup": setup, "sessions": [here], "rows": rows})
    ours = next(line for line in text.splitlines() if line.startswith("| specdec none"))
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells[1:3] == ["3.50 [2.00, 5.00]", "2.86"]  # median of 2 and 5; 20 / 7
    assert cells[3] == "2.44"  # (20 + 2) / (7 + 2)
    assert cells[4:] == ["1.00 [1.00, 1.00]; 2/2", "2.00", "2/2", "1/2", "10.0%"]


def test_interval_holds_the_median() -> None:
    median, low, high = bench.median_interval([1.0, 2.0, 3.0, 4.0, 10.0])
    assert median == 3.0
    assert 1.0 <= low < 3.0 < high <= 10.0
    assert bench.ratios([2.0]) == "2.00"
    assert bench.ratios([]) == "–"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sectoins=[decode]"], "sectoins"),
        (["sections=[speed]"], "speed"),
        (["sections=[batch]"], "batch 1"),
        (["passes=0"], "passes"),
    ],
)
def test_mistakes_are_said(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        cpu_decoding.main(arguments)


# ---- GPU benchmarks, on the CPU --------------------------------------------------------------------------------------


def load(folder: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return document


GPU_SMALL = [
    "device=cpu", "dtype=float32", "drafters=[none,ngram]", "batches=[1,3]", "tokens=[1,3,4]", "contexts=[8,20]",
    "prefill_tokens=[9]", "prefill_chunks=[4,16]", "fp8_prompts=2", "read_megabytes=1", "matmul=32", "profile_steps=2",
]  # fmt: skip


@pytest.fixture
def gpu_options(options: list[str]) -> list[str]:
    """The tiny checkpoint and prompts with toy settings of every section."""
    shared = [o for o in options if o.split("=")[0] in ("dataset.path", "checkpoint", "max_new_tokens", "passes")]
    return [*shared, *GPU_SMALL, "repeats=1"]


def test_gpu_decoding_measures_every_section(gpu_options: list[str], tmp_path: Path) -> None:
    where = f"results={tmp_path}"
    gpu_decoding.main([*gpu_options, where, "sections=[decode,bits]"])
    gpu_decoding.main(
        [*gpu_options, where, "sections=[ceiling,batch,forward,host,prefill,fp8,bits]"]
    )  # adds to the rows
    document = load(tmp_path, "gpu_decoding")
    by: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        by.setdefault(row["section"], []).append(row)
    assert {name: len(rows) for name, rows in by.items()} == {
        "ceiling": 1, "decode": 2 * 3 * 2, "batch": 2 * 2 * 2, "forward": 2 * 3, "host": 2, "prefill": 2, "fp8": 4,
        "bits": 3 + 2 + 3,
    }  # fmt: skip
    assert len(document["sessions"]) == 2
    assert all(row["differing"] == 0 < row["compared"] for row in by["bits"])
    digests: dict[str, set[str]] = {}
    for row in by["decode"]:
        assert row["decode_tokens"] == NEW - 1
        digests.setdefault(row["question"], set()).update(row["digests"])
    assert all(len(different) == 1 for different in digests.values())
    for row in by["fp8"]:
        assert row["tokens"] == NEW
        assert row["kl"] > 0 <= row["agree"] <= NEW
    small, large = (next(r["bytes"] for r in by["forward"] if r["context"] == c) for c in (8, 20))
    assert large - small == 12 * 2 * 2 * 32 * 4  # two layers, keys and values, one head of 32, float32
    written = (tmp_path / "gpu_decoding.md").read_text()
    for heading in ("Ceilings", "Decode speed", "Batches", "A forward of M", "The host", "Prefill", "FP8", "Bits"):
        assert f"## {heading}" in written
    assert "| chain | 1, 3, 4 | 0/3 | 0/8 |" in written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_decoding.json", "gpu_decoding.md"]
    assert str(tmp_path.parent) not in json.dumps(document)
    (tmp_path / "gpu_decoding.md").unlink()
    gpu_decoding.main(["--render", where])
    assert (tmp_path / "gpu_decoding.md").read_text() == written


def test_bits_are_told_apart(gpu_options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A target whose logits depend on how many tokens share a forward is caught, in every shape."""
    benchmark = gpu_decoding.Benchmark(gpu_decoding.parse(gpu_options))
    real = benchmark.target.verify

    def faulty(tree: Any) -> Any:
        output = real(tree)
        output.logits[..., 7] += 1e-3 * (tree.tokens.numel() > 1)
        return output

    monkeypatch.setattr(benchmark.target, "verify", faulty)
    found = {shape: gpu_forward.bits_row(benchmark.target, shape, 4, 8, 4) for shape in ("chain", "tree", "batch")}
    assert {shape: (row["differing"], row["compared"]) for shape, row in found.items()} == {
        "chain": (4, 4), "tree": (3, 3), "batch": (4, 4),
    }  # fmt: skip


def test_gpu_tables_say_where_drafting_stops_paying() -> None:
    """By the speed while all rows run: to the last row a batch waits for its slowest one."""
    rows = [
        {
            "section": "batch", "batch": size, "drafter": name, "pass": 0, "digests": ["x"] * size, "steps": 5,
            "prefill_seconds": 1.0, "decode_tokens": 10 * size, "decode_seconds": seconds, "whole_tokens": 8, "whole_steps": 4,
            "full_tokens": 9 * size, "full_seconds": full,
        }
        for size, name, seconds, full in [
            (1, "none", 4.0, 3.6), (1, "ngram", 2.0, 1.8), (2, "none", 4.0, 3.6), (2, "ngram", 5.0, 3.0),
            (3, "none", 4.0, 3.6), (3, "ngram", 6.0, 4.5),
        ]
    ]  # fmt: skip
    text = gpu_report._batch(rows)
    assert "ngram stops paying at batch 3." in text
    assert "| 1 | ngram | 5 | 2.00 | 5 | 2.00 | 2.00 | 1/1 |" in text
    assert "| 2 | ngram | 4 | 0.80 | 6 | 1.20 | 2.00 | 2/2 |" in text
    older = [{key: value for key, value in row.items() if not key.startswith("full_")} for row in rows]
    assert "stops paying" not in gpu_report._batch(older)
    assert "| 2 | ngram | 4 | 0.80 | 2.00 | 2/2 |" in gpu_report._batch(older)


def test_kernels_own_times_and_bytes() -> None:
    """Two steps of three kernels, of which the second begins before the first ends."""
    work, steps = gpu_steps.Work, 2
    works = [
        work(name, begin + 100 * step, end + 100 * step)
        for step in range(steps)
        for name, begin, end in (("linear_kernel", 0, 10), ("attention_kernel", 4, 16), ("linear_kernel", 20, 50))
    ]
    summary = gpu_steps.summary(works, steps)
    assert (summary["kernels"], summary["kernel_us"], summary["busy_us"], summary["span_us"]) == (3, 52, 46, 75)
    assert summary["idle"] == pytest.approx(1 - 92 / 150)
    rows = gpu_steps.kernel_rows(works, steps, [("qkv", 500), ("head", 900)], {"attention_kernel": 60})
    assert [(r["name"], r["calls"], r["us"], r["duration_us"], r["bytes"]) for r in rows] == [
        ("linear_kernel head", 1, 30, 30, 900),
        ("linear_kernel qkv", 1, 10, 10, 500),
        ("attention_kernel", 1, 6, 12, 60),
    ]
    unknown = gpu_steps.kernel_rows(works, steps, [("qkv", 500)] * 3, {})
    assert [(r["name"], r["bytes"]) for r in unknown] == [("linear_kernel", None), ("attention_kernel", None)]


SHARD_SMALL = [
    "sizes.hidden_size=64", "sizes.intermediate_size=128", "sizes.intermediate_size_mlp=256", "sizes.head_dim=32",
    "sizes.num_attention_heads=8", "sizes.vocab_size=256", "sizes.num_local_experts=4", "sizes.attention_chunk_size=64",
    "layers=2", "device=cpu", "tokens=[1,3]", "contexts=[48]", "steps=8", "profile_steps=2", "read_megabytes=1", "matmul=32",
]  # fmt: skip


def test_maverick_shard_measures_and_projects(tmp_path: Path) -> None:
    maverick_shard.main([*SHARD_SMALL, f"results={tmp_path}"])
    rows = load(tmp_path, "maverick_shard")["rows"]
    steps = {(row["tokens"], row["routing"]): row for row in rows if row["section"] == "step"}
    assert set(steps) == {(1, "one"), (3, "one"), (3, "uniform"), (3, "distinct")}
    assert [steps[3, name]["experts"] for name in ("one", "distinct")] == [1, 3]
    assert 1 <= steps[3, "uniform"]["experts"] <= 3
    assert steps[3, "uniform"]["expected_experts"] == pytest.approx(4 * (1 - (3 / 4) ** 3))
    inner, scales = 128 // 8, 4 * (2 * 128 // 8 + 64)  # of one routed expert on this rank: channels, f32 scales
    more = steps[3, "distinct"]["bytes"] - steps[3, "one"]["bytes"]
    assert more == 2 * (3 * 64 * inner + scales)
    for row in steps.values():
        assert row["us"]["count"] == row["steps"] - gpu_steps.WARM
        assert row["us"]["p10"] <= row["us"]["median"] <= row["us"]["p90"]
        assert row["emitted"] == 8 + gpu_steps.WARM + 1
    assert sum(row["section"] == "profile" for row in rows) == 4
    text = (tmp_path / "maverick_shard.md").read_text()
    assert "## Steps" in text
    assert "### context 48, M = 3, uniform" in text
    measured = load_measured(tmp_path / "measured.json")
    assert measured.ranks == 8
    assert [(r.tokens, r.context) for r in measured.runtimes["specdec"].rows] == [(1, 48), (3, 48)]
    assert "only 2 layers" in measured.source


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("gpu_decoding", ["sections=[product]"], "product"),
        ("gpu_decoding", ["drafters=[ngram]"], "none"),
        ("gpu_decoding", ["passes=0"], "passes"),
        ("maverick_shard", ["routings=[two]"], "two"),
        ("maverick_shard", ["tokens=[65]"], "65"),
        ("maverick_shard", ["contexts=[100]"], "contexts"),
    ],
)
def test_gpu_mistakes_are_said(script: str, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        importlib.import_module(script).main(arguments)


# ---- exchange --------------------------------------------------------------------------------------------------------

exchange = importlib.import_module("exchange")


def test_exchange_needs_a_gpu_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no GPU"):
        exchange.main([f"results={tmp_path}"])
    with pytest.raises(SystemExit, match="turns"):
        exchange.main(["turns=3"])


def test_exchange_table(tmp_path: Path) -> None:
    """What an exchange adds to a round, by way and place."""
    setup = {"hidden": 5120, "rounds": 16, "repeats": 3, "tokens": [1, 4], "world": 2, "on_streams": False}
    rows = [
        {
            "place": place, "tokens": m, "way": way, "bytes": m * 10240, "fastest": 1.0,
            "us": {"median": 3.0 + m + us, "p10": 2.0, "p90": 9.0},
        }
        for place in exchange.PLACES for m in (1, 4) for way, us in (("no exchange", 0.0), ("NCCL", 20.0), ("direct", 1.5))
    ]  # fmt: skip
    document = {"setup": setup, "sessions": [bench.session("experiments/exchange.py", [])], "rows": rows}
    (tmp_path / "exchange.json").write_text(json.dumps(document))
    exchange.main(["--render", f"results={tmp_path}"])
    text = (tmp_path / "exchange.md").read_text()
    assert text.count("| 20.0 | 1.5 |") == 4
    assert "| 4 | 41 |" in text
    assert "2 ranks, GPUs" in text
