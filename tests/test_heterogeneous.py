"""A draft model of another tokenizer: which tokens are the same, what is read for the others, and that the law is kept.

B rows, V token ids of the target, W of the draft model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from table_target import TableTarget
from test_decoding import COUNT, VOCAB, p_value, sampled_texts
from test_drafters import FakeModel, inputs_for
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from specdec.decoding import SamplingParams, SpeculativeDecoder
from specdec.drafter._vocabulary import SharedVocabulary, shared_vocabulary, spellings
from specdec.drafter.small_model import SmallModel
from specdec.sampling import warp
from specdec.structure import RootState, _static
from specdec.structure._static import spread
from specdec.structure.adaptive import Adaptive
from specdec.structure.dynamic import Dynamic
from specdec.target.toy import Toy
from specdec.testing import ConformanceError, check_drafter
from specdec.testing.drafters import PROMPTS
from specdec.testing.prefix_model import sampling_of
from specdec.types import DraftTree, ModelInputs, ModelOutput
from specdec.verifier import Verifier
from specdec.verifier.block import Block
from specdec.verifier.rrs import RRS
from specdec.verifier.speculative_sampling import SpeculativeSampling
from specdec.verifier.target_only import TargetOnly

pytestmark = pytest.mark.filterwarnings("ignore:the draft model's vocabulary has")
BYTE_LEVEL = ("Ġ", "Ġthe", "Ċ", "Ã", "©", "a", "Ġcat", "at", "Ġthecat", "<|end|>", "Ġ▁")
PIECES = (
    "<unk>",
    "<s>",
    "<0x0A>",
    "<0x20>",
    "<0x61>",
    "<0xC3>",
    "▁the",
    "▁",
    "a",
    "cat",
    "at",
    "é",
    "▁x",
    "Ġ",
)  # the last a letter


class Names:
    """A tokenizer that is only a list of names."""

    eos_token_id = None

    def __init__(self, *names: str) -> None:
        self.vocab = {name: i for i, name in enumerate(names)}

    def get_vocab(self) -> dict[str, int]:
        return self.vocab

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return ""


def model_of(tokenizer: Any, size: int) -> Any:
    lengths = torch.zeros(1, dtype=torch.int32)
    return SimpleNamespace(config=SimpleNamespace(vocab_size=size), tokenizer=tokenizer, lengths=lengths)


def tables(draft: Sequence[str], target: Sequence[str], padding: int = 0) -> SharedVocabulary:
    models = (model_of(Names(*names), len(names) + padding) for names in (draft, target))
    found = shared_vocabulary(*models)
    assert found is not None
    return found


# ---- which tokens are the same ---------------------------------------------------------------------------------------


def test_tables_between_two_conventions() -> None:
    found = tables(PIECES, BYTE_LEVEL, padding=2)
    same = [
        (BYTE_LEVEL[i], PIECES[j]) for i, j in zip(found.target_ids.tolist(), found.draft_ids.tolist(), strict=True)
    ]
    assert same == [("Ġ", "▁"), ("Ġthe", "▁the"), ("Ċ", "<0x0A>"), ("Ã", "<0xC3>"), ("a", "a"), ("at", "at")]
    read = [PIECES[i] for i in found.read_as.tolist()]
    assert read == [
        "▁", "▁the", "<0x0A>", "<0xC3>", "<unk>", "a", "cat", "at", "cat", "<unk>", "<unk>", "<unk>", "<unk>",
    ]  # fmt: skip
    assert found.target_ids.dtype == found.draft_ids.dtype == found.read_as.dtype == torch.int64


def test_tables_the_other_way_round() -> None:
    """A byte fallback is read like its character, and the pieces' own names decide which of the two may be drafted."""
    found = tables(BYTE_LEVEL, PIECES)
    same = {PIECES[i]: BYTE_LEVEL[j] for i, j in zip(found.target_ids.tolist(), found.draft_ids.tolist(), strict=True)}
    assert same == {"▁": "Ġ", "▁the": "Ġthe", "<0x0A>": "Ċ", "<0xC3>": "Ã", "a": "a", "at": "at"}
    read = {name: BYTE_LEVEL[i] for name, i in zip(PIECES, found.read_as.tolist(), strict=True)}
    assert read["<0x61>"] == read["a"] == "a"
    assert read["é"] == "©"  # its last byte
    assert read["cat"] == "at"


