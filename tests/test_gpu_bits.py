"""Verify equals decode on the GPU, bit for bit: a token's logits do not depend on what shares its forward, text neither."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from parity import error
from test_bits import random_tree
from torch import Tensor

from specdec.decoding import SpeculativeDecoder
from specdec.drafter.none import NoDraft
from specdec.drafter.small_model import SmallModel
from specdec.kernels.gpu import attention as gpu_attention
from specdec.nn import ModelConfig
from specdec.target.backends import DTYPES
from specdec.target.llama import Llama
from specdec.target.toy import Toy, as_llama4, random_tensors
from specdec.testing import Replay
from specdec.types import Acceptance, DraftTree
from specdec.verifier.target_only import TargetOnly

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LENGTH, PREFIX = 300, 100  # of the text whose logits are known, and of it before the widest forwards
ODD = ModelConfig(259, 192, 416, 3, 6, 2, 32)
SMOLLM2 = ModelConfig(49152, 576, 1536, 4, 9, 3, 64, tie_word_embeddings=True)
WIDE = ModelConfig(1000, 2304, 4608, 2, 20, 4, 128)  # products too long for one burst: their sums are split and put off
CONFIGS: dict[str, tuple[ModelConfig, str, bool]] = {  # sizes, dtype, FP8
    "odd": (ODD, "bfloat16", False),
    "odd_f32": (ODD, "float32", False),
    "smollm2": (SMOLLM2, "bfloat16", False),
    "wide": (WIDE, "bfloat16", False),
    "fp8": (WIDE, "bfloat16", True),
    "qwen3": (ModelConfig(260, 192, 416, 2, 6, 2, 64, model_type="qwen3", qk_norm="weighted"), "bfloat16", False),
    "llama4": (as_llama4(ModelConfig(260, 192, 416, 4, 10, 2, 32)), "bfloat16", False),
}
SHARES = [(1, 64), (2, 32), (3, 21), (4, 5), (7, 9), (16, 4), (64, 1), (40, 6)]  # rows and nodes of a forward


class Random(Llama):
    """A model of given sizes with random weights."""

    def __init__(self, config: ModelConfig, dtype: str, quantized: bool, backend: str = "native") -> None:
        tensors = random_tensors(config, 0, 3.0, DTYPES[dtype], quantized)
        self._build(config, tensors, dtype, DEVICE, backend, None, None, quantized=quantized)
        self.prefill_chunk = 32


def make(name: str) -> Random:
    return Random(*CONFIGS[name])


@cache
def shared(name: str) -> Random:
    """One of each kind; whoever uses it allocates first."""
    return make(name)


def chain(tokens: Tensor) -> DraftTree:
    """Root and drafts [B, N] as one path."""
    return DraftTree.chain(tokens[:, 0], tokens[:, 1:])


def accept_all(tree: DraftTree, path: Tensor) -> Acceptance:
    """Every row takes the same nodes."""
    batch, size = len(tree.tokens), len(path)
    walked = torch.cat([path, path[-1:].expand(tree.depth + 1 - size)]).int().expand(batch, -1)
    taken = torch.full((batch,), size - 1, dtype=torch.int32, device=DEVICE)
    return Acceptance(walked, taken, torch.zeros(batch, dtype=torch.int64, device=DEVICE))


@cache
def known(name: str) -> tuple[Tensor, Tensor]:
    """A text and its logits, one token a forward, alone in the batch: int64 [L], f32 [L, V]."""
    target = shared(name)
    text = torch.randint(0, 256, (LENGTH,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    target.allocate(1, LENGTH, 1)
    logits = []
    for token in text:
        tree = chain(token.view(1, 1))
        logits.append(target.verify(tree).logits[0, 0])
        target.commit(accept_all(tree, torch.zeros(1, dtype=torch.int64, device=DEVICE)))
    return text, torch.stack(logits)


def start(target: Llama, rows: list[Tensor], nodes: int) -> Tensor:
    """Prefill rows of unequal lengths; logits of their last tokens [B, V]."""
    width = max(map(len, rows))
    tokens = torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])
    target.allocate(len(rows), LENGTH, nodes)
    return target.prefill(tokens, torch.tensor([len(row) for row in rows], dtype=torch.int32)).logits[:, 0]


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_prompts_that_share_a_forward(name: str) -> None:
    """Short prompts read together, up to 256 tokens, and what is decoded behind them: as if each were alone."""
    target, (text, logits) = shared(name), known(name)
    lengths = [40, 3, 64, 1, 17, 110, 33, 200, 21]
    try:
        target.prefill_chunk = 256
        first = start(target, [text[:length] for length in lengths], 4)
        assert max(map(len, target._shares(lengths))) > 2
    finally:
        target.prefill_chunk = 32
    following = target.verify(chain(torch.stack([text[length : length + 4] for length in lengths]))).logits
    for row, length in enumerate(lengths):
        assert torch.equal(first[row], logits[length - 1]), length
        assert torch.equal(following[row], logits[length : length + 4]), length


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_every_width_up_to_64(name: str) -> None:
    """Alone in the batch: every number of tokens, and with it every slot of a forward."""
    target, (text, logits) = shared(name), known(name)
    first = start(target, [text[:PREFIX]], 64)
    assert torch.equal(first[0], logits[PREFIX - 1])
    for nodes in range(1, 65):
        found = target.verify(chain(text[None, PREFIX : PREFIX + nodes])).logits[0]
        assert torch.equal(found, logits[PREFIX : PREFIX + nodes]), nodes


@torch.inference_mode()
def test_many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long context in small: more splits than are added at once, however many tokens there are."""
    monkeypatch.setattr(gpu_attention, "SPLIT", 16)
    monkeypatch.setattr(gpu_attention, "WAYS", 4)
    target, (text, logits) = shared("wide"), known.__wrapped__("wide")
    start(target, [text[:PREFIX]], 64)
    for nodes in (1, 2, 5, 19, 64):
        found = target.verify(chain(text[None, PREFIX : PREFIX + nodes])).logits[0]
        assert torch.equal(found, logits[PREFIX : PREFIX + nodes]), nodes


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_logits_do_not_depend_on_company(name: str, tree: bool) -> None:
    """In any row among others of other lengths, in a chain or along a path, and in the step that follows its commit."""
    target, (text, logits) = shared(name), known(name)
    for seed, (batch, nodes) in enumerate(SHARES):
        draw = torch.Generator().manual_seed(seed)
        row, prefix = (int(torch.randint(0, high, (1,), generator=draw)) for high in (batch, 200))
        prefix += 1
        sizes = torch.randint(1, 200, (batch,), generator=draw)
        rows = [torch.randint(0, 256, (int(size),), generator=draw).to(DEVICE) for size in sizes]
        rows[row] = text[:prefix]
        first = start(target, rows, nodes)
        if tree and nodes >= 4:
            drafts, path = random_tree(draw, batch, nodes, row, text[prefix : prefix + nodes // 2].cpu())
            tokens, parents, count = (x.to(DEVICE) for x in (drafts.tokens, drafts.parents, drafts.num_nodes))
            drafts, path = DraftTree(tokens, parents, count, drafts.depth), path.to(DEVICE)
        else:
            tokens = torch.randint(0, 256, (batch, nodes), generator=draw).to(DEVICE)
            tokens[row] = text[prefix : prefix + nodes]
            drafts, path = chain(tokens), torch.arange(nodes, device=DEVICE)
        stop = prefix + len(path)
        found = target.verify(drafts).logits[row, path]
        target.commit(accept_all(drafts, path))
        following = target.verify(chain(text[stop].expand(batch, 1))).logits[row, 0]
        assert torch.equal(first[row], logits[prefix - 1]), (batch, nodes)
        assert torch.equal(found, logits[prefix:stop]), (batch, nodes)
        assert torch.equal(following, logits[stop]), (batch, nodes)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_graph_has_the_bits_of_separate_launches(name: str) -> None:
    """Captured at one length, replayed at another."""
    target, (text, logits) = shared(name), known(name)
    start(target, [text[:PREFIX]], 8)
    tree = chain(text[None, PREFIX : PREFIX + 8].clone())
    assert torch.equal(target.verify(tree).logits[0], logits[PREFIX : PREFIX + 8])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = target.verify(tree)
    for begin in (PREFIX, PREFIX + 8, PREFIX + 16, PREFIX + 24):  # over the border of a split
        tree.tokens.copy_(text[None, begin : begin + 8])
        graph.replay()
        assert torch.equal(output.logits[0], logits[begin : begin + 8]), begin
        target.lengths.add_(8)


PROMPTS = [[1, 2, 3], list(range(60)), [9] * 110, [5, 6]]


@cache
def plain(name: str) -> list[list[int]]:
    decoder = SpeculativeDecoder(shared(name), NoDraft(), TargetOnly())
    return decoder.generate(PROMPTS, 100, ignore_eos=True).tokens


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("name", CONFIGS)
def test_speculative_text_is_plain_text(name: str, tree: bool, batch: int) -> None:
    references = [prompt + tokens for prompt, tokens in zip(PROMPTS, plain(name), strict=True)]
    decoder = SpeculativeDecoder(shared(name), Replay(references, depth=5, tree=tree), TargetOnly(), batch_size=batch)
    drafted = decoder.generate(PROMPTS, 100, ignore_eos=True)
    assert drafted.tokens == plain(name)
    assert drafted.trace.acceptance_length > 1.5


@pytest.mark.parametrize("name", ["odd", "fp8", "llama4"])
def test_text_without_graphs_is_the_same(name: str) -> None:
    decoder = SpeculativeDecoder(shared(name), NoDraft(), TargetOnly(), batch_size=2, use_graphs=False)
    assert decoder.generate(PROMPTS, 100, ignore_eos=True).tokens == plain(name)


@pytest.mark.parametrize("children", [None, [2, 1, 1]], ids=["chain", "tree"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_self_draft_is_accepted_whole(name: str, children: list[int] | None) -> None:
    """The same weights draft level by level what they verify at once; over several borders of splits, batch 1 and 3.

    Prompts in chunks of up to 64 tokens, as bits are kept up to there.
    """
    drafter = SmallModel(model=make(name), num_draft_tokens=4, structure=children, prefill_chunk=16)
    for batch in (1, 3):
        decoder = SpeculativeDecoder(shared(name), drafter, TargetOnly(), batch_size=batch)
        result = decoder.generate(PROMPTS, 170, ignore_eos=True)
        assert result.trace.acceptance_length == drafter.depth + 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "llama4"])
@torch.inference_mode()
def test_float32_is_near_the_torch_backend(family: str) -> None:
    """Prompts in chunks short and long, a chain, and a tree: logits within 1e-4 of the largest."""
    found: dict[str, list[Tensor]] = {}
    for backend in ("native", "torch"):
        found[backend] = []
        for chunk in (32, 256):
            target = Toy(
                dtype="float32", device=DEVICE, backend=backend, hidden_size=192, num_heads=6, family=family,
                prefill_chunk=chunk,
            )  # fmt: skip
            draw = torch.Generator().manual_seed(3)
            rows = [torch.randint(0, 256, (size,), generator=draw).to(DEVICE) for size in (150, 20)]
            tree, _ = random_tree(draw, 2, 9, 0, torch.zeros(1, dtype=torch.int64))
            tokens, parents, count = (x.to(DEVICE) for x in (tree.tokens, tree.parents, tree.num_nodes))
            outputs = [start(target, rows, 9), target.verify(chain(tokens)).logits]
            found[backend] += [*outputs, target.verify(DraftTree(tokens, parents, count, tree.depth)).logits]
    for ours, theirs in zip(found["native"], found["torch"], strict=True):
        assert error(ours, theirs) < 1e-4
