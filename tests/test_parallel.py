"""Several processes that share one model give the tokens of one process, leave one run folder, and end together.

Run as a script it is one rank: REFERENCES and OUT as arguments. Shapes: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import QUICK
from torch import Tensor
from torch.distributed import TCPStore

from specdec.decoding import GenerationResult, SamplingParams, SpeculativeDecoder
from specdec.decoding.params import needs_whole_logits
from specdec.drafter.layer_skip import LayerSkip
from specdec.drafter.ngram import NGram
from specdec.drafter.none import NoDraft
from specdec.drafter.small_model import SmallModel
from specdec.drafter.token_recycling import TokenRecycling
from specdec.sampling import choose
from specdec.target.ranks import TIMEOUT, Ranks
from specdec.target.toy import Toy
from specdec.testing import Replay
from specdec.types import Sampling, Vocabulary
from specdec.verifier.rrs import RRS
from specdec.verifier.speculative_sampling import SpeculativeSampling
from specdec.verifier.target_only import TargetOnly

FAMILIES = ("llama", "llama4")
PROMPTS = [list(b"abcabcabcab"), list(b"one two one two, one")]
NEW = 12
GREEDY, SAMPLED, WARPED = SamplingParams(), SamplingParams(1.0), SamplingParams(1.0, top_k=20, top_p=0.9)

Outputs = dict[str, Any]


def methods(target: Toy, plain: dict[str, list[list[int]]]) -> dict[str, tuple[Any, Any, SamplingParams]]:
    """Who drafts, who judges and how tokens are chosen. plain: prompts with what `NoDraft` makes of them."""
    greedy, sampled = plain["greedy"], plain["sampled"]
    return {
        "ngram": (NGram(4), TargetOnly(), GREEDY),
        "ngram, sampled": (NGram(4), TargetOnly(), SAMPLED),
        "ngram, warped": (NGram(4), TargetOnly(), WARPED),
        "chain": (Replay(greedy), TargetOnly(), GREEDY),
        "tree": (Replay(greedy, tree=True), TargetOnly(), GREEDY),
        "tree, sampled": (Replay(sampled, tree=True), TargetOnly(), SAMPLED),
        "iid": (LayerSkip(1, 3), SpeculativeSampling(), SAMPLED),
        "iid tree": (SmallModel(target_like(target), structure=(2, 1)), RRS(), SAMPLED),
        "observing": (TokenRecycling(), TargetOnly(), GREEDY),
    }


def target_like(target: Toy) -> Toy:
    """Another model of the same vocabulary."""
    return Toy(seed=7, backend="torch", vocab_size=target.config.vocab_size)


def decode(target: Toy, method: tuple[Any, Any, SamplingParams], logprobs: bool = False) -> GenerationResult:
    drafter, verifier, sampling = method
    decoder = SpeculativeDecoder(target, drafter, verifier, sampling, batch_size=2, logprobs=logprobs)
    return decoder.generate(PROMPTS, NEW, seed=3, ignore_eos=True)


def plain_texts(target: Toy) -> dict[str, list[list[int]]]:
    """Prompts with their plain output."""
    texts = {}
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        answers = decode(target, (NoDraft(), TargetOnly(), sampling)).tokens
        texts[name] = [prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)]
    return texts


def outputs(family: str, plain: dict[str, list[list[int]]] | None = None) -> Outputs:
    """What every method emits, the logits behind a prompt and, of several ranks, how often parts of logits were gathered."""
    target = Toy(family=family, backend="torch")
    parts = []
    if target.ranks is not None:
        gather = target.ranks.gather
        target.ranks.gather = lambda x: parts.append(x.shape[-1]) or gather(x)  # type: ignore[method-assign,func-returns-value]
    plain = plain or plain_texts(target)
    tokens, gathered = {}, {}
    for name, method in methods(target, plain).items():
        parts.clear()
        tokens[name] = decode(target, method).tokens
        gathered[name] = parts.count(target.config.vocab_size // target.shard.world)
    logprobs = decode(target, methods(target, plain)["tree, sampled"], logprobs=True).logprobs
    target.allocate(1, 64, 1)
    logits = target.prefill(torch.tensor([PROMPTS[0]]), torch.tensor([len(PROMPTS[0])])).logits
    head = target.lm_head.double().sum(1)
    values = {"logprobs": logprobs, "logits": logits.tolist(), "head": head.tolist()}
    return {"plain": plain, "tokens": tokens, "gathered": gathered, **values}


def environment(**more: Any) -> dict[str, str]:
    base = {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **base, **{key: str(value) for key, value in more.items()}}


def torchrun(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Two ranks, to their end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)


# ---- two ranks and one -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> dict[str, Outputs]:
    return {family: outputs(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def together(alone: dict[str, Outputs], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outputs]]:
    """What each of two ranks got for the same, in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "plain.json").write_text(json.dumps({family: out["plain"] for family, out in alone.items()}))
    done = torchrun(__file__, "plain.json", "out", folder=folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"out{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_emit_what_one_does(
    family: str, alone: dict[str, Outputs], together: list[dict[str, Outputs]]
) -> None:
    """To the bit on both, and up to rounding what one process computes."""
    wanted, (first, second) = alone[family], (out[family] for out in together)
    assert first == second
    assert first["tokens"] == wanted["tokens"]
    assert first["head"] == wanted["head"]
    logits, one = torch.tensor(first["logits"]), torch.tensor(wanted["logits"])
    assert logits.shape == one.shape == (1, 1, 260)
    assert float((logits - one).abs().max()) < 1e-5 * float(one.abs().max())
    logprobs, others = torch.tensor(first["logprobs"]), torch.tensor(wanted["logprobs"])
    assert logprobs.shape == (2, NEW)
    assert float((logprobs - others).abs().max()) < 1e-4
    greedy = [text[len(prompt) :] for text, prompt in zip(wanted["plain"]["greedy"], PROMPTS, strict=True)]
    assert first["tokens"]["tree"] == first["tokens"]["chain"] == first["tokens"]["observing"] == greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_travel_only_where_they_are_read(family: str, together: list[dict[str, Outputs]]) -> None:
    """Once behind the prompts, and in every step for those who look at more than the chosen token."""
    gathered = together[0][family]["gathered"]
    assert {name for name, count in gathered.items() if count == 1} == {
        "ngram", "ngram, sampled", "chain", "tree", "tree, sampled",
    }  # fmt: skip
    assert all(count > 4 for count in gathered.values() if count != 1)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_torchrun_leaves_one_run_folder(tmp_path: Path) -> None:
    done = torchrun("-m", "specdec", *QUICK, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert done.stdout.count(f"run folder: runs/{run.name}") == 1
    assert done.stdout.count("loading") == 1
    rows = [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]
    assert [(row["drafter"], row["request"]) for row in rows] == [("none", 0), ("ngram", 0), ("none", 1), ("ngram", 1)]
    assert all(row["equal_to_plain"] for row in rows)


class Pair:
    """Two ranks started as torchrun does, which keeps their store too, but would end them itself."""

    def __init__(self, folder: Path, *arguments: str, seconds: float = 60) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port, "WORLD_SIZE": 2, TIMEOUT: seconds}
        names["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        command = [sys.executable, "-m", "specdec", *arguments]
        pipe = subprocess.PIPE
        self.ranks = [
            subprocess.Popen(command, cwd=folder, env=environment(**names, RANK=r), stdout=pipe, stderr=pipe, text=True)
            for r in range(2)
        ]

    def end(self, rank: int, seconds: float = 60) -> tuple[int, str]:
        """Exit status and stderr."""
        process = self.ranks[rank]
        _, err = process.communicate(timeout=seconds)
        return process.returncode, err


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Any]:
    started: list[Pair] = []

    def start(*arguments: str, seconds: float = 60) -> Pair:
        started.append(Pair(tmp_path, *arguments, seconds=seconds))
        return started[-1]

    yield start
    for process in (process for one in started for process in one.ranks):
        process.kill()
        process.communicate()


