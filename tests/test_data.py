"""Prompts: the shipped ones, the JSONL and Hugging Face sources, the options, and chat encoding."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from specdec.data import Conversation, Jsonl, Prompts
from specdec.decoding.chat import encode, messages, template_name

TASKS = {"chat", "translation", "summarization", "qa", "math", "rag", "code", "multi_turn"}


def write_jsonl(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def record(qid: int, category: str, *turns: str, **more: Any) -> dict[str, Any]:
    return {"question_id": qid, "category": category, "turns": list(turns) or ["hello"], **more}


def test_shipped_prompts() -> None:
    prompts = Prompts().load()
    assert len(prompts) == 30
    assert {c.task for c in prompts} == TASKS
    assert min(Counter(c.task for c in prompts).values()) >= 3
    assert all(len(c.turns) == (2 if c.task == "multi_turn" else 1) for c in prompts)
    for c in prompts:
        words = max(len(turn.split()) for turn in c.turns)
        assert 120 <= words <= 260 if c.task in {"summarization", "rag"} else words < 120


def test_options_narrow_in_file_order(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *(record(i, "qa" if i % 3 else "rag", "x", "y") for i in range(1, 10)))
    ids = lambda **options: [int(c.question_id) for c in Jsonl(path, **options).load()]  # noqa: E731
    assert ids() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert ids(limit=2) == [1, 2]
    assert ids(per_task=2) == [1, 2, 3, 6]
    assert ids(per_task=2, limit=3) == [1, 2, 3]
    assert ids(tasks=["rag"]) == ids(tasks="rag") == [3, 6, 9]
    assert ids(half="odd") == [1, 3, 5, 7, 9]
    assert ids(half="even", tasks="rag") == [6]
    assert [len(c.turns) for c in Jsonl(path, limit=1).load() + Jsonl(path, limit=1, turns=1).load()] == [2, 1]


def test_spec_bench_categories(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "bench.jsonl",
        record(1, "writing"),
        "",
        record(2, "math_reasoning"),
        record(3, "coding", task="code", language="de"),
    )
    assert Jsonl(path).load() == [
        Conversation("1", "mt_bench", "writing", "en", ["hello"]),
        Conversation("2", "math_reasoning", "math_reasoning", "en", ["hello"]),
        Conversation("3", "code", "coding", "de", ["hello"]),
    ]


def test_lines_of_other_shapes(tmp_path: Path) -> None:
    """A prompt, as serving benchmarks have it, or a chat; the line's number and the file's name stand in for the rest."""
    chat = [("system", "be brief"), ("user", "hi"), ("assistant", "no"), ("user", "bye")]
    path = write_jsonl(
        tmp_path / "math.jsonl",
        {"prompt": "one", "output_tokens": 9},
        "",
        {"messages": [{"role": role, "content": content} for role, content in chat]},
        {"prompt": "two", "turns": ["a", "b"], "category": "qa", "question_id": "x"},
    )
    assert Jsonl(path).load() == [
        Conversation("1", "math", "math", "en", ["one"]),  # not MT-bench's category
        Conversation("3", "math", "math", "en", ["hi", "bye"]),
        Conversation("x", "qa", "qa", "en", ["a", "b"]),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"turns": [', "line 2: not valid JSON"),
        ("[1]", "line 2: expected a JSON object, found list"),
        (
            {"question_id": 2, "category": "qa"},
            "line 2: there is no turns, prompt, messages, one of which is needed; it has",
        ),
        (record(2, "qa", "  "), "line 2: turns must be a text, a list of texts or chat messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "line 2: messages must be .* with a user's, not"),
        (
            {"question_id": 2, "task": "all", "turns": "x"},
            "the task of question 2 is called 'all', as is the row over all",
        ),
        (record(1, "qa"), "question_id 1 more than once"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", record(1, "qa"), line)
    with pytest.raises(ValueError, match=message):
        Jsonl(path).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["qa", "poetry"]}, "no task 'poetry'; it has qa, rag"),
        ({"limit": 0}, "limit is 0; give at least 1"),
        ({"per_task": -1}, "per_task is -1"),
        ({"half": "third"}, "half is 'third'"),
        ({"half": "even"}, "no conversation left"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", record(1, "qa"), record(3, "rag"))
    with pytest.raises(ValueError, match=message):
        Jsonl(path, **options).load()


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no prompt file"):
        Jsonl(tmp_path / "none.jsonl").load()
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty: give it at least one"):
        Jsonl(write_jsonl(tmp_path / "empty.jsonl")).load()
    with pytest.raises(ValueError, match=r"whole-number question_ids, but .* has 'a1'"):
        Jsonl(write_jsonl(tmp_path / "a.jsonl", record(1, "qa") | {"question_id": "a1"}), half="odd").load()


def load_config(name: str, *overrides: str) -> list[Conversation]:
    with initialize_config_module("specdec.conf", version_base=None):
        config = compose(overrides=[f"+dataset={name}", *overrides])
    return list(instantiate(config.dataset).load())


def test_configs_instantiate(tmp_path: Path) -> None:
    assert len(load_config("prompts", "dataset.per_task=1", "dataset.tasks=[qa,code]")) == 2
    path = write_jsonl(tmp_path / "a.jsonl", record(1, "qa"), record(2, "qa"))
    assert len(load_config("jsonl", f"dataset.path={path}", "dataset.limit=1")) == 1


def test_huggingface_reads_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "bye"},
    ]
    path = write_jsonl(
        tmp_path / "rows.json",
        {"text": "one", "turns": ["a", "b"], "chat": chat, "kind": "qa"},
        {"text": "two", "turns": ["c"], "chat": chat[:1], "kind": "rag"},
    )
    common = ("dataset.name=json", f"dataset.data_files={path}")
    rows = load_config("huggingface", *common, "dataset.column=text", "dataset.task=plain")
    assert rows == [
        Conversation("0", "plain", "plain", "en", ["one"]),
        Conversation("1", "plain", "plain", "en", ["two"]),
    ]
    rows = load_config("huggingface", *common, "dataset.column=turns", "dataset.task_column=kind", "dataset.tasks=rag")
    assert rows == [Conversation("1", "rag", "rag", "en", ["c"])]
    rows = load_config("huggingface", *common, "dataset.column=chat")
    assert [c.turns for c in rows] == [["hi", "bye"], ["hi"]]
    with pytest.raises(ValueError, match="no column 'prompt'; it has text, turns, chat, kind"):
        load_config("huggingface", *common, "dataset.column=prompt")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_config("huggingface", "dataset.name=json", "dataset.data_files=/none.json", "dataset.column=x")


class CharTokenizer:
    """One id a character; a template with visible borders."""

    def __init__(self, chat_template: str | None = "T") -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, chat: Sequence[Any], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{m['role'][0]}>{m['content']}" for m in chat) + "<a>"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(c) for c in text]


def test_encode_applies_the_template_once() -> None:
    tokenizer = CharTokenizer()
    text = lambda prompt, **more: "".join(map(chr, encode(tokenizer, prompt, **more)))  # noqa: E731
    assert text("hi") == "<u>hi<a>"
    assert text(messages(["hi", "bye"], ["yes"])) == "<u>hi<a>yes<u>bye<a>"
    assert text("hi", template=False) == "\x01hi"
    assert encode(tokenizer, [5, 6, 7]) == [5, 6, 7]


def test_encode_refuses() -> None:
    for empty in ("", "  \n", []):
        with pytest.raises(ValueError, match="prompt is empty"):
            encode(CharTokenizer(), empty)
    with pytest.raises(ValueError, match=r"CharTokenizer.* has no chat template"):
        encode(CharTokenizer(None), "hi")
    with pytest.raises(ValueError, match="need the chat template"):
        encode(CharTokenizer(), messages(["hi"]), template=False)
    with pytest.raises(ValueError, match="2 answers to 2 turns"):
        messages(["a", "b"], ["x", "y"])


def test_messages_end_with_the_turn_to_answer() -> None:
    assert messages(["a", "b", "c"]) == [{"role": "user", "content": "a"}]
    assert [m["content"] for m in messages(["a", "b", "c"], ["x"])] == ["a", "x", "b"]


def test_template_name_tells_templates_apart() -> None:
    names = {template_name(CharTokenizer(t)) for t in ("T", "U", None)}
    assert len(names) == 3
    assert "none" in names