def test_a_token_is_drafted_under_one_id() -> None:
    """A vocabulary may write the same bytes twice: mass on two ids for one token would be lost in the target's law."""
    found = tables(("<0x61>", "a", "b", "▁▁", "  "), ("b", "a", "Ġ", "ĠĠ"))
    assert found.target_ids.tolist() == [0, 1, 3]
    assert found.draft_ids.tolist() == [2, 1, 4]
    assert tables(("\t", "<0x09>", "▁"), ("ĉ", "Ġ")).draft_ids.tolist() == [0, 2]  # though the fallback comes later


def test_ids_that_the_models_lack_are_left_out() -> None:
    draft, target = model_of(Names("a", "b", "c", "d"), 3), model_of(Names("d", "c", "b", "a"), 4)
    found = shared_vocabulary(draft, target)
    assert found is not None
    assert found.target_ids.tolist() == [1, 2, 3]
    assert found.read_as.tolist() == [0, 2, 1, 0]


TEXTS = ["the cat sat on the mat", "\n\tnaïve café, 12 €\n\n", "déjà vu 🐈 and  more   spaces", "ĠĠ▁<0x41>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def sentencepiece() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    words = [text.replace("🐈", "").replace("▁", "") for text in TEXTS[:3]]
    tokenizer.train_from_iterator(
        words * 3, trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_spellings_of_a_tokenizers_own_output_are_the_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    written = spellings(tokenizer.get_vocab(), tokenizer.get_vocab_size())
    assert len(written) == tokenizer.get_vocab_size()
    for text in TEXTS[:3]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert len(ids) < len(text.encode())
        assert b"".join(written[i] for i in ids) == text.encode()


def test_trained_tokenizers_share_words_and_bytes() -> None:
    draft, target = sentencepiece(), byte_level()
    found = shared_vocabulary(model_of(draft, draft.get_vocab_size()), model_of(target, target.get_vocab_size()))
    assert found is not None
    same = {
        target.id_to_token(i): draft.id_to_token(j)
        for i, j in zip(found.target_ids.tolist(), found.draft_ids.tolist(), strict=True)
    }
    assert len(same) >= 256
    assert len(set(same.values())) == len(same)
    assert [same[name] for name in ("t", "Ã", "Ġ", "Ċ", "Ġthe")] == ["t", "<0xC3>", "▁", "\n", "▁the"]
    assert not found.read_as[torch.tensor(target.encode(TEXTS[2]).ids)].eq(0).any()


# ---- what is drafted -------------------------------------------------------------------------------------------------

TARGET_NAMES, DRAFT_NAMES = ("a", "b", "ca", "d"), ("d", "x", "b", "a", "y")  # "ca" is read as "a", and never drafted
SHARED = {0: 3, 1: 2, 3: 0}
READ_AS = [3, 2, 3, 0]


@pytest.mark.parametrize("law", ["iid", "distinct"])
@pytest.mark.parametrize("top_k", [0, 2])
def test_the_recorded_law_is_that_of_the_shared_tokens(law: Any, top_k: int) -> None:
    """Node by node, of a model whose law is a hash of all that it reads, against the formula."""
    model: Any = FakeModel(len(DRAFT_NAMES))
    model.tokenizer = Names(*DRAFT_NAMES)
    drafter = SmallModel(model, structure=[2, 1])
    drafter.setup(model_of(Names(*TARGET_NAMES), VOCAB), 2, 64, law)
    texts = [[0, 1, 2], [3, 2, 2, 1]]
    inputs = inputs_for(texts, temperature=0.7, top_k=top_k)
    tree = drafter.propose(inputs)
    assert tree.probs is not None
    assert tree.probs.shape == (2, 5, VOCAB)
    torch.testing.assert_close(tree.probs.sum(-1), torch.ones(2, 5))
    outside = [i for i in range(VOCAB) if i not in SHARED]
    assert (tree.probs[:, :, outside] == 0).all()
    for b, text in enumerate(texts):
        for node, path in enumerate(tree.paths()[b, :3].tolist()):
            read = [READ_AS[i] for i in [*text, *tree.tokens[b, [i for i in path if i > 0]].tolist()]]
            logits = model.predict(read)[list(SHARED.values())]
            expected = warp(logits.expand(2, 1, -1), inputs.sampling)[b, 0].softmax(-1)
            torch.testing.assert_close(tree.probs[b, node, list(SHARED)], expected)
            drawn = tree.tokens[b, tree.parents[b] == node]
            assert (tree.probs[b, node, drawn] > 0).all()


def misplaced(probs: Tensor, state: RootState | None) -> Tensor:
    """As if the shared tokens were the target's first."""
    assert state is not None
    return torch.nn.functional.pad(probs, (0, state.vocab_size - probs.shape[-1]))


def not_renormalised(probs: Tensor, state: RootState | None) -> Tensor:
    """As if the draft model's other tokens had kept their mass."""
    return spread(probs, state) * 0.6


KEPT: list[tuple[Verifier, Any]] = [
    (SpeculativeSampling(), None),
    (Block(), None),
    (SpeculativeSampling(), Adaptive(2, 0.5)),
    (RRS(replacement=True), [2, 1]),
    (RRS(replacement=False), [2, 1]),
]


def chance(verifier: Verifier, structure: Any) -> float:
    """p value of the texts that the loop samples against the target's exact law."""
    target, model = TableTarget(VOCAB, seed=1), TableTarget(len(DRAFT_NAMES), seed=2)
    target.tokenizer, model.tokenizer = Names(*TARGET_NAMES), Names(*DRAFT_NAMES)  # type: ignore[assignment]
    drafter = SmallModel(model, num_draft_tokens=2, structure=structure)
    counts = sampled_texts(target, drafter, verifier, SamplingParams(1.0))
    return p_value(counts, target.law([0, 1], COUNT, sampling_of(1)))


@pytest.mark.parametrize("case", range(len(KEPT)))
def test_the_targets_law_is_kept(case: int) -> None:
    assert chance(*KEPT[case]) > 1e-4


@pytest.mark.parametrize("fault", [misplaced, not_renormalised])
def test_a_wrong_law_is_caught(fault: Any) -> None:
    with patch.object(_static, "spread", fault):
        assert chance(SpeculativeSampling(), None) < 1e-9


# ---- in the loop -----------------------------------------------------------------------------------------------------


class Renamed:
    """The toy behind another tokenizer: byte-level names in another order; `missing` bytes have none."""

    def __init__(self, missing: Sequence[int] = (), backend: str = "torch", **options: Any) -> None:
        self.inner = Toy(backend=backend, **options)
        order = torch.randperm(260, generator=torch.Generator().manual_seed(3)).tolist()
        self.origin = torch.tensor([i for i in order if i not in missing])
        self.config = replace(self.inner.config, vocab_size=len(self.origin))
        alphabet = "".join(chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256)))
        written = {ord(c): c for c in alphabet}
        extra = (i for i in range(256) if i not in written)
        written |= {byte: chr(256 + i) for i, byte in enumerate(extra)}
        written |= dict(enumerate(("<bos>", "<eos>", "<user>", "<assistant>"), 256))
        self.tokenizer = Names(*(written[i] for i in self.origin.tolist()))
        self.allocate = self.inner.allocate

    def forward(self, inputs: ModelInputs) -> ModelOutput:
        logits = self.inner.forward(replace(inputs, tokens=self.origin[inputs.tokens])).logits
        return ModelOutput(logits[..., self.origin])


