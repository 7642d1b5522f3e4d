"""The loop as a user meets it: prompts in, tokens and text and a trace out, the target's law kept throughout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from table_target import TableTarget

from specdec.decoding import GenerationResult, SamplingParams, SpeculativeDecoder
from specdec.decoding.chat import TextStream, encode
from specdec.drafter import Drafter
from specdec.drafter.ngram import NGram
from specdec.drafter.none import NoDraft
from specdec.drafter.small_model import SmallModel
from specdec.target.toy import ByteTokenizer, Toy
from specdec.testing import Replay
from specdec.testing.prefix_model import sampling_of
from specdec.types import DraftInputs, DraftTree
from specdec.verifier import Verifier
from specdec.verifier.block import Block
from specdec.verifier.rrs import RRS
from specdec.verifier.speculative_sampling import SpeculativeSampling
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.traversal import Traversal

GREEDY, SAMPLED = SamplingParams(), SamplingParams(2.0, 100, 0.99)
PROMPTS: list[Any] = [
    "Repeat: one two one two one",
    [{"role": "user", "content": "aha aha aha"}],
    [7, 8, 9, 7, 8, 9, 7, 8],
    [1],
    [30, 31] * 40,
]


def decoder(toy: Any, drafter: Drafter | None = None, sampling: SamplingParams = GREEDY, batch: int = 1, **kwargs: Any):  # type: ignore[no-untyped-def]
    return SpeculativeDecoder(toy, drafter or NGram(), kwargs.pop("verifier", TargetOnly()), sampling, batch)


@pytest.fixture(scope="module")
def plain(toy: Toy) -> list[list[int]]:
    """Greedy plain output of PROMPTS, one at a time."""
    return [decoder(toy, NoDraft()).generate([p], 24, ignore_eos=True).tokens[0] for p in PROMPTS]


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_text_chat_and_ids_of_one_prompt_are_one_prompt(toy: Toy) -> None:
    text = "what is it?"
    chat = [{"role": "user", "content": text}]
    ids = [256, 258, *text.encode(), 259]
    assert encode(toy.tokenizer, text) == encode(toy.tokenizer, chat) == ids
    results = [decoder(toy).generate(form, 6) for form in (text, chat, ids, [text], [chat], [ids])]
    assert all(result.tokens == results[0].tokens for result in results)
    assert results[0].trace.requests[0].prompt_tokens == len(ids)
    assert results[0].text == [toy.tokenizer.decode(results[0].tokens[0], skip_special_tokens=True)]


def test_earlier_answers_are_part_of_the_prompt(toy: Toy) -> None:
    chat = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert encode(toy.tokenizer, chat) == [256, 258, ord("a"), 259, ord("b"), 258, ord("c"), 259]


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("drafter", [NoDraft, NGram])
def test_a_queue_longer_than_the_batch_keeps_order_and_output(
    toy: Toy, plain: list[list[int]], drafter: type[Drafter], batch: int
) -> None:
    result = decoder(toy, drafter(), batch=batch).generate(PROMPTS, 24, ignore_eos=True)
    assert result.tokens == plain
    assert [r.prompt_tokens for r in result.trace.requests] == [len(encode(toy.tokenizer, p)) for p in PROMPTS]


def test_one_decoder_serves_batch_after_batch(toy: Toy, plain: list[list[int]]) -> None:
    many = decoder(toy, batch=3)
    for some in ([0, 1, 2, 3, 4], [4, 0], [2], [3, 1, 4]):
        assert many.generate([PROMPTS[i] for i in some], 24, ignore_eos=True).tokens == [plain[i] for i in some]


# ---- where it stops --------------------------------------------------------------------------------------------------


def expected_until(tokens: Sequence[int], stops: set[int]) -> tuple[list[int], str]:
    at = next((i for i, token in enumerate(tokens) if token in stops), None)
    return (list(tokens), "length") if at is None else (list(tokens[: at + 1]), "stop")


@settings(max_examples=25, deadline=None)
@given(places=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 23)), max_size=3), limit=st.integers(1, 24))
def test_stop_ids_and_limits(toy: Toy, plain: list[list[int]], places: list[tuple[int, int]], limit: int) -> None:
    """Wherever a stop token lies, in a draft or not, it is the last token; num_emitted tells of the cut."""
    references = [encode(toy.tokenizer, p) + t for p, t in zip(PROMPTS, plain, strict=True)]
    stops = {plain[request][place] for request, place in places}
    result = decoder(toy, Replay(references), batch=3).generate(PROMPTS, limit, stop=sorted(stops), ignore_eos=True)
    wanted = [expected_until(tokens[:limit], stops) for tokens in plain]
    assert result.tokens == [tokens for tokens, _ in wanted]
    assert [request.finish for request in result.trace.requests] == [finish for _, finish in wanted]


def test_stop_strings_and_the_models_own_end(toy: Toy, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    letter = next(t for t in plain[0] if t < 128)
    stopped = decoder(toy).generate([PROMPTS[0]], 24, stop=[chr(letter)], ignore_eos=True)
    assert stopped.tokens[0] == expected_until(plain[0], {letter})[0]
    monkeypatch.setattr(toy.tokenizer, "eos_token_id", letter)
    assert decoder(toy).generate([PROMPTS[0]], 24).tokens == stopped.tokens
    assert decoder(toy).generate([PROMPTS[0]], 24, ignore_eos=True).tokens == [plain[0]]


def test_one_token(toy: Toy, plain: list[list[int]]) -> None:
    """The prefill gives it: no step runs, and nothing is divided by zero."""
    result = decoder(toy, batch=2).generate(PROMPTS, 1, ignore_eos=True)
    assert result.tokens == [tokens[:1] for tokens in plain]
    assert result.trace.num_accepted.shape == (len(PROMPTS), 0)
    assert result.trace.acceptance_length != result.trace.acceptance_length  # NaN
    assert all(r.finish == "length" and r.prefill_seconds > 0 for r in result.trace.requests)


# ---- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_streaming_equals_generate(toy: Toy, sampling: SamplingParams) -> None:
    whole = decoder(toy, sampling=sampling, batch=2).generate(PROMPTS, 30, seed=3)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    texts, finish = ["" for _ in PROMPTS], ["" for _ in PROMPTS]
    for chunk in decoder(toy, sampling=sampling, batch=2).stream(PROMPTS, 30, seed=3):
        assert finish[chunk.request] == ""
        assert chunk.tokens
        tokens[chunk.request] += chunk.tokens
        texts[chunk.request] += chunk.text
        finish[chunk.request] = chunk.finish
    assert tokens == whole.tokens
    assert texts == whole.text
    assert finish == [request.finish for request in whole.trace.requests]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=12), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=60))
def test_no_character_is_split(text: str, sizes: list[int]) -> None:
    """However bytes are cut into chunks, pieces hold whole characters and join to the text."""
    stream, data, pieces = TextStream(ByteTokenizer()), list(text.encode()), []
    cuts = iter(sizes * (len(data) + 1))
    while data:
        size = next(cuts)
        pieces.append(stream.add(data[:size]))
        data = data[size:]
    pieces.append(stream.add([], last=True))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces) or "�" in text


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    stream = TextStream(ByteTokenizer())
    assert stream.add([0xE2, 0x82]) == ""
    assert stream.add([0x41]) == "�A"
    assert stream.add([0xE2]) == ""
    assert stream.add([], last=True) == "�"


def test_two_streams_on_one_target_are_refused(toy: Toy) -> None:
    for other in (decoder(toy), None):
        first = decoder(toy)
        stream = first.stream("hello", 20)
        next(stream)
        (other or first).generate("hi", 2)
        with pytest.raises(ValueError, match="another generate or stream began"):
            list(stream)


# ---- seeds and batches -----------------------------------------------------------------------------------------------


def test_a_seed_reproduces_and_another_differs(toy: Toy) -> None:
    runs = [decoder(toy, sampling=SAMPLED, batch=2).generate(PROMPTS, 20, seed=s).tokens for s in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert all(a != b for a, b in zip(runs[0], runs[2], strict=True))


def test_every_bit_of_a_seed_counts(toy: Toy) -> None:
    seeds = [0, *(1 << bit for bit in range(31)), 2**31 - 1]
    texts = decoder(toy, NoDraft(), SAMPLED, 8).generate([PROMPTS[2]] * len(seeds), 8, seeds, ignore_eos=True).tokens
    assert len({tuple(text) for text in texts}) == len(seeds)


def test_samples_of_one_prompt_take_a_seed_each(toy: Toy) -> None:
    """Noise is a function of seed and prompt: of one seed all are alike."""
    loop, prompts = decoder(toy, sampling=SAMPLED, batch=4), [PROMPTS[2]] * 4
    assert len({tuple(text) for text in loop.generate(prompts, 12, seed=5, ignore_eos=True).tokens}) == 1
    assert len({tuple(text) for text in loop.generate(prompts, 12, seed=range(4), ignore_eos=True).tokens}) == 4


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("drafter", [NoDraft, NGram])
def test_output_does_not_depend_on_company(toy: Toy, sampling: SamplingParams, drafter: type[Drafter]) -> None:
    seeds = [11, 12, 13, 14, 15]
    alone = [
        decoder(toy, drafter(), sampling).generate([p], 20, seed=s, ignore_eos=True).tokens[0]
        for p, s in zip(PROMPTS, seeds, strict=True)
    ]
    for batch, order in ((5, [0, 1, 2, 3, 4]), (2, [4, 2, 0, 3, 1]), (3, [3, 3, 1])):
        some = [PROMPTS[i] for i in order]
        run = decoder(toy, drafter(), sampling, batch).generate(
            some, 20, seed=[seeds[i] for i in order], ignore_eos=True
        )
        assert run.tokens == [alone[i] for i in order]


def test_sampled_drafting_equals_sampled_plain_decoding(toy: Toy) -> None:
    """Under target_only even noise changes nothing, whatever is drafted."""
    run = {"max_new_tokens": 40, "seed": 9, "ignore_eos": True}
    plain = decoder(toy, NoDraft(), SAMPLED, 3).generate(PROMPTS, **run)
    references = [encode(toy.tokenizer, p) + t for p, t in zip(PROMPTS, plain.tokens, strict=True)]
    for tree in (False, True):
        drafted = decoder(toy, Replay(references, tree=tree), SAMPLED, 3).generate(PROMPTS, **run)
        assert drafted.tokens == plain.tokens
        assert drafted.trace.acceptance_length > 1.5


# ---- the trace -------------------------------------------------------------------------------------------------------


def check_trace(result: GenerationResult, drafts: int) -> None:
    for tokens, request in zip(result.tokens, result.trace.requests, strict=True):
        row = request.as_row()
        lists = {len(values) for name, values in row.items() if isinstance(values, list) and name != "tokens"}
        assert lists == {len(request.num_nodes)}
        assert row["tokens"] == tokens
        assert sum(request.num_emitted) + 1 == len(tokens)  # the prefill's
        steps = zip(request.num_emitted, request.num_accepted, request.draft_depth, request.num_nodes, strict=True)
        whole = []
        for emitted, accepted, depth, nodes in steps:
            assert 1 <= emitted <= accepted + 1
            assert accepted <= depth <= nodes - 1 <= drafts
            whole.append(emitted == accepted + 1)
        assert all(whole[:-1])  # only a last step is cut short
        parts = (request.propose_seconds, request.verify_seconds, request.accept_seconds, request.step_seconds)
        assert request.prefill_seconds > 0
        assert all(min(p, v, a) > 0 and p + v + a <= step for p, v, a, step in zip(*parts, strict=True))
    for name in ("num_accepted", "num_nodes"):
        matrix = getattr(result.trace, name)
        assert matrix.dtype == torch.int32
        for line, request in zip(matrix.tolist(), result.trace.requests, strict=True):
            values = getattr(request, name)
            assert line == values + [-1] * (matrix.shape[1] - len(values))


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_trace_says_what_happened(toy: Toy, plain: list[list[int]], tree: bool, batch: int) -> None:
    references = [encode(toy.tokenizer, p) + t for p, t in zip(PROMPTS, plain, strict=True)]
    replay = Replay(references, tree=tree)
    result = decoder(toy, replay, batch=batch).generate(PROMPTS, 22, ignore_eos=True)
    check_trace(result, replay.num_draft_tokens)
    pairs = [(a + 1, e) for r in result.trace.requests for a, e in zip(r.num_accepted, r.num_emitted, strict=True)]
    assert any(full != emitted for full, emitted in pairs)  # some last step was cut by the limit ...
    whole = [full for full, emitted in pairs if full == emitted]  # ... and does not count
    assert result.trace.acceptance_length == pytest.approx(sum(whole) / len(whole))
    assert len(set(whole)) > 1


def test_seconds_of_a_step_are_shared_by_the_rows_that_ran(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("specdec.decoding.decoder.perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr("specdec.decoding.reader.perf_counter", lambda: float(next(clock)))
    result = decoder(toy, NoDraft(), batch=2).generate([[1], [2]], 4, ignore_eos=True)
    for request in result.trace.requests:
        assert request.step_seconds == [2.0] * 3  # five readings of the clock: four seconds, two rows
        assert request.verify_seconds == [0.5] * 3


# ---- the law ---------------------------------------------------------------------------------------------------------

VOCAB, COUNT, ROWS = 4, 4, 500
CHAINS: list[Verifier] = [SpeculativeSampling(), Block(), RRS(), Traversal(), TargetOnly()]
TREES: list[Verifier] = [RRS(replacement=True), RRS(replacement=False), Traversal(), Traversal(True), TargetOnly()]
CASES = [(v, None) for v in CHAINS] + [(v, [2, 2]) for v in TREES]


def sampled_texts(target: TableTarget, drafter: Drafter, verifier: Verifier, sampling: SamplingParams) -> torch.Tensor:
    """Counts of the texts of COUNT tokens that follow one prompt, over many seeds. f64 [VOCAB ** COUNT]."""
    loop = SpeculativeDecoder(target, drafter, verifier, sampling, ROWS)
    counts = torch.zeros(VOCAB**COUNT, dtype=torch.float64)
    for wave in range(16):
        result = loop.generate([[0, 1]] * ROWS, COUNT + 3, seed=list(range(wave * ROWS, (wave + 1) * ROWS)))
        texts = torch.tensor([tokens[:COUNT] for tokens in result.tokens])
        index = (texts * VOCAB ** torch.arange(COUNT - 1, -1, -1)).sum(1)
        counts += torch.bincount(index, minlength=VOCAB**COUNT)
    return counts


def p_value(counts: torch.Tensor, law: torch.Tensor) -> float:
    """Chi-square of counts against an exact law; cells that expect fewer than five are pooled."""
    expected = law * counts.sum()
    if bool((counts[law == 0] > 0).any()):
        return 0.0
    rare = expected < 5
    pooled = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected)]
    keep = pooled[1] > 0
    return float(stats.chisquare(pooled[0][keep], pooled[1][keep]).pvalue)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_several_steps_follow_the_joint_law(case: int) -> None:
    """Prefill's token, accepted drafts, recovered and bonus tokens over two steps and more, against the exact law."""
    verifier, children = CASES[case]
    target = TableTarget(VOCAB, seed=1)
    drafter = SmallModel(model=TableTarget(VOCAB, seed=2, like=target), num_draft_tokens=2, structure=children)
    params, row = (
        (SamplingParams(1.0), sampling_of(1)) if case % 2 else (SamplingParams(0.8, 3), sampling_of(1, 0.8, 3))
    )
    counts = sampled_texts(target, drafter, verifier, params)
    assert p_value(counts, target.law([0, 1], COUNT, row)) > 1e-4
    assert p_value(counts, drafter.model.law([0, 1], COUNT, row)) < 1e-9  # the test can tell


