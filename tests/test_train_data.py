"""Training text: written by the target, resumable to the byte, split and batched the same every time; features; vocabulary."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from specdec.data import Conversation, Dataset
from specdec.decoding.chat import encode, messages
from specdec.drafter.ngram import NGram
from specdec.target.toy import ByteTokenizer, Toy
from specdec.train import (
    CachedFeatures,
    Corpus,
    DatasetText,
    Features,
    Recipe,
    SelfText,
    cache_features,
    coverage,
    draft_vocabulary,
    shards,
    special_tokens,
    write_corpus,
)  # fmt: skip
from specdec.train.turns import opening

SOURCE = SelfText(rounds=2, min_turn=1, max_turn=24)
RECIPE = Recipe(seed=5, conversations=24, max_answer=24)


class Given(Dataset):
    """A dataset of these questions, one or more turns each."""

    def __init__(self, *questions: list[str]) -> None:
        super().__init__()
        self.questions = questions

    def read(self) -> Iterable[Conversation]:
        return [Conversation(str(i), "qa", "qa", "en", turns) for i, turns in enumerate(self.questions)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if "lock" not in path.name}


@pytest.fixture(scope="module")
def toy() -> Toy:
    """One that comes to an end: every tenth token stops it."""
    toy = Toy()
    toy.config = replace(toy.config, eos_token_ids=(ByteTokenizer.eos_token_id, *range(26)))
    return toy


@pytest.fixture(scope="module")
def folder(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of self-written text; read only."""
    path = tmp_path_factory.mktemp("corpus")
    assert write_corpus(path, toy, SOURCE, 1200, RECIPE, batch_size=16, console=Console(quiet=True)) >= 1200
    assert len(shards.indices(path)) >= 2
    return path


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty answers to given questions in six shards; read only."""
    path = tmp_path_factory.mktemp("asked")
    questions = DatasetText(Given(*([f"What is {i}?"] for i in range(60))))
    write_corpus(path, Toy(), questions, 10**9, Recipe(conversations=10, max_answer=12), batch_size=16)
    return path


# ---- writing -----------------------------------------------------------------------------------------------------------


def test_rows_are_the_targets_own(folder: Path, toy: Toy) -> None:
    """Every row: the template around what was written, then an answer that plain decoding of the prompt gives again."""
    data = load_file(folder / "shard-00000.safetensors")
    facts = json.loads((folder / "shard-00000.json").read_text())
    offsets = data["offsets"].tolist()
    rows = [data["tokens"][a:b].tolist() for a, b in pairwise(offsets)]
    assert len(rows) == facts["rows"] == len(data["temperatures"])
    assert facts["answer_tokens"] == sum(len(r) for r in rows) - int(data["answer_starts"].sum())
    assert set(data["temperatures"].tolist()) == set(torch.tensor([0.0, 0.7, 1.0]).tolist())
    users = []
    for row, start in zip(rows, data["answer_starts"].tolist(), strict=True):
        assert row[:2] == [ByteTokenizer.bos_token_id, ByteTokenizer.user_id]
        assert row[start - 1] == ByteTokenizer.assistant_id
        assert 0 < len(row) - start <= 24
        users.append(row.count(ByteTokenizer.user_id))
    greedy = next(i for i, t in enumerate(data["temperatures"].tolist()) if t == 0)
    start = int(data["answer_starts"][greedy])
    decoder_answer = plain(toy, rows[greedy][:start], len(rows[greedy]) - start)
    assert rows[greedy][start:] == decoder_answer
    assert set(users) == {1, 2}
    assert sum(facts["dropped"].values()) > 0


def plain(toy: Toy, prompt: list[int], new: int) -> list[int]:
    """Greedy decoding by one prefill a token."""
    tokens = list(prompt)
    for _ in range(new):
        toy.allocate(1, len(tokens) + 1, 1, ())
        tokens.append(int(toy.prefill(torch.tensor([tokens]), torch.tensor([len(tokens)])).logits.argmax()))
    return tokens[len(prompt) :]


def test_a_killed_run_goes_on_to_the_same_bytes(folder: Path, toy: Toy, tmp_path: Path) -> None:
    """Killed in the middle of a shard, and between a shard and its record; other batches and drafts change nothing."""
    other: dict[str, Any] = {"drafter": NGram(2), "batch_size": 5}
    move = os.replace

    def killed(source: Path, to: Path) -> None:
        if "00001" in str(to):
            raise KeyboardInterrupt
        move(source, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_corpus(tmp_path, toy, SOURCE, 1200, RECIPE, **other)
    assert shards.indices(tmp_path) == [0]
    (tmp_path / "shard-00000.json").unlink()
    before = shards.path_of(tmp_path, 0).stat().st_mtime_ns
    write_corpus(tmp_path, toy, SOURCE, 1200, RECIPE, **other)
    assert files(tmp_path) == files(folder)
    assert shards.path_of(tmp_path, 0).stat().st_mtime_ns > before


def test_what_is_there_is_kept_and_what_is_damaged_made_again(folder: Path, toy: Toy, tmp_path: Path) -> None:
    for name, content in files(folder).items():
        (tmp_path / name).write_bytes(content)
    kept = shards.path_of(tmp_path, 0).stat().st_mtime_ns
    shards.path_of(tmp_path, 1).write_bytes(b"short")
    write_corpus(tmp_path, toy, SOURCE, 1200, RECIPE, batch_size=16)
    assert files(tmp_path) == files(folder)
    assert shards.path_of(tmp_path, 0).stat().st_mtime_ns == kept


def test_ranks_share_the_shards(folder: Path, toy: Toy, tmp_path: Path) -> None:
    for rank in (0, 1):
        write_corpus(tmp_path, toy, SOURCE, 2, RECIPE, batch_size=16, rank=rank, world=2)
    both = files(tmp_path)
    assert both == {name: files(folder)[name] for name in both}
    assert shards.indices(tmp_path) == [0, 1]


@pytest.mark.parametrize(
    ("source", "recipe", "sentence"),
    [
        (SOURCE, Recipe(seed=6, conversations=24, max_answer=24), "seed = 5, and 6 is asked for"),
        (SelfText(rounds=2, min_turn=2, max_turn=64), RECIPE, "source.min_turn = 1, and 2 is asked for"),
        (SOURCE, Recipe(5, (0.5,), 24, conversations=24), r"temperatures = \[0.0, 0.7, 1.0\], and \[0.5\]"),
    ],
)
def test_other_settings_are_refused(folder: Path, toy: Toy, source: SelfText, recipe: Recipe, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        write_corpus(folder, toy, source, 1200, recipe)


def test_another_target_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"made with target\.embedding = "):
        write_corpus(folder, Toy(seed=1), SOURCE, 1200, RECIPE)


def test_turns_of_a_dataset_are_answered_anew(toy: Toy, tmp_path: Path) -> None:
    """Answers of the target stand between the turns; an equal first turn is dropped within a shard and across shards."""
    source = DatasetText(
        Given(["Hi there", "And you?"], ["hi  There"], ["Name a bird"], ["NAME a bird"], ["Name a fish"])
    )
    write_corpus(
        tmp_path, toy, source, 10**9, Recipe(temperatures=(0.0,), conversations=3, max_answer=40), batch_size=4
    )
    facts = shards.read_record(tmp_path, 0)
    assert facts["dropped"]["turn repeated"] == 1
    corpus = Corpus(tmp_path, heldout=0)
    texts = [toy.tokenizer.decode(tokens) for tokens in corpus.prompts("train")]
    assert sum("Name a bird" in text for text in texts) == 1
    assert not any("NAME" in text for text in texts)
    assert texts[0] == "<bos><user>Hi there<assistant>"
    first = toy.tokenizer.decode(corpus.tokens(0)[int(corpus.answer_starts[0]) : -1].tolist(), skip_special_tokens=True)
    later = corpus.prompts("train")[1]
    assert later == encode(toy.tokenizer, messages(["Hi there", "And you?"], [first]))


def test_mistakes_are_one_sentence(toy: Toy, tmp_path: Path) -> None:
    class Plain(ByteTokenizer):
        chat_template = ""

    class Twice(ByteTokenizer):
        def apply_chat_template(self, chat: Any, tokenize: bool = False, **options: Any) -> str:
            return "<bos>" + 2 * chat[-1]["content"] + "<assistant>"

    with pytest.raises(ValueError, match=r"\(Plain\) has no chat template, .* use an instruction-tuned checkpoint"):
        opening(Plain(), [])
    with pytest.raises(ValueError, match="shows a user's text 2 times"):
        opening(Twice(), [])
    with pytest.raises(
        ValueError, match=r"none of the 3 conversations of shard 0 gave an answer .*'turn not finished': 3"
    ):
        write_corpus(tmp_path, Toy(), SelfText(max_turn=1, min_turn=1), 1, Recipe(conversations=3))
    with pytest.raises(ValueError, match="min_turn=9, max_turn=8"):
        SelfText(min_turn=9, max_turn=8)
    with pytest.raises(ValueError, match="temperatures is empty"):
        Recipe(temperatures=())


def test_beginnings_steer_first_turns(toy: Toy) -> None:
    ids, end = opening(toy.tokenizer, [], "Why ")
    assert toy.tokenizer.decode(ids) == "<bos><user>Why "
    assert end == ByteTokenizer.assistant_id
    later, _ = opening(toy.tokenizer, messages(["a", "b"], ["c"])[:2])
    assert toy.tokenizer.decode(later) == "<bos><user>a<assistant>c<user>"


# ---- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "bit", "gone", "record"])
def test_a_damaged_shard_is_named(asked: Path, tmp_path: Path, fault: str) -> None:
    for name, content in files(asked).items():
        (tmp_path / name).write_bytes(content)
    path = shards.path_of(tmp_path, 3)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:-1] if fault == "cut" else content)
    if fault in ("gone", "record"):
        (path if fault == "gone" else path.with_suffix(".json")).unlink()
    missing = "shard-00003.json is missing" if fault == "record" else "shard-00003.safetensors is "
    with pytest.raises(ValueError, match=missing + ".*write the text again with the same settings"):
        Corpus(tmp_path)


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no settings\.json"):
        Corpus(tmp_path)


def test_held_out_is_disjoint_and_stays(asked: Path, toy: Toy, tmp_path: Path) -> None:
    """The same conversations whether more shards come or go; never by order."""
    corpus = Corpus(asked, heldout=0.3)
    train, heldout = (set(corpus.rows(split).tolist()) for split in ("train", "heldout"))
    assert train | heldout == set(range(60))
    assert not train & heldout
    assert 8 <= len(heldout) <= 28
    assert heldout != set(range(60 - len(heldout), 60))
    for name, content in files(asked).items():
        if "00000" not in name:
            (tmp_path / name).write_bytes(content)
    fewer = Corpus(tmp_path, heldout=0.3)
    assert fewer.prompts("heldout") == [ids for ids in corpus.prompts("heldout") if ids in fewer.prompts("heldout")]
    assert {tuple(ids) for ids in fewer.prompts("train")} <= {tuple(ids) for ids in corpus.prompts("train")}
    assert corpus.fingerprint != fewer.fingerprint
    assert corpus.name(int(corpus.rows_of_shard(2)[4])) == "shard 2, row 4"


def test_the_first_shards_that_hold_so_many_tokens(asked: Path) -> None:
    """However much was written since: a run on a folder with more text learns what it would have learnt without."""
    counts = [shards.read_record(asked, index)["tokens"] for index in shards.indices(asked)]
    assert len(counts) > 2
    for tokens, used in ((1, 1), (counts[0], 1), (counts[0] + 1, 2), (sum(counts), len(counts)), (10**9, len(counts))):
        corpus = Corpus(asked, heldout=0.3, tokens=tokens)
        assert corpus.shards == shards.indices(asked)[:used]
        assert len(corpus.checksums) == used
    assert corpus.fingerprint == Corpus(asked, heldout=0.3).fingerprint
    assert Corpus(asked, heldout=0.3, tokens=1).fingerprint != corpus.fingerprint


def test_a_conversation_is_on_one_side(folder: Path) -> None:
    """Rows that begin with the same user turn are all held out, or none is."""
    corpus = Corpus(folder, heldout=0.5)
    sides: dict[str, set[bool]] = {}
    for row in range(len(corpus)):
        ids = corpus.tokens(row).tolist()
        first = str(ids[: ids.index(ByteTokenizer.assistant_id)])
        sides.setdefault(first, set()).add(bool(corpus.is_heldout[row]))
    assert all(len(side) == 1 for side in sides.values())
    assert len(sides) < len(corpus)


def test_batches_are_the_same_again(asked: Path) -> None:
    corpus = Corpus(asked, heldout=0.2)
    options: dict[str, Any] = {"batch_size": 6, "max_len": 24}
    whole = list(corpus.batches(**options, seed=1))
    assert len(whole) == corpus.steps(6, 24) == len(corpus.rows("train", 24)) // 6
    resumed = list(Corpus(asked, heldout=0.2).batches(**options, seed=1, start_step=3))
    assert all(torch.equal(a, b) for x, y in zip(whole[3:], resumed, strict=True) for a, b in zip(x, y, strict=True))
    rows = torch.cat([batch.rows for batch in whole]).tolist()
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(corpus.rows("train").tolist())
    others = [list(corpus.batches(**options, seed=2)), list(corpus.batches(**options, seed=1, epoch=1))]
    assert all(torch.cat([batch.rows for batch in other]).tolist() != rows for other in others)


def test_ranks_see_what_one_would(asked: Path) -> None:
    corpus = Corpus(asked, heldout=0)
    one = corpus.batches(8, 40, seed=3)
    ranks = zip(*(corpus.batches(4, 40, seed=3, rank=rank, world=2) for rank in (0, 1)), strict=True)
    for whole, (first, second) in zip(one, ranks, strict=True):
        assert whole.rows.tolist() == torch.stack([first.rows, second.rows], 1).flatten().tolist()


def test_masks_and_padding(asked: Path) -> None:
    corpus = Corpus(asked, heldout=0)
    for batch, everything in zip(corpus.batches(8, 22), corpus.batches(8, 22, learn="all"), strict=True):
        assert batch.tokens.dtype == torch.int64
        assert batch.lengths.dtype == torch.int32
        assert batch.tokens.shape == batch.loss_mask.shape == (8, int(batch.lengths.max()))
        for i, row in enumerate(batch.rows.tolist()):
            tokens, start, length = corpus.tokens(row)[:22], int(corpus.answer_starts[row]), int(batch.lengths[i])
            assert batch.tokens[i, :length].tolist() == tokens.tolist()
            assert not batch.tokens[i, length:].any()
            assert batch.loss_mask[i].nonzero()[:, 0].tolist() == list(range(start, length))
            assert everything.loss_mask[i].sum() == length
    padding = sum(int((b.tokens.shape[1] - b.lengths).sum()) for b in corpus.batches(8, 99))
    assert padding < 0.15 * int(corpus.lengths.sum())
    with pytest.raises(ValueError, match=r"has 60 rows .* fewer than a batch of 61 on 1 ranks"):
        next(corpus.batches(61, 99))
    with pytest.raises(ValueError, match=r"has 0 rows .* within max_len=3"):
        next(corpus.batches(1, 3))


def test_counts_are_of_the_answers(asked: Path) -> None:
    corpus = Corpus(asked, heldout=0.2)
    answers = [corpus.tokens(row)[int(corpus.answer_starts[row]) :] for row in corpus.rows("train").tolist()]
    assert torch.equal(corpus.counts(260), torch.cat(answers).bincount(minlength=260))
    assert corpus.counts(260, "train").sum() + corpus.counts(260, "heldout").sum() == sum(
        corpus.lengths - corpus.answer_starts
    )


# ---- features ----------------------------------------------------------------------------------------------------------


def test_features_from_disk_are_those_computed(asked: Path, tmp_path: Path) -> None:
    toy, corpus, taps = Toy(dtype="bfloat16"), Corpus(asked), (0, 1)
    online = Features(toy, taps)
    cache_features(tmp_path, corpus, online, batch_size=7)
    cached = CachedFeatures(tmp_path, corpus, taps)
    for batch in corpus.batches(6, 24, seed=1):
        (a, hidden), (b, other) = online(batch), cached(batch)
        assert a.shape == (*batch.tokens.shape, 2 * 64)
        assert hidden.shape == (*batch.tokens.shape, 64)
        assert torch.equal(a, b)
        assert torch.equal(hidden, other)
        assert not a.requires_grad
        assert not a.is_inference()
    before = files(tmp_path)
    cache_features(tmp_path, corpus, online)
    assert files(tmp_path) == before


def test_hidden_gives_the_logits(asked: Path, toy: Toy) -> None:
    """And the taps are the layers asked for: the last layer's stream, normed, is "hidden"."""
    batch = Corpus(asked).batch(torch.tensor([3, 14]))
    taps, hidden = Features(toy, (0, 1))(batch)
    toy.allocate(2, batch.tokens.shape[1], 0, ())
    logits = toy.prefill(batch.tokens, batch.lengths).logits[:, 0]
    last = hidden[torch.arange(2), batch.lengths.long() - 1]
    torch.testing.assert_close(last @ toy.lm_head.T, logits, rtol=1e-4, atol=1e-4)
    top = taps[..., 64:]
    norm = top / (top.pow(2).mean(-1, keepdim=True) + toy.config.rms_norm_eps).sqrt()
    torch.testing.assert_close(norm, hidden, rtol=1e-4, atol=1e-4)