def test_the_targets_twin_behind_another_tokenizer_is_accepted_whole(toy: Toy) -> None:
    """Each id read or drafted in the wrong place would cost drafts."""
    drafter = SmallModel(Renamed(backend="auto"), num_draft_tokens=4)
    for sampling, verifier in ((SamplingParams(), TargetOnly()), (SamplingParams(0.8), SpeculativeSampling())):
        result = SpeculativeDecoder(toy, drafter, verifier, sampling).generate([[3, 4, 5, 6]], 60, ignore_eos=True)
        assert result.trace.acceptance_length == 5


@pytest.mark.parametrize("structure", [None, [2, 1], Dynamic(5, top_k=3, depth=3)], ids=["chain", "tree", "dynamic"])
def test_output_equals_plain_output(structure: Any, toy: Toy) -> None:
    """Greedy and sampled, alone and in batches, without a host read; the draft model lacks bytes of prompts and answers."""
    missing = [7, 30, 45, *range(100, 130)]
    report = check_drafter(lambda: SmallModel(Renamed(missing), 3, structure), TargetOnly(), toy)
    assert report.acceptance_length > 1.3


def test_ids_that_are_not_translated_are_caught(toy: Toy) -> None:
    class Untranslated(SmallModel):
        def propose(self, *args: Any) -> DraftTree:
            tree = super().propose(*args)
            assert self._shared is not None
            return replace(tree, tokens=self._shared.read_as[tree.tokens])

    with pytest.raises(ConformanceError, match="does not begin with every row's root"):
        check_drafter(lambda: Untranslated(Renamed()), TargetOnly(), toy)