# ---- what a user may get wrong ---------------------------------------------------------------------------------------

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"prompts": ""}, "the prompt is empty: give"),
    ({"prompts": "  \n"}, "the prompt is empty"),
    ({"prompts": []}, "no prompts were given: pass"),
    ({"prompts": [[]]}, "the prompt is empty"),
    ({"prompts": ["fine", ""]}, "the prompt is empty"),
    ({"prompts": [[1, 260]]}, "token id 260 is outside the target's vocabulary of 260"),
    ({"prompts": [-1]}, "token id -1 is outside"),
    ({"prompts": torch.tensor([1, 2])}, "prompts are a Tensor: give a text"),
    ({"prompts": [torch.tensor([1, 2])]}, "a prompt is a Tensor: give a text"),
    ({"prompts": [{"role": "user"}]}, "messages with role and content"),
    ({"prompts": [1] * 4090}, "need 4100 positions, the model has 4096: shorten"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
    ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 must be a whole number of at least 1"),
    ({"max_new_tokens": True}, "max_new_tokens=True must be a whole number of at least 1"),
    *[({"seed": s}, f"seed={s!r} must be a whole number from 0 to 2147483647") for s in ("a", 1.5, True, -1, 2**31)],
    ({"prompts": ["a", "b"], "seed": [1, 2**32]}, "seed=4294967296 must be a whole number from 0 to 2147483647"),
    ({"stop": ["two"]}, "the stop string 'two' is 3 tokens, not 1: stop on a token id"),
    ({"stop": [999]}, "token id 999 is outside"),
    ({"prompts": ["a", "b"], "seed": [1, 2, 3]}, "3 seeds for 2 prompts: give one"),
]


