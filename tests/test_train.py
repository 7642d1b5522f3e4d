"""Training a head: the training-time test is inference, losses mean what they say, runs go on bit for bit, and it learns.

Run as a script it is one of several ranks: its argument is the folder to train in.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command import CommandLine, check_mistake
from heads import head_config, head_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import write_questions
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from specdec.decoding import SpeculativeDecoder
from specdec.drafter.eagle3 import Eagle3
from specdec.drafter.none import NoDraft
from specdec.kernels.reference import rms_norm
from specdec.nn.eagle import EagleConfig
from specdec.nn.rope import rope_tables
from specdec.target.ranks import Ranks, join, leave
from specdec.target.toy import Toy
from specdec.train.checkpoint import latest
from specdec.train.corpus import Batch
from specdec.train.eagle3 import Eagle3Head, _fused_chain_attention, chain_attention, make_head
from specdec.train.export import export
from specdec.train.features import Features
from specdec.train.losses import LOSSES, Law, acceptance_rate, target_law
from specdec.train.params import TrainingParams
from specdec.train.trainer import Trainer
from specdec.train.vocabulary import draft_vocabulary
from specdec.verifier.target_only import TargetOnly

# ---- the training-time test ------------------------------------------------------------------------------------------


def random_head(target: Toy, drafts: int | None = None, depth: int = 3, **switches: bool) -> Eagle3Head:
    """A head of random weights."""
    described = head_config(target.config, drafts, **switches)
    tensors = head_tensors(described)
    head = Eagle3Head(EagleConfig.from_dict(described), tensors.get("d2t"), tensors.get("t2d"), depth)
    head.load_state_dict(tensors)
    return head


def recurrence(
    head: Eagle3Head, tokens: Tensor, features: Tensor, embed: Tensor, start: int, steps: int
) -> list[Tensor]:
    """What inference does from position `start` of one row: entries of true features up to it, then its own outputs."""
    weights, config, layer = head.state_dict(), head.config, head.config.layer
    cos, sin = rope_tables(layer, 64, tokens.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def product(name: str, x: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ x

    def norm(name: str, x: Tensor) -> Tensor:
        return rms_norm(x, weights[f"{name}.weight"], layer.rms_norm_eps)

    def turn(x: Tensor, at: int) -> Tensor:
        first, second = x.view(-1, 2, layer.head_dim // 2).unbind(1)
        return torch.cat([first * cos[at] - second * sin[at], second * cos[at] + first * sin[at]], -1)

    def entry(token: Tensor, h: Tensor, at: int) -> Tensor:
        normed = norm("midlayer.hidden_norm", h)
        y = torch.cat([norm("midlayer.input_layernorm", embed[token]), normed])
        q, k = (turn(product(f"midlayer.self_attn.{name}_proj", y), at) for name in "qk")
        keys.append(k)
        values.append(product("midlayer.self_attn.v_proj", y).view_as(k))
        parts = []
        for i, query in enumerate(q):
            group = i * layer.num_kv_heads // layer.num_heads
            scores = torch.stack([key[group] @ query for key in keys]) * layer.head_dim**-0.5
            parts.append(scores.softmax(0) @ torch.stack([value[group] for value in values]))
        x = (normed if config.norm_before_residual else h) + product("midlayer.self_attn.o_proj", torch.cat(parts))
        z = norm("midlayer.post_attention_layernorm", x)
        inner = F.silu(product("midlayer.mlp.gate_proj", z)) * product("midlayer.mlp.up_proj", z)
        return x + product("midlayer.mlp.down_proj", inner)

    def reduced(x: Tensor) -> Tensor:
        if config.fc_norm:
            x = torch.cat([norm(f"fc_norm.{i}", part) for i, part in enumerate(x.chunk(len(head.taps)))])
        return product("fc", x)

    for at in range(start + 1):
        g = entry(tokens[at + 1], reduced(features[at]), at)
    found = [g]
    for j in range(1, steps):
        g = entry(tokens[start + 1 + j], norm("norm", g) if config.norm_output else g, start + j)
        found.append(g)
    return found


@pytest.mark.parametrize("switches", [{}, {"norm_before_residual": True, "norm_output": True, "fc_norm": True}])
def test_the_training_time_test_is_the_recurrence_of_inference(toy: Toy, switches: dict[str, bool]) -> None:
    head, steps = random_head(toy, depth=4, **switches), 4
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (2, 9), generator=draw)
    features = torch.randn(2, 9, len(head.taps) * toy.config.hidden_size, generator=draw)
    with torch.no_grad():
        states = head(tokens, features, toy.embed)
    for row in range(2):
        for start in range(9 - steps):
            expected = recurrence(head, tokens[row], features[row], toy.embed, start, steps)
            for j, g in enumerate(expected):
                torch.testing.assert_close(states[j][row, start], g, rtol=1e-4, atol=1e-5)


def test_a_later_token_is_not_seen(toy: Toy) -> None:
    """The state of step j at position t knows tokens up to t + 1 + j and features up to t."""
    head, tokens = random_head(toy), torch.arange(8)[None]
    features = torch.randn(1, 8, len(head.taps) * toy.config.hidden_size, generator=torch.Generator().manual_seed(0))
    changed_tokens, changed = tokens.clone(), features.clone()
    changed_tokens[0, 6:] += 9
    changed[0, 4:] += 1.0
    with torch.no_grad():
        before = head(tokens, features, toy.embed)
        for j, (a, b) in enumerate(zip(before, head(changed_tokens, features, toy.embed), strict=True)):
            assert torch.equal(a[0, : 5 - j], b[0, : 5 - j])
            assert not torch.equal(a[0, 5 - j], b[0, 5 - j])
        for a, b in zip(before, head(tokens, changed, toy.embed), strict=True):
            assert torch.equal(a[0, :4], b[0, :4])
            assert not torch.equal(a[0, 4], b[0, 4])


# ---- losses ----------------------------------------------------------------------------------------------------------


def random_law(seed: int, n: int = 5, drafts: int = 7, covered: bool = True) -> Law:
    """Sharp and flat laws; without `covered` part of the mass lies outside the draft vocabulary."""
    draw = torch.Generator().manual_seed(seed)
    whole = (torch.randn(n, drafts + 3, generator=draw) * torch.logspace(-1, 1.5, n)[:, None]).softmax(-1)
    best = whole.argmax(-1)
    if covered:
        whole = whole[:, :drafts] / whole[:, :drafts].sum(-1, keepdim=True)
        best = whole.argmax(-1)
    inside = torch.where(best < drafts, best, -1)
    return Law(whole[:, :drafts], inside, inside)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_attention_over_a_chain_under_a_mask(steps: int) -> None:
    """What a GPU computes at once: the same values and gradients."""
    draw = torch.Generator().manual_seed(steps)
    q = torch.randn(2, 9, 6, 8, generator=draw).requires_grad_()
    keys, values = ([torch.randn(2, 9, 2, 8, generator=draw).requires_grad_() for _ in range(steps)] for _ in range(2))
    results = [attend(q, keys, values) for attend in (chain_attention, _fused_chain_attention)]
    slope = torch.randn(results[0].shape, generator=draw)
    grads = [torch.autograd.grad((result * slope).sum(), [q, *keys, *values]) for result in results]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(sorted(LOSSES)), st.booleans(), st.floats(0.1, 60))
def test_losses_are_finite_with_their_gradients(seed: int, name: str, covered: bool, spread: float) -> None:
    law = random_law(seed, covered=covered)
    logits = (torch.randn(5, 7, generator=torch.Generator().manual_seed(seed + 1)) * spread).requires_grad_()
    log_q = logits.log_softmax(-1)
    loss = LOSSES[name](log_q, law)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    alpha = acceptance_rate(log_q, law)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert (loss > -1e-5).all()
    assert ((alpha >= 0) & (alpha <= 1 + 1e-5)).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["kl", "acceptance", "hybrid"]), st.booleans())
def test_the_best_draft_law_is_the_targets_own(seed: int, name: str, covered: bool) -> None:
    law = random_law(seed, covered=covered)
    mass = law.probs.sum(-1, keepdim=True)
    best = (law.probs / mass).clamp(min=1e-30).log()
    other = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed + 1)).log_softmax(-1)
    lowest = LOSSES[name](best, law)
    assert (lowest <= LOSSES[name](other, law) + 1e-5).all()
    if name != "hybrid":  # whose 1 - alpha is what the draft vocabulary leaves out
        torch.testing.assert_close(lowest, torch.zeros(5), atol=1e-5, rtol=0)


def test_labels_outside_the_draft_vocabulary_count_nothing() -> None:
    law = Law(torch.full((2, 3), 0.2), torch.tensor([1, -1]), torch.tensor([-1, 2]))
    log_q = torch.tensor([[0.2, 0.5, 0.3]] * 2).log()
    torch.testing.assert_close(LOSSES["cross_entropy"](log_q, law), torch.tensor([-torch.tensor(0.5).log(), 0.0]))
    torch.testing.assert_close(LOSSES["text"](log_q, law), torch.tensor([0.0, -torch.tensor(0.3).log()]))


def test_the_law_is_the_targets_restricted(toy: Toy) -> None:
    head = random_head(toy, drafts=100)
    assert head.d2t is not None
    hidden, text = torch.randn(4, 64), torch.tensor([0, 1, 2, 259])
    whole = (hidden @ toy.lm_head.T).softmax(-1)
    law = target_law(hidden, toy.lm_head, text, head.ids, head.index)
    ids = [i + int(head.d2t[i]) for i in range(100)]
    torch.testing.assert_close(law.probs, whole[:, ids])
    wanted = [ids.index(int(i)) if int(i) in ids else -1 for i in whole.argmax(-1)]
    assert law.best.tolist() == wanted
    assert law.text.tolist() == [ids.index(int(i)) if int(i) in ids else -1 for i in text]


# ---- the loop --------------------------------------------------------------------------------------------------------

TEXT_LEN = 40


@pytest.fixture(scope="module")
def text(toy: Toy) -> Batch:
    return spoken(toy)


def spoken(toy: Toy) -> Batch:
    """Eight rows of what the toy says, prompts of four tokens before it."""
    prompts = torch.randint(0, 256, (8, 4), generator=torch.Generator().manual_seed(3)).tolist()
    decoder = SpeculativeDecoder(toy, NoDraft(), TargetOnly(), batch_size=8)
    answers = decoder.generate(prompts, TEXT_LEN - 4, ignore_eos=True).tokens
    tokens = torch.tensor([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
    lengths = torch.full((8,), TEXT_LEN, dtype=torch.int32)
    lengths[1] = 25
    position = torch.arange(TEXT_LEN).expand(8, -1)
    mask = (position >= 4) & (position < lengths[:, None])
    return Batch(tokens * (position < lengths[:, None]), lengths, mask, torch.arange(8))


def fresh_head(toy: Toy, drafts: int | None = 200, depth: int = 3) -> Eagle3Head:
    """As `specdec train` begins."""
    d2t, t2d = (None, None) if drafts is None else draft_vocabulary(torch.arange(260), drafts)
    return make_head(toy, d2t, t2d, depth=depth, intermediate_size=64)


def trainer(
    toy: Toy, text: Batch, folder: Path, head: Eagle3Head | None = None, ranks: Ranks | None = None, **options: Any
) -> Trainer:
    """Over batches of four rows, two an epoch; `options` are those of TrainingParams."""
    head = head or fresh_head(toy)
    halves = [Batch(*(x[rows] for x in text)) for rows in (torch.arange(4), torch.arange(4, 8))]

    def batches(epoch: int, start: int) -> Iterator[Batch]:
        return iter([*halves[epoch % 2 :], *halves[: epoch % 2]][start:])

    options = {"steps": 6, "micro_batch": 4, "warmup": 2, "learning_rate": 3e-3, "log_interval": 1, **options}
    params = TrainingParams(**options)
    return Trainer(head, toy.embed, toy.lm_head, Features(toy, head.taps), batches, params, folder, ranks)


def nothing(step: int) -> dict[str, Any]:
    return {"tau": {}}


QUIET = Console(quiet=True)


def weights(folder: Path) -> dict[str, Tensor]:
    """Head and moments of the newest checkpoint."""
    place = latest(folder / "checkpoints")
    assert place is not None
    return {
        f"{file}.{k}": v for file in ("head", "optimizer") for k, v in load_file(place / f"{file}.safetensors").items()
    }


@pytest.mark.gpu
def test_the_law_from_a_bfloat16_head_is_that_of_its_exact_products() -> None:
    draw = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(37, 576, generator=draw).bfloat16(), torch.randn(1000, 576, generator=draw).bfloat16()
    text = torch.arange(37)
    law = target_law(hidden.cuda(), head.cuda(), text.cuda(), None, None)
    exact = (hidden.double() @ head.double().t()).softmax(-1)
    assert law.probs.dtype == torch.float32
    assert (law.probs.cpu() - exact).abs().max() < 1e-4
    assert torch.equal(law.best.cpu(), exact.argmax(-1))


def test_rows_at_once_and_chunks_change_nothing(toy: Toy, text: Batch, tmp_path: Path) -> None:
    """A batch's gradient is a sum: the same in parts, but for rounding."""
    found = []
    for micro, chunk in ((4, 1024), (1, 7)):
        made = trainer(toy, text, tmp_path, micro_batch=micro, chunk=chunk, clip=1e9)
        made.standing.step = 1
        sums, norm = made._step(Batch(*(x[:4] for x in text)))
        found.append(
            (sums, norm, {name: p.grad.clone() for name, p in made.head.named_parameters() if p.grad is not None})
        )
    (sums, norm, grads), (others, other, parts) = found
    torch.testing.assert_close(sums, others, rtol=1e-4, atol=1e-4)
    assert norm == pytest.approx(other, rel=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, parts[name], rtol=1e-3, atol=1e-6)
        assert grad.abs().sum() > 0, name