def test_a_cache_that_does_not_fit_is_refused(asked: Path, toy: Toy, tmp_path: Path) -> None:
    corpus = Corpus(asked)
    batch = corpus.batch(corpus.rows_of_shard(1))
    with pytest.raises(ValueError, match=r"no settings\.json"):
        CachedFeatures(tmp_path / "none", corpus, (0,))
    assert not (tmp_path / "none").exists()
    cache_features(tmp_path, corpus, Features(toy, (0,)))
    with pytest.raises(ValueError, match=r"made with taps = \[0\], and \[1\] is asked for"):
        CachedFeatures(tmp_path, corpus, (1,))
    with pytest.raises(ValueError, match=r"made with target\.embedding"):
        cache_features(tmp_path, corpus, Features(Toy(seed=1), (0,)))
    path = shards.path_of(tmp_path, 1)
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(
        ValueError, match=r"shard-00001\.safetensors is damaged or cut short .* run cache_features again"
    ):
        CachedFeatures(tmp_path, corpus, (0,))(batch)
    cache_features(tmp_path, corpus, Features(toy, (0,)))
    assert path.read_bytes() == content
    corpus.checksums[1] = "0"
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors was made from text that has changed since"):
        CachedFeatures(tmp_path, corpus, (0,))(batch)


