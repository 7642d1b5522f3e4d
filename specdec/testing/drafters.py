"""The drafter suite: whatever is proposed, the text stays the target's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.decoding import GenerationResult, SamplingParams, SpeculativeDecoder
from specdec.drafter import Drafter
from specdec.target.toy import Toy
from specdec.testing.errors import ConformanceError
from specdec.testing.syncs import check_no_sync
from specdec.types import DraftInputs, DraftTree
from specdec.verifier import Verifier

PROMPTS = ([7, 8, 9, 7, 8, 9, 7, 8], [1], [30, 31] * 9, list(range(40, 57)), [7, 8, 9, 7, 8])


class PlainDraft(Drafter):
    """Proposes nothing."""

    num_draft_tokens = depth = 0

    def propose(self, inputs: DraftInputs) -> DraftTree:
        return DraftTree.chain(inputs.root, inputs.root[:, None][:, :0])


@dataclass(frozen=True, slots=True)
class DrafterReport:
    """What `check_drafter` saw."""

    drafter: str
    acceptance_length: float  # on the suite's prompts and target: says that it works, not how well
    checks: tuple[str, ...]


def check_drafter(make: Callable[[], Drafter], verifier: Verifier, target: Any = None) -> DrafterReport:
    """Certify a drafter: ConformanceError with one sentence on the first thing that is wrong.

    make: builds a fresh drafter; verifier: a coupled one (`TargetOnly()`), for which drafting must not change the text.
    Checked: the declared sizes hold, the output equals plain output - greedy and sampled, alone and in ragged batches
    with a queue, with stop tokens and limits inside drafts - a second run repeats the first, and a drafter that says it is
    graphable never reads the device.
    """
    if not verifier.coupled:
        raise ValueError(f"{type(verifier).__name__} is not coupled to plain decoding: use TargetOnly()")
    target = target or Toy()
    name, checks, lengths = type(make()).__name__, [], []
    for label, sampling in (("greedy", SamplingParams()), ("sampled", SamplingParams(0.9, 40, 0.95))):
        for batch in (1, 3):
            length = _check_equal(make, verifier, target, sampling, batch, f"{label}, batch {batch}")
            lengths.append(length)
            checks.append(f"equals plain output: {label}, batch {batch}")
    _check_stops(make, verifier, target)
    checks.append("stop tokens and limits")
    if make().graphable:
        check_no_sync(make(), verifier)
        checks.append("no host read in a step")
    return DrafterReport(name, max(lengths), tuple(checks))


def _check_equal(
    make: Callable[[], Drafter], verifier: Verifier, target: Any, sampling: SamplingParams, batch: int, what: str
) -> float:
    plain = _run(target, PlainDraft(), verifier, sampling, batch)
    checked = Checked(make())
    drafted = _run(target, checked, verifier, sampling, batch)
    _compare(type(checked.inner).__name__, plain.tokens, drafted.tokens, what)
    again = _run(target, Checked(make()), verifier, sampling, batch)
    _compare(type(checked.inner).__name__, drafted.tokens, again.tokens, f"{what}, run twice")
    return drafted.trace.acceptance_length


def _run(
    target: Any, drafter: Drafter, verifier: Verifier, sampling: SamplingParams, batch: int, **options: Any
) -> GenerationResult:
    decoder = SpeculativeDecoder(target, drafter, verifier, sampling, batch)
    options = {"max_new_tokens": 40, "seed": 5, "ignore_eos": True} | options
    return decoder.generate([list(p) for p in PROMPTS], **options)


def _compare(name: str, plain: Sequence[list[int]], drafted: Sequence[list[int]], what: str) -> None:
    for request, (a, b) in enumerate(zip(plain, drafted, strict=True)):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            raise ConformanceError(
                f"{name} changes the text ({what}): request {request} has {b[at : at + 1]} at token {at}, plain decoding has "
                f"{a[at : at + 1]} (lengths {len(b)} and {len(a)})"
            )


def _check_stops(make: Callable[[], Drafter], verifier: Verifier, target: Any) -> None:
    """Stop at tokens that plain decoding emits early, and at every small limit."""
    greedy = SamplingParams()
    plain = _run(target, PlainDraft(), verifier, greedy, 2)
    for stop in {plain.tokens[0][5], plain.tokens[2][9]}:
        expected = _run(target, PlainDraft(), verifier, greedy, 2, stop=[stop])
        actual = _run(target, Checked(make()), verifier, greedy, 2, stop=[stop])
        _compare(type(make()).__name__, expected.tokens, actual.tokens, f"stop token {stop}")
    for limit in (1, 2, 3, 5):
        actual = _run(target, Checked(make()), verifier, greedy, 2, max_new_tokens=limit)
        _compare(type(make()).__name__, [t[:limit] for t in plain.tokens], actual.tokens, f"max_new_tokens={limit}")


class Checked(Drafter):
    """A drafter with its proposals checked against what it declares."""

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner
        self.num_draft_tokens, self.depth = inner.num_draft_tokens, inner.depth
        self.features, self.laws, self.graphable = inner.features, inner.laws, inner.graphable

    def setup(self, target: Any, *args: Any) -> None:
        self._vocab = target.config.vocab_size
        self.inner.setup(target, *args)

    def prefill(self, inputs: DraftInputs) -> bool:
        return self.inner.prefill(inputs)

    def propose(self, inputs: DraftInputs) -> DraftTree:
        tree = self.inner.propose(inputs)
        problem = tree_problem(tree, self.inner, inputs, self._vocab)
        if problem:
            raise ConformanceError(f"{type(self.inner).__name__} proposes a tree that {problem}")
        return tree

    def observe(self, *args: Any) -> None:
        self.inner.observe(*args)


def tree_problem(tree: DraftTree, drafter: Drafter, inputs: DraftInputs, vocab_size: int) -> str | None:
    """What is wrong with a proposal, or None. Reads on the host."""
    batch, nodes = tree.tokens.shape
    if nodes > drafter.num_draft_tokens + 1 or tree.depth > drafter.depth:
        return (
            f"has {nodes} nodes and depth {tree.depth}, more than the declared {drafter.num_draft_tokens + 1} and "
            f"{drafter.depth}"
        )
    if batch != inputs.lengths.shape[0] or not bool((tree.tokens[:, 0] == inputs.root).all()):
        return "does not begin with every row's root"
    if not bool(((tree.num_nodes >= 1) & (tree.num_nodes <= nodes)).all()):
        return f"has num_nodes {tree.num_nodes.tolist()}, outside 1..{nodes}"
    if not bool(((tree.tokens >= 0) & (tree.tokens < vocab_size)).all()):
        return f"has token ids outside 0..{vocab_size - 1}"
    index = tree.parents.new_tensor(range(nodes))
    if not bool(((tree.parents < index) & (tree.parents >= 0) | (index == 0) & (tree.parents == -1)).all()):
        return "has parents that do not stand before their children (-1 for the root)"
    if tree.is_chain and not bool((tree.parents == index - 1).all()):
        return (
            f"has depth {tree.depth} and {nodes} nodes, which says chain, but branches: declare {tree.depth + 2} nodes"
        )
    deepest = int(tree.node_depths().max())
    return f"is {deepest} deep and says depth {tree.depth}" if deepest > tree.depth else None