def test_the_gradient_is_that_of_the_loss_written_down(toy: Toy, text: Batch, tmp_path: Path) -> None:
    """Against autograd over one plain sum: which position judges which prediction, the weights, the mean."""
    made = trainer(toy, text, tmp_path, clip=1e9)
    made.standing.step = 1
    head = copy.deepcopy(made.head)
    made._step(text)
    taps, hidden = made.features(text)
    states = head(text.tokens, taps, toy.embed)
    total, count = torch.zeros(()), 0
    for row in range(8):
        for token in range(4, int(text.lengths[row])):
            law = target_law(
                hidden[row, token - 1][None], toy.lm_head, text.tokens[row, token][None], head.ids, head.index
            )
            count += 1
            for j in range(3):
                if token - 2 - j >= 0:
                    log_q = head.logits(j, states[j][row, token - 2 - j][None]).log_softmax(-1)
                    total = total + 0.8**j * LOSSES["kl"](log_q, law).sum()
    (total / count).backward()
    for (name, ours), theirs in zip(made.head.named_parameters(), head.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-3, atol=1e-6, msg=name)


def test_a_resumed_run_is_the_uninterrupted_one(toy: Toy, text: Batch, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(toy, text, whole, checkpoint_interval=2).train(nothing, QUIET)

    def killed(step: int) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(toy, text, parts, checkpoint_interval=2, eval_interval=3).train(killed, QUIET)
    assert latest(parts / "checkpoints") == parts / "checkpoints" / "step-00000002"
    (parts / "checkpoints" / ".step-00000004.part").mkdir()  # a kill while it wrote
    trainer(toy, text, parts, checkpoint_interval=2).train(nothing, QUIET)
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [place.name for place in sorted((parts / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    logs = [[json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()] for run in (whole, parts)]
    for rows in logs:
        for row in rows:
            row.pop("tokens_per_second", None)
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == [1, 2, 3, 4, 5, 6, 6]


def test_a_damaged_checkpoint_is_named(toy: Toy, text: Batch, tmp_path: Path) -> None:
    trainer(toy, text, tmp_path, steps=2, checkpoint_interval=1).train(nothing, QUIET)
    newest = tmp_path / "checkpoints" / "step-00000002"
    (newest / "head.safetensors").write_bytes((newest / "head.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-00000002 is damaged .* delete it to go on"):
        trainer(toy, text, tmp_path).train(nothing, QUIET)
    shutil.rmtree(newest)
    with pytest.raises(ValueError, match="step-00000001 holds another head"):
        trainer(toy, text, tmp_path, head=fresh_head(toy, drafts=100)).train(nothing, QUIET)


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(toy: Toy, text: Batch, tmp_path: Path) -> None:
    made = trainer(toy, text, tmp_path, checkpoint_interval=1, micro_batch=2)
    honest, made.name_row = made.features, lambda row: f"shard 0, row {row}"

    def poisoned(batch: Batch) -> tuple[Tensor, Tensor]:
        taps, hidden = honest(batch)
        if made.standing.step == 3:
            taps[batch.rows == 6] = torch.nan
        return taps, hidden

    made.features = poisoned
    with pytest.raises(ValueError, match=r"not finite at step 3 .*epoch 1, batch 0") as error:
        made.train(nothing, QUIET)
    assert "shard 0, row 6; shard 0, row 7" in str(error.value)
    assert "shard 0, row 4" not in str(error.value)
    assert "step-00000002 is kept" in str(error.value)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_half_precision_is_close(toy: Toy, text: Batch, tmp_path: Path) -> None:
    norms = []
    for precision in ("float32", "bfloat16"):
        made = trainer(toy, text, tmp_path, precision=precision)
        made.standing.step = 1
        sums, norm = made._step(text)
        norms.append((norm, float(sums[:, 0].sum())))
    assert norms[0] == pytest.approx(norms[1], rel=0.03)
    assert norms[0] != norms[1]


def test_two_processes_are_one(toy: Toy, text: Batch, tmp_path: Path) -> None:
    """Each has a target of its own and every second row; what they add up is the gradient of one."""
    one, two = tmp_path / "one", tmp_path / "two"
    trainer(toy, text, one, micro_batch=2).train(nothing, QUIET)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
        str(two),
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    a, b = weights(one), weights(two)
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-3, atol=1e-4, msg=name)
    rows = [json.loads((run / "train.jsonl").read_text().splitlines()[-2]) for run in (one, two)]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)
    assert rows[0]["tokens"] == rows[1]["tokens"]


def train_as_rank(folder: Path) -> None:
    """One of several processes, with a toy of its own."""
    world = os.environ.pop("WORLD_SIZE")  # a toy would share itself among the processes
    toy = Toy()
    os.environ["WORLD_SIZE"] = world
    trainer(toy, spoken(toy), folder, ranks=join(), micro_batch=2).train(nothing, QUIET)
    leave()
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]  # none outside Linux
    assert not [name for name in threads if "gloo" in name], threads  # one that meets the end of the process aborts it


# ---- what it learns --------------------------------------------------------------------------------------------------


def accepted(toy: Toy, folder: Path, text: Batch) -> float:
    """Acceptance length of an exported head on the text's own prompts."""
    decoder = SpeculativeDecoder(toy, Eagle3(folder, num_draft_tokens=3), TargetOnly(), batch_size=4)
    result = decoder.generate(text.tokens[:, :4].tolist(), TEXT_LEN - 4, ignore_eos=True)
    assert result.tokens[0] == text.tokens[0, 4:].tolist()
    return result.trace.acceptance_length


@pytest.mark.parametrize(
    ("loss", "storage", "shift"), [("kl", "bfloat16", 0), ("hybrid", "fp8", 0), ("hybrid", "fp8", 1)]
)
def test_a_head_learns_what_its_target_says(
    toy: Toy, text: Batch, tmp_path: Path, loss: str, storage: str, shift: int
) -> None:
    """In 120 steps heads of 11 seeds gain 0.93 to 1.30; learning from the features of a token earlier (shift), 0.28 to 0.52."""
    head = fresh_head(toy, depth=3)
    export(head, tmp_path / "untrained", storage, {})
    before = accepted(toy, tmp_path / "untrained", text)
    options = {"steps": 120, "learning_rate": 1e-2, "loss": loss, "log_interval": 10}
    made = trainer(toy, text, tmp_path, head, **options)
    honest = made.features

    def shifted(batch: Batch) -> tuple[Tensor, Tensor]:
        taps, hidden = honest(batch)
        return taps.roll(shift, 1), hidden

    made.features = shifted
    made.train(nothing, QUIET)
    export(head, tmp_path / "trained", storage, {})
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()][:-1]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["accuracy"][0] > rows[0]["accuracy"][0]
    assert len(rows[0]["accuracy"]) == len(rows[0]["alpha"]) == 3
    after = accepted(toy, tmp_path / "trained", text)
    assert before < 1.5
    assert (after > before + 0.7) == (shift == 0)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def specdec(specdec: CommandLine) -> CommandLine:
    """In a folder with questions to train on and others to measure."""
    for name, count in (("questions", 16), ("measured", 3)):
        write_questions(specdec.folder / f"{name}.jsonl", (f"{name} {i * i}?" for i in range(count)), ("c0", "c1"))
    return specdec


TRAIN = [
    "train", "target=toy", "tracking=none", "run_dir=r", "max_new_tokens=12", "data.tokens=300", "data.folder=text",
    "dataset@data.prompts=jsonl", "data.prompts.path=questions.jsonl", "data.answers.max_answer=12", "data.heldout=0.2",
    "data.answers.conversations=8", "dataset=jsonl", "dataset.path=measured.jsonl", "training.steps=4",
    "training.batch_size=4", "training.eval_interval=3", "training.checkpoint_interval=2", "training.log_interval=1",
    "training.draft_vocab_size=200", "training.head.depth=2", "drafter.num_draft_tokens=2",
]  # fmt: skip


def test_a_run_leaves_a_head_with_its_card(specdec: CommandLine) -> None:
    done = specdec(*TRAIN)
    assert done.code == 0, done.err
    run = specdec.folder / "r"
    assert "step 3: acceptance length" in done.out
    assert "accept length" in done.out
    config = json.loads((run / "head" / "config.json").read_text())
    assert config["draft_vocab_size"] == 200
    assert set(config["specdec"]["acceptance"]["tau"]) == {"c0", "c1", "all"}
    card = (run / "head" / "README.md").read_text()
    for words in (
        "eagle3 head for toy", "| c0 |", "[", "4 steps of 4 rows", "train target=toy", "torch 2", "200 of 260 tokens",
        "seed 0", "temperature 0", "## Limits", "prompts kept for development",
    ):  # fmt: skip
        assert words in card, words
    assert str(specdec.folder) not in card
    log = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "tau" in row] == [3, 4]
    assert all(len(row["heldout"]["accuracy"]) == 2 for row in log if "tau" in row)
    assert {row["drafter"] for row in specdec.rows("r/trace.jsonl")} == {"none", "eagle3"}
    assert all(row["equal_to_plain"] for row in specdec.rows("r/trace.jsonl"))
    assert (run / "eval" / "step-00000003" / "DONE").exists()
    drafted = specdec(
        "target=toy", "tracking=none", "drafter=eagle3", "drafter.checkpoint=r/head", "dataset=jsonl",
        "dataset.path=measured.jsonl", "max_new_tokens=8",
    )  # fmt: skip
    assert drafted.code == 0, drafted.err
    again = specdec(*TRAIN)
    assert "r is done already" in again.out