def test_tables_are_made_once(toy: Toy) -> None:
    """A captured graph keeps their addresses."""
    drafter = SmallModel(Renamed(), num_draft_tokens=2)
    drafter.setup(toy, 1, 64, "any")
    first = drafter._shared
    drafter.setup(toy, 2, 64, "any")
    assert drafter._shared is first is not None


# ---- the same vocabulary, and too little of it -----------------------------------------------------------------------


def texts_and_trees(model: Any, toy: Toy) -> tuple[list[list[int]], Tensor]:
    decoder = SpeculativeDecoder(toy, SmallModel(model, 3), SpeculativeSampling(), SamplingParams(0.9), 2)
    result = decoder.generate([list(prompt) for prompt in PROMPTS], 30, seed=4, ignore_eos=True)
    return result.tokens, result.trace.num_accepted


def test_the_same_vocabulary_needs_no_tables(toy: Toy) -> None:
    """With tokenizers or without; tables of the same tokens draft the same, so they would not be missed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = Toy(seed=1, backend="torch")
        assert shared_vocabulary(alone, toy) is None
        tokens, accepted = texts_and_trees(alone, toy)
        alone.tokenizer = None
        assert shared_vocabulary(alone, toy) is None
        assert texts_and_trees(alone, toy)[0] == tokens
        wide = Toy(seed=1, backend="torch", vocab_size=300)  # rows behind the same tokens, that nothing names
        assert shared_vocabulary(wide, toy) is not None
        assert len(texts_and_trees(wide, toy)[0]) == len(tokens)
    every = SharedVocabulary(*[torch.arange(260)] * 3)
    with patch("specdec.drafter.small_model.shared_vocabulary", lambda *_: every):
        mapped = texts_and_trees(Toy(seed=1, backend="torch"), toy)
    assert mapped[0] == tokens
    assert torch.equal(mapped[1], accepted)


def test_the_share_is_said() -> None:
    with pytest.warns(UserWarning, match=r"has 6 of the target's 11 tokens \(55%\): it drafts these alone"):
        tables(PIECES, BYTE_LEVEL)


def test_too_little_in_common_is_a_sentence() -> None:
    many = [f"w{i}" for i in range(199)]
    assert tables(["no", *many[:3]], many).target_ids.tolist() == [0, 1, 2]
    for names, shared in ((["no", *many[:1]], 1), (["no"], 0)):
        with pytest.raises(ValueError, match=f"has {shared} of the target's 199 tokens, and more than 1% are needed"):
            tables(names, many)


def test_without_tokenizers_the_number_of_ids_has_to_tell() -> None:
    sizes = (16, None), (260, Names("a"))
    for (size, tokenizer), (other_size, other_tokenizer) in (sizes, sizes[::-1]):
        with pytest.raises(ValueError, match=f"has {size} token ids, the target {other_size}; choose a draft model"):
            shared_vocabulary(model_of(tokenizer, size), model_of(other_tokenizer, other_size))
    assert shared_vocabulary(model_of(None, 9), model_of(Names("a"), 9)) is None
