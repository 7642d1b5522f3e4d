"""The GPU's attention against the torch reference: on the CPU through Triton's interpreter, on a GPU as compiled.

Shapes: B rows, T tokens a row, H query heads, G KV heads, C slots, E head size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import interpreter
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import error
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.gpu import attention as gpu_attention
from specdec.kernels.gpu import long as gpu_long
from specdec.kernels.gpu import ops as gpu_ops
from specdec.kernels.gpu.attention import SPLIT
from specdec.kernels.gpu.ops import Ops
from specdec.kernels.reference import AttentionRule, Fp8Weight, Weight
from specdec.structure import TreeShape, regular_paths
from specdec.types import ModelInputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    interpreter.install()

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # padding rows: 0 / 0
DTYPES = [torch.float32, torch.bfloat16]
NEAR = {torch.float32: 5e-6, torch.bfloat16: 5e-2}
SLOTS, HIDDEN, EPS = 256, 64, 1e-5
HEADS = (6, 2, 32)
OFTEN = [(6, 2, 32), (5, 1, 64), (2, 2, 32), (16, 1, 32)]  # 3, 5, 1 and 16 query heads a KV head
CHAIN, TREE = TreeShape(regular_paths([1] * 4)), TreeShape(regular_paths([2, 1]))


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(size: int) -> dict[str, Tensor]:
    """Of the norms over heads."""
    return {"q_norm": 0.5 + randn(size, seed=8).abs(), "k_norm": 0.5 + randn(size, seed=9).abs()}


RULES = {
    "rope": AttentionRule(),
    "none": AttentionRule(rope=False),
    "temperature": AttentionRule(rope=False, temperature_scale=0.5, temperature_floor=16),
    "chunk": AttentionRule(chunk=96, unit_norm=True),
    "weighted": AttentionRule(**weights(HEADS[2])),
}


def inputs_of(shape: TreeShape, prefixes: list[int]) -> ModelInputs:
    """All nodes of a shape in one forward."""
    batch = len(prefixes)
    tree = shape.tree(torch.zeros(batch, shape.num_nodes, dtype=torch.int64))
    prefix = torch.tensor(prefixes, dtype=torch.int32)
    paths = None if tree.is_chain else tree.paths()
    return ModelInputs(tree.tokens, prefix[:, None] + tree.node_depths(), prefix, paths)


def on(thing: Any) -> Any:
    """A copy where the kernels run: of a tensor, or of a dataclass with tensors."""
    if isinstance(thing, Tensor):
        return thing.to(DEVICE, copy=True)
    names = thing.__dataclass_fields__
    return replace(thing, **{n: on(x) for n in names if isinstance(x := getattr(thing, n), Tensor)})


class Case:
    """A random stream and QKV weights [(H+2G)*E, K], and a cache with NaN in every slot that nobody may see."""

    def __init__(
        self,
        inputs: ModelInputs,
        dtype: torch.dtype,
        heads: tuple[int, int, int] = HEADS,
        seed: int = 0,
        fp8: bool = False,
    ) -> None:
        query, groups, size = heads
        batch, tokens = inputs.tokens.shape
        self.inputs = inputs
        self.x, self.norm = randn(batch * tokens, HIDDEN, seed=seed), 0.5 + randn(HIDDEN, seed=seed + 3).abs()
        weight = 1.5 * HIDDEN**-0.5 * randn((query + 2 * groups) * size, HIDDEN, seed=seed + 4)
        self.weight: Weight = Fp8Weight(*reference.quantize(weight)) if fp8 else weight.to(dtype)
        self.keys = randn(batch, groups, SLOTS, size, seed=seed + 1).to(dtype)
        self.values = randn(batch, groups, SLOTS, size, seed=seed + 2).to(dtype)
        empty = torch.arange(SLOTS) >= (inputs.prefix_lens + inputs.offset)[:, None]
        for cache in (self.keys, self.values):
            cache.masked_fill_(empty[:, None, :, None], torch.nan)
        angle = torch.arange(SLOTS)[:, None] * 10_000.0 ** (-torch.arange(size // 2) / (size // 2))
        self.angles = angle.cos().contiguous(), angle.sin().contiguous()

    def wanted(self, rule: AttentionRule) -> tuple[Tensor, Tensor, Tensor]:
        """The reference's output and the cache it leaves behind."""
        keys, values = self.keys.nan_to_num(), self.values.clone()  # masked there, but 0 * NaN is NaN
        arguments = self.x, self.norm, EPS, self.weight, keys, values, self.inputs, *self.angles, rule
        return reference.norm_attention(*arguments), keys, values

    def found(self, ops: Ops, rule: AttentionRule) -> tuple[Tensor, Tensor, Tensor]:
        """The kernels', from copies."""
        x, norm, keys, values, *angles = map(on, (self.x, self.norm, self.keys, self.values, *self.angles))
        weight = ops.pack_heads(on(self.weight), keys.shape[3])
        out = ops.norm_attention(x, norm, EPS, weight, keys, values, on(self.inputs), *angles, on(rule))
        return out.cpu(), keys.cpu(), values.cpu()