def test_a_killed_run_goes_on(specdec: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("specdec.train.trainer.Trainer.measure", stop)
        done = specdec(*TRAIN)
    assert done.code == 130
    assert done.err.endswith("To go on: the same command with run_dir=r\n")
    assert [place.name for place in (specdec.folder / "r" / "checkpoints").glob("step-*")] == ["step-00000002"]
    check_mistake(specdec(*TRAIN, "training.learning_rate=1"), "training.learning_rate", "0.0005", "use the same value")
    monkeypatch.setattr("specdec.train.generate._write_shard", stop)  # the text is there already
    done = specdec(*TRAIN, "data.cache=false")
    assert done.code == 0, done.err
    assert (specdec.folder / "r" / "head" / "README.md").exists()


def test_features_from_disk_train_the_same_head(specdec: CommandLine) -> None:
    options = ["target.dtype=bfloat16", "training.eval_interval=9", "training.draft_vocab_size=null"]
    assert specdec(*TRAIN, *options).code == 0
    done = specdec(*TRAIN, *options, "data.cache=true", "run_dir=s")
    assert done.code == 0, done.err
    heads = [load_file(specdec.folder / run / "head" / "model.safetensors") for run in ("r", "s")]
    assert "d2t" not in heads[0]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_help_is_worth_reading(specdec: CommandLine) -> None:
    out = specdec("train", "--help").out
    kinds = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "training").glob("*.yaml"))
    assert "eagle3" in kinds
    assert f"training: {', '.join(kinds)}" in out.splitlines()
    assert max(len(line) for line in out.splitlines()) <= 125
    assert "$" not in re.sub(r"\$\{(now|hydra|seed).*?\}", "", out)
    for line in re.findall(r"^  specdec train (?!--config-dir|run_dir)(\S.*?)(?:  .*)?$", out, re.M):
        done = specdec("train", "--cfg", "job", *line.split())
        assert done.code == 0, (line, done.err)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["drafter=ngram"], ["drafter=ngram is not trained; those that are: eagle, eagle3"]),
        (["training.loss=mse"], ["training.loss=mse", "kl, cross_entropy, text, acceptance, hybrid"]),
        (["training.steps=0"], ["training.steps=0 must be at least 1"]),
        (["training.steps=many"], ["training.steps=many must be a whole number"]),
        (["training.stepz=1"], ["training.stepz is not a key", "learning_rate"]),
        (["training.precision=half"], ["half", "bfloat16"]),
        (["storage=int4"], ["storage=int4", "fp8"]),
        (["data.turns.top_p=2"], ["top_p=2"]),
        (["data.prompts.path=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["training.batch_size=1000"], ["1000", "write more text"]),
        (["training.draft_vocab_size=1000"], ["1000", "260"]),
        (["training.head.taps=[0,7]"], ["[0, 7]", "0 to 1"]),
        (["training.head.depth=0"], ["training.head.depth=0"]),
        (["drafter.prefill_chunk=0"], ["prefill_chunk=0"]),
    ],
)
def test_a_mistake_is_one_sentence(specdec: CommandLine, overrides: list[str], words: list[str]) -> None:
    fewer = [option for option in TRAIN if option.split("=")[0] != overrides[0].split("=")[0]]
    if overrides[0].startswith("data.turns"):
        fewer = [option for option in fewer if "prompts" not in option]
    check_mistake(specdec(*fewer, *overrides), *words)


if __name__ == "__main__":
    train_as_rank(Path(sys.argv[1]))