def test_a_model_that_does_not_divide_is_one_sentence(pair: Any, tmp_path: Path) -> None:
    both = pair(*QUICK, "+target.num_kv_heads=1")
    assert both.end(0) == (2, "specdec: 2 ranks cannot share 1 KV heads evenly: choose a divisor of 1\n")
    assert both.end(1) == (2, "")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_ends_the_run(pair: Any, tmp_path: Path, how: signal.Signals) -> None:
    """Killed it is missed at once, stopped within the timeout; what was finished is kept."""
    both = pair("debug=quick", "dataset.limit=1", "passes=500", seconds=3)
    deadline = time.monotonic() + 60
    while not any(trace.stat().st_size for trace in tmp_path.glob("runs/*/trace.jsonl")):
        assert both.ranks[0].poll() is None, both.end(0)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    both.ranks[1].send_signal(how)
    code, err = both.end(0, seconds=20)
    assert code == 2
    assert err.startswith("specdec: rank 1 of 2 no longer answers (or is slower than 3 s, which SPECDEC_TIMEOUT sets)")
    assert len(err.splitlines()) == 1


def test_processes_that_never_come_together(pair: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "1", "WORLD_SIZE": "2", TIMEOUT: "1"}
    command = [sys.executable, "-m", "specdec", *QUICK]
    done = subprocess.run(command, cwd=tmp_path, env=environment(**names), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "specdec: rank 1 of 2 found no way to the others: start them with `torchrun" in done.stderr
    assert "Traceback" not in done.stderr


# ---- parts -----------------------------------------------------------------------------------------------------------


def in_parts(logits: Tensor, sampling: Sampling, position: Tensor, world: int) -> list[Tensor]:
    """What every rank chooses. A first round only collects what each hands in."""
    handed: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        handed.append(x)
        return torch.stack([x] * world)

    def chosen(gather: Any) -> list[Tensor]:
        parts = logits.chunk(world, -1)
        of = [Vocabulary(rank * parts[0].shape[-1], gather) for rank in range(world)]
        return [choose(part, replace(sampling, vocabulary=v), position) for part, v in zip(parts, of, strict=True)]

    chosen(record)
    return chosen(lambda x: torch.stack(handed))


@pytest.mark.parametrize("temperatures", [[0.0, 0.0], [0.7, 1.3], [0.0, 1.0]])
@pytest.mark.parametrize("world", [2, 5])
def test_a_split_vocabulary_chooses_as_a_whole_one(temperatures: list[float], world: int) -> None:
    """Bit for bit, ties included: the logits are coarse, so that equal ones lie on several ranks."""
    logits = torch.randint(-3, 3, (2, 40, 260), generator=torch.Generator().manual_seed(1)).float()
    ones = torch.ones(2)
    seed, start = torch.tensor([5, 1 << 40]), torch.tensor([7, 9], dtype=torch.int32)
    mode: Any = "sampled" if any(temperatures) else "greedy"
    sampling = Sampling(torch.tensor(temperatures), ones.int() * 0, ones, seed, start, mode)
    position = start[:, None] + torch.arange(40, dtype=torch.int32)
    wanted = choose(logits, sampling, position)
    for tokens in in_parts(logits, sampling, position, world):
        assert torch.equal(tokens, wanted)
        assert tokens.dtype == torch.int64


def test_who_needs_whole_logits() -> None:
    greedy, warped = GREEDY.tensors(1, torch.device("cpu")), WARPED.tensors(1, torch.device("cpu"))
    assert not needs_whole_logits(NGram(4), TargetOnly(), greedy)
    assert needs_whole_logits(NGram(4), TargetOnly(), greedy, logprobs=True)
    assert needs_whole_logits(NGram(4), TargetOnly(), warped)
    assert needs_whole_logits(NGram(4), SpeculativeSampling(), greedy)
    assert needs_whole_logits(TokenRecycling(), TargetOnly(), greedy)


def test_sums_are_in_the_order_of_ranks() -> None:
    """1e8 + 1 is 1e8 in f32, so that another order gives another sum."""

    class Three(Ranks):
        def gather(self, x: Tensor) -> Tensor:
            return torch.tensor([[1e8], [1.0], [-1e8]])

    assert Three(0, 3, None).sum(torch.zeros(1)).tolist() == [0.0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(Path(sys.argv[1]).read_text())
    result = {family: outputs(family, plain) for family, plain in given.items()}
    Path(f"{sys.argv[2]}{os.environ['RANK']}.json").write_text(json.dumps(result))
