"""The benchmark against transformers, on a tiny random model: it measures, goes on where it stopped, renders again."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # its files import one another as scripts do
bench, report, cpu_decoding = (importlib.import_module(name) for name in ("_bench", "_cpu_report", "cpu_decoding"))
forward = importlib.import_module("_forward")

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