@pytest.mark.parametrize("case", range(len(MISTAKES)))
def test_a_mistake_is_one_sentence(toy: Toy, case: int) -> None:
    wrong, words = MISTAKES[case]
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
        decoder(toy).generate(**{"prompts": "a", "max_new_tokens": 10} | wrong)
    assert words in str(caught.value)
    assert decoder(toy).generate([1, 2], 2, ignore_eos=True).tokens  # the target is none the worse


@pytest.mark.parametrize("prompt", ["text", [{"role": "user", "content": "text"}]])
def test_a_checkpoint_without_a_tokenizer_takes_ids(prompt: Any) -> None:
    bare = decoder(Toy(vocab_size=16))
    assert bare.generate([1, 2, 3], 3).text == [""]
    assert next(bare.stream([1, 2, 3], 3)).text == ""
    with pytest.raises(ValueError, match="no tokenizer: give token ids"):
        bare.generate(prompt, 3)
    with pytest.raises(ValueError, match="stop string 'a' needs a tokenizer"):
        bare.generate([1, 2, 3], 3, stop=["a"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1 must be 0 \(greedy\) or above"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"top_k": -1}, "top_k=-1 must be a whole number"),
        ({"top_k": 1.5}, r"top_k=1\.5"),
        ({"top_p": 0}, "top_p=0 must be above 0"),
        ({"top_p": 1.1}, r"top_p=1\.1"),
    ],
)
def test_sampling_values(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingParams(**values)


def test_waiting_prompts_begin_together(toy: Toy, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """refill=2 of 3 rows: the fourth and fifth wait for one another; the texts are what they were."""
    begun: list[int] = []
    prefill = toy.prefill
    monkeypatch.setattr(toy, "prefill", lambda tokens, n: (begun.append(int((n > 0).sum())), prefill(tokens, n))[1])
    for refill, wanted in ((1, [3, 1, 1]), (2, [3, 2])):
        begun.clear()
        drafted = SpeculativeDecoder(toy, NGram(), TargetOnly(), batch_size=3, refill=refill)
        assert drafted.generate(PROMPTS, 24, ignore_eos=True).tokens == plain
        assert begun == wanted


class Offered(NoDraft):
    """Keeps what propose is offered of every row: its new tokens and their features."""

    depth, features = 2, (0, 1)

    def __init__(self, ahead: bool) -> None:
        self.ahead, self.seen, self.widths = ahead, [], set()

    def prefill(self, inputs: DraftInputs) -> bool:
        return self.ahead

    def propose(self, inputs: DraftInputs) -> DraftTree:
        self.widths.add(inputs.max_new)
        for tokens, length, new, features in zip(
            inputs.tokens, inputs.lengths, inputs.num_new, inputs.features, strict=True
        ):
            self.seen.append((tokens[length - 1 - new : length].tolist(), features[:new].clone()))
        tree = super().propose(inputs)
        tree.depth = self.depth
        return tree


def test_of_a_prompt_that_was_read_the_last_tokens_are_offered(toy: Toy) -> None:
    """As many as in any other step, with their features, however long the prompts and whoever goes on beside them."""
    seen = []
    for ahead in (False, True):
        drafter = Offered(ahead)
        decoder(toy, drafter, batch=3).generate(PROMPTS, 9, ignore_eos=True)
        assert drafter.widths == {3} if ahead else max(drafter.widths) > 3
        seen.append(drafter.seen)
    for (all_tokens, all_features), (tokens, features) in zip(*seen, strict=True):
        assert tokens == all_tokens[-4:]
        assert len(features) == min(len(all_features), 3)
        assert torch.equal(features, all_features[-3:])


def test_a_decoder_says_what_it_is(toy: Toy) -> None:
    said = repr(decoder(toy, NGram(), SAMPLED, 3))
    assert said.startswith(
        "SpeculativeDecoder(target=toy, drafter=ngram, verifier=target_only, temperature=2.0, batch_size=3"
    )
    assert "drafter=Offered" in repr(decoder(toy, Offered(True)))  # of no file of ours


def test_a_decoder_that_cannot_be(toy: Toy) -> None:
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number of at least 1"):
        decoder(toy, batch=0)
    with pytest.raises(ValueError, match="refill=0 must be a whole number of at least 1"):
        SpeculativeDecoder(toy, NoDraft(), TargetOnly(), refill=0)
    tree = SmallModel(model=toy, structure=[2, 2])
    with pytest.raises(
        ValueError, match=r"block judges chains only, and small_model proposes trees \(6 drafts, depth 2\)"
    ):
        decoder(toy, tree, verifier=Block())
    with pytest.raises(ValueError, match="the draft model has 16 token ids, the target 260; choose"):
        decoder(toy, SmallModel(model=Toy(vocab_size=16))).generate([1, 2], 2)


def test_logits_that_are_nan_are_refused_where_they_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Toy()
    broken.model.embedding[65] = torch.nan
    assert decoder(broken).generate([1, 2], 2, ignore_eos=True).tokens
    with pytest.raises(ValueError, match=r"logits are NaN after a prompt of 3 tokens.*dtype=float32"):
        decoder(broken).generate([1, 65, 2], 2)