# ---- vocabulary --------------------------------------------------------------------------------------------------------


@given(st.data())
def test_draft_vocabulary(data: st.DataObject) -> None:
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=60)))
    size = data.draw(st.integers(1, len(counts)))
    always = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=size))
    d2t, t2d = draft_vocabulary(counts, size, always)
    ids = (torch.arange(size) + d2t).tolist()
    assert ids == sorted(set(ids)) == t2d.nonzero()[:, 0].tolist()
    assert len(ids) == size
    assert set(always) <= set(ids)
    chosen = [int(counts[i]) for i in ids if i not in always]
    left = [int(counts[i]) for i in range(len(counts)) if i not in ids]
    assert min(chosen, default=51) >= max(left, default=0)
    assert 0 <= coverage(counts, t2d) <= 1
    if counts.sum():
        assert coverage(counts, t2d) == pytest.approx(float(counts[t2d].sum() / counts.sum()))
    if size == len(counts):
        assert not d2t.any()


def test_draft_vocabulary_mistakes() -> None:
    counts = torch.arange(5)
    with pytest.raises(ValueError, match="6 tokens does not fit the target's 5"):
        draft_vocabulary(counts, 6)
    with pytest.raises(ValueError, match="2 tokens must be in a draft vocabulary of 1"):
        draft_vocabulary(counts, 1, [0, 1])
    with pytest.raises(ValueError, match="token 9 is outside the target's vocabulary of 5"):
        draft_vocabulary(counts, 2, [9])


def test_special_tokens(toy: Toy) -> None:
    assert special_tokens(toy) == [*range(26), ByteTokenizer.eos_token_id]
