"""The EAGLE-3 drafter: its numbers are those of the formulas, whatever the steps; its state never goes stale; errors say why.

Shapes: B rows, H hidden size, F taps, E head size, V and W entries of the target's and the draft vocabulary.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
import torch.nn.functional as F
from heads import Tensors, head_config, head_tensors, in_fp8, random_head, write_head
from hydra import compose, initialize_config_module
from parity import error
from safetensors.torch import load_file
from test_gpu import stepped
from torch import Tensor

from specdec.composition import build
from specdec.decoding import SamplingParams, SpeculativeDecoder
from specdec.drafter import Drafter, _head
from specdec.drafter.eagle3 import Eagle3
from specdec.drafter.none import NoDraft
from specdec.kernels import reference
from specdec.kernels.gpu.ops import Ops
from specdec.nn import EagleConfig, EagleModel, KVCache
from specdec.sampling import warp
from specdec.target.toy import Toy
from specdec.testing import Replay, check_drafter
from specdec.testing.drafters import PROMPTS
from specdec.train.eagle3 import Eagle3Head
from specdec.train.export import export
from specdec.types import DraftInputs, DraftTree, ModelInputs, Sampling
from specdec.verifier.rrs import RRS
from specdec.verifier.speculative_sampling import SpeculativeSampling
from specdec.verifier.target_only import TargetOnly
from specdec.weights.checkpoint import load_state

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    interpreter.install()

W = 96
NEAR = 1e-4
SLIDING = {"layer_types": ["sliding_attention"], "sliding_window": 2048, "use_sliding_window": True}
Text = list[int]


@pytest.fixture(scope="module")
def toy() -> Toy:
    """The seeded toy target on the CPU's compiled kernels."""
    return Toy(device="cpu")


# ---- the head by its formulas ----------------------------------------------------------------------------------------