def check(case: Case, rule: AttentionRule) -> Tensor:
    """Kernel and reference agree on the output and on what is written, and nothing else is. Returns the output."""
    out, keys, values = case.found(Ops(DEVICE), rule)
    wanted, wanted_keys, wanted_values = case.wanted(rule)
    near = NEAR[case.keys.dtype]
    assert out.dtype == wanted.dtype
    assert error(out, wanted) < near
    written = ~values.isnan()
    assert torch.equal(written, ~wanted_values.isnan())
    assert torch.equal(written, ~keys.isnan())
    assert error(values[written], wanted_values[written]) < near
    assert error(keys[written], wanted_keys[written]) < near
    return out


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize(("rule", "dtype"), [*((name, torch.float32) for name in RULES), ("weighted", torch.bfloat16)])
def test_every_rule(rule: str, shape: TreeShape, dtype: torch.dtype) -> None:
    """Rows of two and of one split of keys, with a chunk that begins within; the rule's mark on the output is seen."""
    prefixes = [190] if shape is TREE and dtype == torch.float32 else [190, 37]  # the interpreter is slow
    case = Case(inputs_of(shape, prefixes), dtype)
    found = check(case, RULES[rule])
    other = AttentionRule(rope=not RULES[rule].rope) if RULES[rule].plain else AttentionRule(rope=RULES[rule].rope)
    assert error(found, case.wanted(other)[0]) > 0.05


