"""EAGLE-3 heads by our trainer and by the speculators package's: same text, batches, features, steps, sizes; one decoder.

    pip install --no-deps speculators               and what it asks for, into an environment that has specdec
    python experiments/trainers.py [KEY=VALUE ...]
    python experiments/trainers.py --render         write the tables again from the JSON file
    python experiments/trainers.py --help           all keys with their defaults

`text` is a folder that `specdec train` wrote. Both trainers see the same rows in the same order, the target's features in the
target's dtype, and learn the same tokens; learning rate, steps, draft vocabulary, depth and the head's shape are shared. The
rest is each trainer's own default: loss weights by depth, optimizer, schedule, clipping, first weights, what is frozen. Theirs
is their Trainer class with their model, loss and attention, fed by our batches. Every head is then decoded by our drafter with
a greedy chain. Heads are done one by one, and rows are on disk as they come; the same command goes on with them.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _acceptance_report import GREEDY, frame, resampled, sums, with_interval
from _bench import table
from _command import run_benchmark
from _gpu import Job, parse_options, spread
from _prompts import DatasetOptions
from _trainers import Plan, Trained, heldout, train_ours, train_theirs
from acceptance import Benchmark, Method

from specdec import metrics
from specdec.nn.eagle import SWITCHES
from specdec.train.corpus import Corpus
from specdec.train.generate import identity
from specdec.train.losses import LOSSES
from specdec.train.params import TrainingParams
from specdec.train.vocabulary import coverage, draft_vocabulary, special_tokens

NAME = "trainers"
OPTIMIZERS = ("adamw", "muon")
THEIRS = ("kl_div/adamw", "lk_hybrid/adamw", "kl_div/muon")  # the last is what their command does unless told otherwise
WARM = 3  # first steps, which compile; not in the times


@dataclass
class Options:
    """The keys of the command line."""

    text: str = "runs/text/smollm2"
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    target: list[str] = field(default_factory=lambda: ["target=smollm2"])  # overrides
    ours: list[str] = field(default_factory=lambda: ["kl", "hybrid"])  # losses
    theirs: list[str] = field(default_factory=lambda: list(THEIRS))  # LOSS/OPTIMIZER
    steps: int = 300
    batch_size: int = 32
    micro_batch: int = 8  # rows that ours runs at once; theirs runs all of them as one packed row
    max_len: int = 512
    learning_rate: float = 5e-4
    draft_vocab_size: int = 10240
    depth: int = 3  # steps of the training-time test
    switches: list[str] = field(default_factory=list)  # of both heads: norm_before_residual, norm_before_fc, ...
    attention: str | None = None  # theirs: simple_flex_attention (null on a GPU) | sdpa | eager (null on a CPU)
    chain: int = 3  # tokens drafted a step
    max_new_tokens: int = 96
    seed: int = 0
    heads: str = "runs/trainers"  # a folder for each head; what lies there is replaced
    revision: str | None = None  # of the code, where the folder is no git checkout
    results: str = str(Path(__file__).parent / "results")


class Comparison(Benchmark):
    """The target, its prompts and text, and a job for every head. ValueError where they do not fit one another."""

    def __init__(self, options: Any) -> None:
        check(options)
        super().__init__(options)
        self.corpus = Corpus(options.text)
        mine, theirs = identity(self.target), self.corpus.settings["target"]
        if mine["embedding"] != theirs["embedding"]:
            raise ValueError(f"text={options.text} was written by a target of sizes {theirs['sizes']}: give its target")
        counts = self.corpus.counts(self.target.config.vocab_size)
        self.vocabulary = draft_vocabulary(counts, options.draft_vocab_size, special_tokens(self.target))

    def setup(self) -> dict[str, Any]:
        """What every row must share: not which heads there are."""
        shared = {key: value for key, value in super().setup().items() if key not in ("ours", "theirs", "heads")}
        vocab_size, t2d = self.target.config.vocab_size, self.vocabulary[1]
        covered = coverage(self.corpus.counts(vocab_size, "heldout"), t2d)
        tokens = int(self.corpus.lengths.sum())
        return {**shared, "text": self.corpus.fingerprint, "tokens": tokens, "covered": covered}

    def jobs(self) -> Iterator[Job]:
        """A job a head."""
        for loss in self.options.ours:
            name = f"specdec {loss}"
            yield name, partial(self._row, name, partial(train_ours, self._plan(loss)))
        for both in self.options.theirs:
            loss, _, optimizer = both.partition("/")
            name = f"speculators {loss} {optimizer}"
            yield name, partial(self._row, name, partial(train_theirs, self._plan(), loss, optimizer))

    def _plan(self, loss: str = "kl") -> Plan:
        options = self.options
        share = max(1, options.steps // 20)  # of the steps, as 100 of our default's 2000
        params = TrainingParams(
            options.steps, options.batch_size, options.micro_batch, options.max_len, options.learning_rate, share,
            loss=loss, seed=options.seed, log_interval=share, checkpoint_interval=options.steps, eval_interval=options.steps,
        )  # fmt: skip
        switches = {name: name in options.switches for name in SWITCHES}
        return Plan(self.target, self.corpus, *self.vocabulary, params, options.depth, switches, options.attention)

    def _row(self, name: str, train: Callable[[Path], Trained]) -> dict[str, Any]:
        made = train(Path(self.options.heads) / name.replace(" ", "-"))
        words = "drafter=eagle3", f"drafter.checkpoint={made.folder}", f"drafter.num_draft_tokens={self.options.chain}"
        return {
            **self._measure(Method(name, words), GREEDY), "losses": made.losses, "parameters": made.parameters,
            "recipe": made.recipe, "step_seconds": spread(made.seconds[min(WARM, len(made.seconds) - 1) :]),
            "all_seconds": sum(made.seconds), "heldout": heldout(self._plan(), made.folder),
            "package": version() if name.startswith("speculators") else None,
        }  # fmt: skip


def version() -> str | None:
    """Of the other package; None where it is not installed."""
    try:
        return importlib.metadata.version("speculators")
    except importlib.metadata.PackageNotFoundError:
        return None


def check(options: Options) -> None:
    """ValueError for a loss, optimizer, switch or package that does not exist, before anything is trained."""
    for loss in options.ours:
        if loss not in LOSSES:
            raise ValueError(f"ours={loss} is no loss; choose among {', '.join(LOSSES)}")
    for both in options.theirs:
        if both.partition("/")[2] not in OPTIMIZERS:
            raise ValueError(f"theirs={both} must be LOSS/OPTIMIZER with an optimizer of {', '.join(OPTIMIZERS)}")
    if unknown := set(options.switches) - set(SWITCHES):
        raise ValueError(f"switches has {', '.join(sorted(unknown))}; there are {', '.join(SWITCHES)}")
    if options.theirs and version() is None:
        raise ValueError("theirs needs the speculators package, which is not installed: install it, or give theirs=[]")


# ---- the tables ------------------------------------------------------------------------------------------------------


def render(document: dict[str, Any]) -> str:
    """The Markdown file."""
    setup, here, rows = document["setup"], document["sessions"][-1], document["rows"]
    revision, versions = (here["git"] or {}).get("revision", "unknown"), here["versions"]
    package = next((row["package"] for row in rows if row["package"]), "not installed")
    text = [
        "# Two trainers",
        f"EAGLE-3 heads for {setup['target'][0].partition('=')[2]}, {setup['steps']} steps of {setup['batch_size']} rows of up "
        f"to {setup['max_len']} tokens\nfrom {setup['tokens']} tokens of text, learning rate {setup['learning_rate']:g}, "
        f"{setup['depth']} predictions a position, draft\nvocabulary {setup['draft_vocab_size']} ({setup['covered']:.1%} of "
        f"the tokens held out), switches: {', '.join(setup['switches']) or 'none'}. The rest is each trainer's own.",
        f"Revision {revision[:12]}; {here['date'][:10]}; torch {versions['torch']}; transformers {versions['transformers']}; "
        f"speculators {package}; {setup['gpu'] or here['cpu']}.",
        "\n".join(f"    {session['command']}" for session in document["sessions"]),
        "## Acceptance length",
        f"First turns of {setup['prompts']} prompts ({setup['dataset']['path']}), up to {setup['max_new_tokens']} tokens each, "
        f"greedy chain of {setup['chain']}: tokens\na forward, the target's own included, with 95% bootstrap intervals over "
        "requests; all: the mean over tasks. more: than\nthe first row, in pairs.",
        _acceptance(rows),
        "## Text held out",
        "By prediction, each on the text's own tokens before it: how often the first choice is the target's, and alpha, the\n"
        "mass that draft and target share. KL: our definition, for all.",
        _heldout(rows),
        "## Training",
        "Trained: parameters that learn. Step: median time, the target's forward left out, and its ratio to the first row's. "
        "Loss: as\neach trainer defines it, at its first and last report; they do not compare.",
        _training(rows, setup["gpu"] is not None),
    ]
    return "\n\n".join(text).rstrip() + "\n"


def _acceptance(rows: Sequence[dict[str, Any]]) -> str:
    trace = frame(rows, GREEDY)
    tau, tasks = metrics.acceptance_length(trace), list(dict.fromkeys(trace["task"]))
    found, lines = sums(trace), []
    first = rows[0]["drafter"], rows[0]["verifier"]
    for row in rows:
        method = row["drafter"], row["verifier"]
        cells = [tau.loc[(GREEDY, *method, task)] for task in (metrics.ALL, *tasks)]
        whole = f"{cells[0]['tau']:.3f} [{cells[0]['tau_low']:.3f}, {cells[0]['tau_high']:.3f}]"
        tokens = resampled(found, [method, first])[0]
        mean, low, high = with_interval(tokens[:, 0] - tokens[:, 1])
        more = "–" if row is rows[0] else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append([row["drafter"], whole, more, *(f"{cell['tau']:.2f}" for cell in cells[1:])])
    return table(["head", metrics.ALL, "more", *tasks], lines)


def _heldout(rows: Sequence[dict[str, Any]]) -> str:
    def shares(values: Sequence[float]) -> str:
        return " ".join(f"{value:.1%}" for value in values)

    found = [(row["drafter"], row["heldout"]) for row in rows]
    lines = [[name, shares(x["accuracy"]), shares(x["alpha"]), f"{x['loss']:.3f}"] for name, x in found]
    return table(["head", "first choice right", "alpha", "KL"], lines)


def _training(rows: Sequence[dict[str, Any]], absolute: bool) -> str:
    """Times of a CPU that others use as well say little: there the ratio alone."""
    lines, base = [], rows[0]["step_seconds"]["median"]
    for row in rows:
        seconds, ends = row["step_seconds"]["median"], (row["losses"][0][1], row["losses"][-1][1])
        step = [f"{1e3 * seconds:.1f}"] if absolute else []
        loss = f"{ends[0]:.3f} to {ends[1]:.3f}" if np.isfinite(ends).all() else "not finite"
        lines.append([row["drafter"], f"{row['parameters'] / 1e6:.2f} M", *step, f"{seconds / base:.2f}", loss])
    return table(["head", "trained", *(["step, ms"] if absolute else []), "ratio", "loss"], lines)


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    run_benchmark(NAME, __doc__, partial(parse_options, Options, sections=[]), Comparison, render, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