class Plain:
    """One entry after the other in f64, from a checkpoint folder and the target's embeddings; no cache, no batch."""

    def __init__(self, folder: Path, embed: Tensor) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors")
        self.at = {name: x.double() if x.is_floating_point() else x for name, x in stored.items()}
        for name in [name for name in stored if name.endswith("_scale")]:
            self.at[name.removesuffix("_scale")] *= self.at[name][:, None]
        self.embed = embed.double()

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.at[f"{name}.weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt() * self.at[f"{name}.weight"]

    def turned(self, x: Tensor, position: int) -> Tensor:
        """Rotary embedding of heads [heads, E]."""
        half = self.config["head_dim"] // 2
        angles = [position / self.config["rope_theta"] ** (i / half) for i in range(half)]
        a, b = x[:, :half], x[:, half:]
        c, s = (torch.tensor([f(angle) for angle in angles]).double() for f in (math.cos, math.sin))
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    def entry(self, token: int, h: Tensor, seen: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Append K/V of the entry behind those `seen`; what the next draft step takes [H], and the logits [W]."""
        config, mid, position = self.config, "midlayer", len(seen)
        fed = self.norm(h, f"{mid}.hidden_norm")
        y = torch.cat([self.norm(self.embed[token], f"{mid}.input_layernorm"), fed])
        q, k, v = (self.linear(y, f"{mid}.self_attn.{n}_proj").view(-1, config["head_dim"]) for n in "qkv")
        seen.append((self.turned(k, position), v))
        share = len(q) // len(k)
        keys, values = (torch.stack(x).repeat_interleave(share, 1) for x in zip(*seen, strict=True))
        weights = ((self.turned(q, position) * keys).sum(-1) * config["head_dim"] ** -0.5).softmax(0)
        out = self.linear((weights[..., None] * values).sum(0).flatten(), f"{mid}.self_attn.o_proj")
        x = (fed if config.get("norm_before_residual") else h) + out
        z = self.norm(x, f"{mid}.post_attention_layernorm")
        g = x + self.linear(
            F.silu(self.linear(z, f"{mid}.mlp.gate_proj")) * self.linear(z, f"{mid}.mlp.up_proj"),
            f"{mid}.mlp.down_proj",
        )
        normed = self.norm(g, "norm")
        return normed if config.get("norm_output") else g, self.linear(normed, "lm_head")

    def read(self, text: Text, features: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """State and logits behind a text, its root last; features [len(text) - 1, F * H]."""
        seen: list[tuple[Tensor, Tensor]] = []
        for token, each in zip(text[1:], features.double(), strict=True):
            if self.config.get("norm_before_fc"):
                each = self.norm(each, "input_norm")
            if self.config.get("fc_norm"):
                parts = each.view(len(self.config["feature_layers"]), -1)
                each = torch.cat([self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)])
            state, logits = self.entry(token, self.linear(each, "fc"), seen)
        return state, logits, seen

    def ids(self, drafts: Tensor) -> Tensor:
        """The target's ids of draft ids."""
        return drafts + self.at["d2t"][drafts] if "d2t" in self.at else drafts

    def after(self, text: Text, features: Tensor, drafts: Sequence[int]) -> Tensor:
        """Logits [W] behind the text and some drafts."""
        state, logits, seen = self.read(text, features)
        for token in drafts:
            state, logits = self.entry(token, state, seen)
        return logits


# ---- driving the drafter by hand -------------------------------------------------------------------------------------


def sampling_for(batch: int, temperature: float = 0.0) -> Sampling:
    return Sampling(
        torch.full((batch,), temperature), torch.zeros(batch).int(), torch.ones(batch), torch.arange(batch),
        torch.full((batch,), 5).int(), "sampled" if temperature else "greedy",
    )  # fmt: skip


class Rows:
    """Texts with made-up features, in the inputs that the loop would make of them; garbage wherever nobody may look."""

    def __init__(self, width: int, vocab: int, seed: int = 0) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.width, self.vocab = width, vocab
        self.texts: list[Text] = []
        self.features: list[Tensor] = []

    def random(self, count: int) -> Text:
        return torch.randint(self.vocab, (count,), generator=self.draw).tolist()

    def begin(self, lengths: Sequence[int]) -> list[int]:
        """New requests of so many tokens, root included; what num_new is."""
        self.texts = [self.random(length) for length in lengths]
        self.features = [torch.randn(length - 1, self.width, generator=self.draw) for length in lengths]
        return [length - 1 for length in lengths]

    def advance(self, counts: Sequence[int], renew: int | None = None, length: int = 0) -> list[int]:
        """Commit so many tokens a row (0: it does not run); row `renew` begins a request of `length` tokens instead."""
        for row, count in enumerate(counts):
            self.texts[row] = self.random(length) if row == renew else self.texts[row] + self.random(count)
            before = self.features[row][:0] if row == renew else self.features[row]
            more = len(self.texts[row]) - 1 - len(before)
            self.features[row] = torch.cat([before, torch.randn(more, self.width, generator=self.draw)])
        return [len(self.texts[row]) - 1 if row == renew else count for row, count in enumerate(counts)]

    def inputs(self, num_new: Sequence[int], bound: int, temperature: float = 0.0) -> DraftInputs:
        batch, room = len(self.texts), max(map(len, self.texts)) + 12
        max_new = max([bound, *num_new])
        tokens = torch.full((batch, room), self.vocab - 1)
        features = 50 * torch.randn(batch, max_new, self.width, generator=self.draw)
        for row, (text, known, new) in enumerate(zip(self.texts, self.features, num_new, strict=True)):
            tokens[row, : len(text)] = torch.tensor(text)
            features[row, :new] = known[len(known) - new :]
        lengths = torch.tensor([len(text) for text in self.texts], dtype=torch.int32)
        new = torch.tensor(num_new, dtype=torch.int32)
        return DraftInputs(tokens, lengths, new, max_new, features, sampling_for(batch, temperature))


def made(folder: Path, toy: Toy, batch: int, law: Any = "any", room: int = 128, **options: Any) -> Eagle3:
    """A drafter that has been set up."""
    drafter = Eagle3(folder, **options)
    toy.allocate(batch, room, 1)
    drafter.setup(toy, batch, room, law)
    return drafter


def width(toy: Toy) -> int:
    return len(head_config(toy.config)["feature_layers"]) * toy.config.hidden_size


def recorded(drafter: Eagle3) -> list[Tensor]:
    """The logits [B * n, W] of every level from now on, the root's first."""
    seen: list[Tensor] = []

    def logits(hidden: Tensor) -> Tensor:
        seen.append(type(drafter.model).logits(drafter.model, hidden))
        return seen[-1]

    def forward(*args: Any) -> Any:
        level, states = type(drafter)._forward(drafter, *args)
        seen.append(level.flatten(0, 1).clone())
        return level, states

    drafter.model.logits, drafter._forward = logits, forward  # type: ignore[method-assign]
    return seen


def check_numbers(plain: Plain, rows: Rows, tree: DraftTree, levels: list[Tensor], running: Sequence[bool]) -> None:
    """Every level's logits and tokens, from scratch."""
    batch, nodes = tree.tokens.shape
    paths, depths = tree.paths().tolist(), tree.node_depths()[0].tolist()
    for row in range(batch):
        if not running[row]:
            continue
        place = {d: 0 for d in depths}
        for node in range(nodes):
            depth = depths[node]
            if depth == tree.depth:
                continue  # a leaf has not been run
            path = [int(tree.tokens[row, i]) for i in paths[row][node] if i > 0]
            wanted = plain.after(rows.texts[row], rows.features[row], path)
            found = levels[depth].view(batch, -1, levels[depth].shape[-1])[row, place[depth]]
            place[depth] += 1
            assert error(found, wanted) < NEAR, (row, node)
            children = tree.tokens[row, tree.parents[row] == node]
            assert torch.equal(children, plain.ids(wanted.topk(len(children)).indices)), (row, node)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "before_residual": {"norm_before_residual": True},
    "3.1": {"norm_output": True, "fc_norm": True},
    "speculators": {"norm_before_residual": True, "norm_output": True, "norm_before_fc": True},
    "eps": {"rms_norm_eps": 0.3, "rope_theta": 100.0, "norm_before_fc": True},
}


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tree", [None, [2, 1, 2]], ids=["chain", "tree"])
def test_numbers_are_those_of_the_formulas(tmp_path: Path, backend: str, options: str, tree: Any) -> None:
    """Prompts in chunks, steps of every size, a row that waits, one that is refilled while the others go on."""
    toy = Toy(backend=backend, device="cpu")
    folder = random_head(tmp_path, toy, W, **OPTIONS[options])
    plain = Plain(folder, toy.embed)
    drafter = made(folder, toy, 3, num_draft_tokens=3, structure=tree, prefill_chunk=5)
    rows, levels = Rows(width(toy), toy.config.vocab_size), recorded(drafter)

    def check(num_new: Sequence[int]) -> None:
        levels.clear()
        drafted = drafter.propose(rows.inputs(num_new, drafter.depth + 1))
        check_numbers(plain, rows, drafted, levels, [count > 0 for count in num_new])

    check(rows.begin([14, 2, 6]))
    check(rows.advance([4, 1, 2]))
    check(rows.advance([0, 3, 1]))
    check(rows.advance([1, 4, 2], renew=2, length=17))
    check(rows.advance([2, 0, 4]))


@pytest.mark.parametrize("drafts", [None, W])
def test_weights_in_fp8_are_multiplied_out(tmp_path: Path, toy: Toy, drafts: int | None) -> None:
    config = head_config(toy.config, drafts)
    folder = write_head(tmp_path, config, in_fp8(head_tensors(config)))
    drafter = made(folder, toy, 2)
    rows, levels = Rows(width(toy), toy.config.vocab_size), recorded(drafter)
    drafted = drafter.propose(rows.inputs(rows.begin([4, 7]), 5))
    check_numbers(Plain(folder, toy.embed), rows, drafted, levels, [True, True])
    if drafts is None:
        assert drafter.model.token_ids is None


def test_bfloat16_is_near(tmp_path: Path) -> None:
    toy = Toy(dtype="bfloat16", device="cpu")
    folder = random_head(tmp_path, toy, W)
    drafter = made(folder, toy, 1)
    rows, levels = Rows(width(toy), toy.config.vocab_size), recorded(drafter)
    inputs = rows.inputs(rows.begin([9]), 5)
    assert inputs.features is not None
    inputs.features = inputs.features.bfloat16()
    drafter.propose(inputs)
    wanted = Plain(folder, toy.embed).after(rows.texts[0], inputs.features[0, :8], [])
    assert error(levels[0][0], wanted) < 0.03


@pytest.mark.parametrize("tree", [None, [3, 2]], ids=["chain", "tree"])
def test_steps_leave_what_a_fresh_request_would(tmp_path: Path, toy: Toy, tree: Any) -> None:
    """Bit for bit, after many steps and rejected drafts, and however the prompt was cut."""
    folder = random_head(tmp_path, toy, W)
    drafter = made(folder, toy, 2, structure=tree)
    rows = Rows(width(toy), toy.config.vocab_size)
    drafter.propose(rows.inputs(rows.begin([3, 30]), drafter.depth + 1))
    for counts in ([1, 2], [3, 1], [2, 3], [1, 1]):
        levels = recorded(drafter)
        drafted = drafter.propose(rows.inputs(rows.advance(counts), drafter.depth + 1))
    for chunk in (256, 7, 1):
        fresh = made(folder, toy, 2, structure=tree, prefill_chunk=chunk)
        found = recorded(fresh)
        again = fresh.propose(rows.inputs([len(text) - 1 for text in rows.texts], 0))
        assert torch.equal(again.tokens, drafted.tokens)
        assert all(torch.equal(a, b) for a, b in zip(found, levels, strict=True)), chunk


@pytest.mark.parametrize("room", [240, 256])
def test_a_full_row_stays_inside_the_cache_while_another_is_filled(tmp_path: Path, room: int) -> None:
    """The torch backend raises where a write falls outside."""
    toy = Toy(backend="torch", device="cpu")
    folder = random_head(tmp_path, toy, W)
    drafter = made(folder, toy, 2, room=room, prefill_chunk=16)
    rows = Rows(width(toy), toy.config.vocab_size)
    drafter.propose(rows.inputs(rows.begin([room - 4, 9]), 5))
    tree = drafter.propose(rows.inputs(rows.advance([4, 0], renew=1, length=180), 5))
    fresh = made(folder, toy, 2, room=room)
    assert torch.equal(tree.tokens, fresh.propose(rows.inputs([room - 1, 179], 5)).tokens)


@pytest.mark.parametrize("law", ["distinct", "iid"])
def test_a_reduced_vocabulary_has_a_law_over_the_whole(tmp_path: Path, toy: Toy, law: Any) -> None:
    folder = random_head(tmp_path, toy, W)
    plain = Plain(folder, toy.embed)
    drafter = made(folder, toy, 2, law, structure=[3, 2])
    rows = Rows(width(toy), toy.config.vocab_size)
    inputs = rows.inputs(rows.begin([5, 8]), 3, temperature=0.7)
    tree = drafter.propose(inputs)
    assert tree.probs is not None
    assert tree.probs.shape == (2, 10, toy.config.vocab_size)
    paths = tree.paths()
    for row in range(2):
        for node in range(4):
            path = [int(tree.tokens[row, i]) for i in paths[row, node] if i > 0]
            logits = plain.after(rows.texts[row], rows.features[row], path).float()
            wanted = torch.zeros(toy.config.vocab_size)
            wanted[plain.ids(torch.arange(W))] = warp(logits.expand(2, 1, -1), inputs.sampling)[row, 0].softmax(-1)
            torch.testing.assert_close(tree.probs[row, node], wanted, atol=1e-5, rtol=1e-3)
            children = tree.tokens[row, tree.parents[row] == node]
            assert (wanted[children] > 0).all()
            assert law == "iid" or len(children.unique()) == len(children)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_gpus_kernels_compute_the_head(toy: Toy, options: str) -> None:
    """Through Triton's interpreter on the CPU, as compiled on a GPU: a committed stretch, then a level of a tree."""
    config = EagleConfig.from_dict(head_config(toy.config, W, **OPTIONS[options]))
    tensors = head_tensors(head_config(toy.config, W, **OPTIONS[options]))
    draw = torch.Generator().manual_seed(0)
    features, tokens = torch.randn(6, width(toy), generator=draw), torch.arange(10, 16).view(2, 3)
    results = []
    for ops in (reference, Ops(DEVICE)):
        with DEVICE:
            model, cache = EagleModel(config, torch.float32), KVCache(config.layer, 2, 32, torch.float32, DEVICE)
            prefix = torch.tensor([0, 2], dtype=torch.int32)
            load_state(model, tensors.items())
            model.pack(ops, toy.embed.to(DEVICE))
            first = ModelInputs(tokens.to(DEVICE), prefix[:, None] + torch.arange(3).int(), prefix)
            states, nothing = model(first, model.fuse(features.to(DEVICE)), cache, logits=False)
            assert nothing is None
            paths = torch.tensor([[[0, 1], [0, 2]]] * 2, dtype=torch.int32)
            level = ModelInputs(first.tokens[:, 1:], (prefix[:, None] + 3).repeat(1, 2), prefix + 2, paths, 1)
            last = states.view(2, 3, -1)[:, -1:].repeat(1, 2, 1).flatten(0, 1)
            results.append((states.clone(), *model(level, last, cache), model.logits(states)))
    for wanted, found in zip(*results, strict=True):
        assert error(found.cpu(), wanted.cpu()) < 1e-5


# ---- training is inference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_training_computes_the_head(tmp_path: Path, toy: Toy, options: str) -> None:
    """With the same weights, at every step of its own outputs."""
    folder = random_head(tmp_path, toy, W, **OPTIONS[options])
    plain, tensors = Plain(folder, toy.embed), load_file(folder / "model.safetensors")
    head = Eagle3Head(EagleConfig.from_dict(plain.config), tensors["d2t"], tensors["t2d"], depth=3)
    head.load_state_dict(tensors)
    rows = Rows(width(toy), toy.config.vocab_size)
    rows.begin([7])
    drafts = rows.random(2)
    features = F.pad(rows.features[0], (0, 0, 0, len(drafts) + 1))
    with torch.no_grad():
        states = head(torch.tensor([rows.texts[0] + drafts]), features[None], toy.embed)
        for j, state in enumerate(states):
            wanted = plain.after(rows.texts[0], rows.features[0], drafts[:j])
            assert error(head.logits(j, state[0, 5]), wanted) < NEAR, j


def test_the_config_makes_a_head_with_a_norm_before_fc(tmp_path: Path, toy: Toy) -> None:
    with initialize_config_module("specdec.conf", version_base="1.3"):
        config = compose("train", overrides=["drafter=eagle3", "training.head.norm_before_fc=true"]).training.head
    head = build(config, "training.head")(target=toy, d2t=None, t2d=None, seed=0)
    with torch.no_grad():
        head.input_norm.weight[0] = 1.001  # bfloat16 has no such number
    export(head, tmp_path, "bfloat16", {})
    drafter = made(tmp_path, toy, 1)
    assert drafter.config == head.config
    assert drafter.config.norm_before_fc
    assert torch.equal(drafter.model.taps_norm, head.input_norm.weight.detach())


# ---- in the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tree", "drafts"), [(None, None), ([2, 2], W)], ids=["chain", "tree"])
def test_it_conforms(tmp_path: Path, toy: Toy, tree: Any, drafts: int | None) -> None:
    folder = random_head(tmp_path, toy, drafts)
    check_drafter(lambda: Eagle3(folder, num_draft_tokens=3, structure=tree), TargetOnly(), toy)


class Shadow(Drafter):
    """Proposes what another drafter does, and keeps what the head would have proposed."""

    def __init__(self, head: Eagle3, other: Drafter, ahead: bool) -> None:
        """ahead: whether the head reads prompts before the first step, or in it."""
        self.head, self.other, self.ahead = head, other, ahead
        self.num_draft_tokens, self.depth, self.features = other.num_draft_tokens, other.depth, head.features
        self.seen: list[tuple[list[Text], Tensor]] = []

    def setup(self, *args: Any) -> None:
        self.head.setup(*args)
        self.other.setup(*args)

    def prefill(self, inputs: DraftInputs) -> bool:
        return self.ahead and self.head.prefill(inputs)

    def propose(self, inputs: DraftInputs) -> DraftTree:
        drafted = self.head.propose(inputs)
        lengths = inputs.lengths * (inputs.num_new > 0)
        self.seen.append(([x[:n].tolist() for x, n in zip(inputs.tokens, lengths, strict=True)], drafted.tokens))
        return self.other.propose(inputs)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_the_loops_features_meet_their_tokens(tmp_path: Path, toy: Toy, tree: bool, ahead: bool) -> None:
    """Where drafts are accepted, rejected, and rows refilled, the head drafts what it would from the features of a prefill."""
    folder = random_head(tmp_path, toy, W)
    prompts = [list(p) for p in PROMPTS]
    plain = SpeculativeDecoder(toy, NoDraft(), TargetOnly()).generate(prompts, 16, ignore_eos=True)
    known = [p + t for p, t in zip(prompts, plain.tokens, strict=True)]
    shadow = Shadow(Eagle3(folder, num_draft_tokens=2), Replay(known, depth=3, tree=tree), ahead)
    result = SpeculativeDecoder(toy, shadow, TargetOnly(), batch_size=3).generate(prompts, 16, ignore_eos=True)
    assert result.tokens == plain.tokens
    assert result.trace.acceptance_length > 1.5
    formulas, checked = Plain(folder, toy.embed), 0
    for texts, drafted in shadow.seen[::3]:
        for row, text in enumerate(texts):
            if not text:
                continue
            toy.allocate(1, len(text), 1, shadow.features)
            features = toy.prefill(torch.tensor([text[:-1]]), torch.tensor([len(text) - 1])).features
            assert features is not None
            path: Text = []
            for found in drafted[row, 1:].tolist():
                path.append(int(formulas.ids(formulas.after(text, features[0], path).argmax())))
                assert path[-1] == found
                checked += 1
    assert checked > 15


@pytest.mark.parametrize(("verifier", "tree"), [(SpeculativeSampling(), None), (RRS(), [2, 2]), (RRS(True), [2, 1])])
def test_drawn_drafts_meet_verifiers_that_need_laws(tmp_path: Path, toy: Toy, verifier: Any, tree: Any) -> None:
    folder = random_head(tmp_path, toy, W)
    decoder = SpeculativeDecoder(toy, Eagle3(folder, structure=tree), verifier, SamplingParams(temperature=2.0), 2)
    result = decoder.generate([[1, 2, 3], [4, 5], [6]], 24, ignore_eos=True)
    assert [len(tokens) for tokens in result.tokens] == [24] * 3
    assert result.trace.acceptance_length > 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("tree", [None, [2, 2]], ids=["chain", "tree"])
def test_a_step_is_a_graph_without_reads(tmp_path: Path, tree: Any) -> None:
    target = Toy(device="cuda")
    folder = random_head(tmp_path, target, W)
    for temperature in (0.0, 1.0):
        stepped(Eagle3(folder, structure=tree), RRS() if tree else SpeculativeSampling(), SamplingParams(temperature))
    plain = SpeculativeDecoder(target, NoDraft(), TargetOnly(), batch_size=2).generate([*PROMPTS], 40, ignore_eos=True)
    traces = []
    for use_graphs in (False, True):
        drafter = Eagle3(folder, structure=tree)
        decoder = SpeculativeDecoder(target, drafter, TargetOnly(), batch_size=2, use_graphs=use_graphs)
        result = decoder.generate([*PROMPTS], 40, ignore_eos=True)
        assert result.tokens == plain.tokens
        traces.append(result.trace.num_accepted)
    assert torch.equal(*traces)


def test_a_second_target_gets_a_head_of_its_own(tmp_path: Path, toy: Toy) -> None:
    drafter = made(random_head(tmp_path, toy, W), toy, 1)
    first = drafter.model
    drafter.setup(toy, 2, 300, "any")
    assert drafter.model is first
    other = Toy(seed=1, device="cpu")
    other.allocate(1, 16, 1)
    drafter.setup(other, 1, 16, "any")
    assert drafter.model is not first
    assert drafter.model.embedding is other.embed


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_a_name_is_a_folder_or_a_shipped_head(tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = [path.parent for path in _head.HEADS.glob("*/config.json")]
    assert shipped
    assert [_head.find_head(folder.name) for folder in shipped] == shipped
    monkeypatch.setattr(_head, "HEADS", tmp_path)
    for folder in shipped:
        with pytest.raises(ValueError, match=r"\(none does\), nor OWNER/NAME on the Hub: give the folder"):
            Eagle3(folder.name)
    with pytest.raises(ValueError, match="some/where is neither a folder nor a Hub repository"):
        Eagle3("some/where")
    random_head(tmp_path / "small", toy)
    random_head(tmp_path / "other", toy)
    assert Eagle3("small").folder == tmp_path / "small"
    with pytest.raises(ValueError, match=r"nowhere is neither .* \(other, small\)"):
        Eagle3("nowhere")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures is \['LlamaForCausalLM'\].*LlamaForCausalLMEagle3"),
        ({"feature_layers": None}, "lacks feature_layers"),
        ({"feature_layers": []}, "lacks feature_layers"),
        ({"feature_layers": [-1]}, r"feature_layers \[-1\]"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ({"draft_vocab_size": 261}, "draft_vocab_size 261 must be 1 to vocab_size, 260"),
        ({"target_hidden_size": 128}, "hidden_size is 64, target_hidden_size 128"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_key_value_heads": 3}, "4 query heads do not share 3 KV heads"),
        ({"norm_before_fc": True, "fc_norm": True}, "norm_before_fc=True and fc_norm=True: .* switch one of them off"),
    ],
)
def test_a_config_that_no_head_has(tmp_path: Path, toy: Toy, changes: dict[str, Any], words: str) -> None:
    config = head_config(toy.config, W)
    write_head(tmp_path, config | changes, head_tensors(config))
    with pytest.raises(ValueError, match=words) as caught:
        Eagle3(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({"sliding_window": 2048}, 4096),
        ({"sliding_window": 2048, "use_sliding_window": False, "max_window_layers": 0}, 4096),
        ({"sliding_window": 2048, "use_sliding_window": True, "max_window_layers": 28}, 4096),
        ({"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, 9),
        (SLIDING | {"layer_types": ["full_attention"]}, 4096),
        (SLIDING | {"sliding_window": None}, 4096),
        (SLIDING | {"sliding_window": 5000}, 4096),
        (SLIDING | {"use_sliding_window": False}, 2048),
    ],
)
def test_a_head_with_a_window_is_made_for_so_many_positions(
    tmp_path: Path, toy: Toy, changes: dict[str, Any], positions: int
) -> None:
    """Within its window attention over everything is the same; beyond it the loader warns, as of any head's limit."""
    drafter = Eagle3(random_head(tmp_path, toy, W, **changes))
    assert drafter.config.layer.max_positions == positions
    limit = toy.config.max_positions
    with pytest.warns(UserWarning, match=f"made for {positions} positions") if positions < limit else nullcontext():
        drafter.setup(toy, 1, limit + 10, "any")


def test_a_config_survives_its_json(toy: Toy) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 2048
    config = EagleConfig.from_dict(head_config(toy.config, W, norm_output=True, fc_norm=True, rope_scaling=scaling))
    assert EagleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (config.norm_output, config.norm_before_residual, config.norm_before_fc) == (True, False, False)
    config = EagleConfig.from_dict(head_config(toy.config, W, norm_before_fc=True))
    assert EagleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("target", "changes", "words"),
    [
        ({"hidden_size": 128}, {}, "hidden_size 64, this target's is 128: take a head"),
        ({"vocab_size": 300}, {}, "vocab_size 260, this target's is 300: take a head"),
        ({}, {"feature_layers": [0, 7]}, r"taps layers \[0, 7\], this target has 0 to 1: take a head"),
    ],
)
def test_a_head_for_another_target(
    tmp_path: Path, toy: Toy, target: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    folder = random_head(tmp_path, toy, W, **changes)
    with pytest.raises(ValueError, match=words):
        made(folder, Toy(device="cpu", **target), 1)


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("d2t"), "lacks d2t, and its config.json has draft_vocab_size 96 of vocab_size 260"),
        (without("d2t", "t2d"), "lacks d2t and t2d"),
        (without("fc.weight"), r"lacks fc\.weight"),
        (lambda x: x | {"input_norm.weight": torch.ones(128)}, r"has in excess input_norm\.weight"),
        (lambda x: x | {"norm.bias": x["norm.weight"].clone()}, r"has in excess norm\.bias"),
        (lambda x: x | {"embed_tokens.weight": x["norm.weight"].clone()}, r"target's in shape, \[64\] and \[260, 64\]"),
        (lambda x: x | {"fc.weight": x["fc.weight"][1:].clone()}, r"fc\.weight is \[63, 128\] in .* \[64, 128\]"),
        (lambda x: x | {"norm.weight": x["norm.weight"] * torch.nan}, r"norm\.weight holds NaN"),
        (lambda x: x | {"t2d": ~x["t2d"]}, "d2t and t2d disagree: 96 draft ids .* 164 marked of 260"),
        (lambda x: x | {"d2t": x["d2t"] * 0 + 200}, "d2t and t2d disagree"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, toy: Toy, change: Callable[[Tensors], Tensors], words: str) -> None:
    config = head_config(toy.config, W)
    write_head(tmp_path, config, change(head_tensors(config)))
    with pytest.raises(ValueError, match=words) as caught:
        made(tmp_path, toy, 1)
    assert str(tmp_path) in str(caught.value)


def test_a_file_cut_short(tmp_path: Path, toy: Toy) -> None:
    path = random_head(tmp_path, toy, W) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
        made(tmp_path, toy, 1)
    path.unlink()
    with pytest.raises(ValueError, match="no weights"):
        made(tmp_path, toy, 1)


def test_too_few_positions_warn_once(tmp_path: Path, toy: Toy) -> None:
    folder = random_head(tmp_path, toy, W, max_position_embeddings=100)
    drafter = Eagle3(folder)
    toy.allocate(1, 128, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drafter.setup(toy, 1, 100, "any")
    with pytest.warns(UserWarning, match="made for 100 positions, and 128 are asked for"):
        drafter.setup(toy, 1, 128, "any")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drafter.setup(toy, 1, 128, "any")


def test_a_target_without_features_is_named(tmp_path: Path, toy: Toy) -> None:
    drafter = made(random_head(tmp_path, toy, W), toy, 1)
    rows = Rows(width(toy), toy.config.vocab_size)
    inputs = rows.inputs(rows.begin([4]), 5)
    inputs.features = None
    with pytest.raises(ValueError, match="Toy gives no features: use target=llama"):
        drafter.propose(inputs)