@settings(max_examples=6, deadline=None, phases=[Phase.reuse, Phase.generate])  # to shrink would take minutes
@given(
    st.lists(st.integers(0, 240), min_size=1, max_size=2), st.integers(1, 10), st.integers(0, 3),
    st.sampled_from(OFTEN), st.sampled_from([0, 5, 128]), st.sampled_from([*DTYPES, "fp8"]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_chain(
    prefixes: list[int],
    tokens: int,
    offset: int,
    heads: tuple[int, int, int],
    chunk: int,
    kind: Any,
    burst: bool,
    seed: int,
) -> None:
    """Behind the prefix and drafts of earlier levels, whichever product the rows come from."""
    prefix = torch.tensor(prefixes, dtype=torch.int32)
    positions = prefix[:, None] + offset + torch.arange(tokens, dtype=torch.int32)
    inputs = ModelInputs(torch.zeros(positions.shape, dtype=torch.int64), positions, prefix, None, offset)
    with pytest.MonkeyPatch.context() as patch:
        if not burst:
            patch.setattr(gpu_ops, "BURST", 0)
        check(
            Case(inputs, torch.bfloat16 if kind == "fp8" else kind, heads, seed, kind == "fp8"),
            AttentionRule(chunk=chunk),
        )


@pytest.mark.parametrize(
    ("kind", "begin", "rows", "chunk", "flash"),
    [
        (torch.float32, None, 1, 0, False), (torch.float32, 0, 1, 0, False), (torch.bfloat16, 70, 1, 0, False),
        (torch.bfloat16, 0, 2, 0, True), (torch.bfloat16, 100, 1, 100, True), (torch.bfloat16, 70, 1, 100, False),
        ("fp8", 0, 1, 0, True),
    ],
)  # fmt: skip
def test_a_prompt_longer_than_exact_forwards(
    kind: Any, begin: int | None, rows: int, chunk: int, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vendor's product, then rotation by itself; queries of several splits, or torch's attention where it fits."""
    monkeypatch.setattr(gpu_ops, "TOKENS_EXACT", 64)
    if flash:
        monkeypatch.setattr(gpu_attention, "attention_kernel", None)
    else:
        monkeypatch.setattr(gpu_long, "attention", None)
    prefix = torch.full((rows,), 70 if begin is None else begin, dtype=torch.int32)
    positions = prefix[:, None] + torch.arange(gpu_ops.TOKENS_EXACT + 3, dtype=torch.int32)
    inputs = ModelInputs(positions.long(), positions, prefix, begin=begin)
    case = Case(inputs, torch.bfloat16 if kind == "fp8" else kind, (4, 1, 32), 0, kind == "fp8")
    check(case, AttentionRule(chunk=chunk))


@pytest.mark.parametrize("prefix", [SPLIT - 3, SPLIT, 15])
@pytest.mark.parametrize("tokens", [1, 7])
def test_borders(prefix: int, tokens: int) -> None:
    """New keys on both sides of a split's border, or the first behind it."""
    check(Case(inputs_of(TreeShape(regular_paths([1] * (tokens - 1))), [prefix]), torch.float32), AttentionRule())


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("chunk", [0, 96])
def test_many_splits(shape: TreeShape, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are added at once, and fewer; the chunk begins among them. The reference knows nothing of splits."""
    monkeypatch.setattr(gpu_attention, "SPLIT", 16)
    monkeypatch.setattr(gpu_attention, "WAYS", 4)
    check(Case(inputs_of(shape, [213, 60, 20]), torch.float32), AttentionRule(chunk=chunk))


@pytest.mark.parametrize(("shape", "dtype"), [(CHAIN, torch.float32), (TREE, torch.bfloat16)])
def test_level_by_level_is_all_at_once(dtype: torch.dtype, shape: TreeShape) -> None:
    """Drafting runs one level at a time, with earlier ones read from the cache: same values, and as the reference says."""
    ops, rule, prefixes = Ops(DEVICE), AttentionRule(), [126, 20]
    whole = Case(inputs_of(shape, prefixes), dtype)
    wanted, wanted_keys, wanted_values = whole.found(ops, rule)
    case, nodes = Case(whole.inputs, dtype), (2, shape.num_nodes, -1)
    for d, start in enumerate(shape.starts):
        stop = [*shape.starts, shape.num_nodes][d + 1]
        case.inputs = shape.level_inputs(whole.inputs.tokens[:, start:stop], whole.inputs.prefix_lens, d)
        case.x = whole.x.view(nodes)[:, start:stop].flatten(0, 1).contiguous()
        expected = case.wanted(rule)[0]
        out, case.keys, case.values = case.found(ops, rule)
        assert error(out, expected) < NEAR[dtype]
        assert error(out, wanted.view(nodes)[:, start:stop].flatten(0, 1)) < NEAR[dtype]
    for level, once in ((case.keys, wanted_keys), (case.values, wanted_values)):
        assert torch.equal(level.isnan(), once.isnan())
        assert error(level.nan_to_num(), once.nan_to_num()) < NEAR[dtype]


# ---- the checks see faults -------------------------------------------------------------------------------------------


def test_a_wrong_path_is_caught() -> None:
    """Negative control: one node that hangs on its aunt changes that node alone."""
    case = Case(inputs_of(TREE, [130]), torch.float32)
    right = case.found(Ops(DEVICE), AttentionRule())[0]
    assert case.inputs.paths is not None
    assert case.inputs.paths[0, 4].tolist() == [0, 2, 4]
    case.inputs.paths[0, 4, 1] = 1
    wrong = case.found(Ops(DEVICE), AttentionRule())[0]
    assert (wrong != right).any(-1).tolist() == [node == 4 for node in range(TREE.num_nodes)]
    assert error(wrong, right) > 0.01


@pytest.mark.parametrize("fault", ["half", "prefix", "split"])
def test_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: the angle of the other direction, a prefix one too short, a split that is not added."""
    case, ops = Case(inputs_of(CHAIN, [190]), torch.float32), Ops(DEVICE)
    wanted = case.wanted(AttentionRule())[0]
    if fault == "half":
        case.angles = case.angles[0], -case.angles[1]
    elif fault == "prefix":
        case.inputs = replace(case.inputs, prefix_lens=case.inputs.prefix_lens - 1)
    else:
        combine = gpu_attention.add_splits_kernel

        class Shorter:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                return lambda *given, **options: combine[grid](*given, **{**options, "SPLIT": 2 * SPLIT})

        monkeypatch.setattr(gpu_attention, "add_splits_kernel", Shorter())
    assert error(case.found(ops, AttentionRule())[0].nan_to_num(), wanted) > 0.01
