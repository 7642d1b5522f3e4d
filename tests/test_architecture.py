"""The layers hold: who may import whom, no method knows another, no host read in a step, files stay readable."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHODS = ("drafter", "verifier")  # packages of methods: their modules never import one another
CORE = {"types", "paths"}
RUNTIME = {*CORE, "kernels", "nn", "sampling"}
LOOP = {*RUNTIME, "structure", "drafter", "verifier", "target", "decoding"}
BESIDE = {"testing", "data", "metrics", "analysis", "plots", "report", "tracking"}

ALLOWED: dict[str, set[str]] = {  # what each part of specdec may import, besides itself
    "types": set(),
    "projection": set(),
    "paths": set(),
    "kernels": CORE,
    "nn": {*CORE, "kernels"},
    "weights": {*CORE, "kernels", "nn"},
    "sampling": {*CORE, "kernels"},
    "structure": {*CORE, "sampling"},
    "drafter": {*RUNTIME, "weights", "structure"},
    "verifier": RUNTIME,
    "target": {*RUNTIME, "weights"},
    "decoding": LOOP,
    "testing": LOOP,
    "data": CORE,
    "metrics": CORE,
    "plots": {"metrics"},
    "analysis": {"metrics", "plots"},
    "report": {"metrics"},
    "tracking": {"metrics", "analysis", "plots", "report"},
    "sweep": {"metrics", "analysis", "report", "tracking"},
    "composition": LOOP,
    "train": {*LOOP, *BESIDE, "weights", "composition", "experiment"},
    "experiment": {*LOOP, *BESIDE, "composition"},
    "cli": {*LOOP, *BESIDE, "composition", "experiment", "train", "sweep", "__init__"},
    "__init__": {"composition"},
    "__main__": {"cli"},
}
TORCH_ONLY = {"types", "sampling", "nn", "structure", "drafter", "verifier", "decoding"}  # of other people's packages
LONG = {  # lines, and why the file is not two
    "kernels/cpu/simd.py": (400, "one intrinsic after another, each the same few lines"),
}


def sources() -> dict[str, Path]:
    """Dotted name -> file of every module; kernels/ appears as specdec.kernels."""
    found = {}
    for top, prefix in ((ROOT / "specdec", "specdec"), (ROOT / "kernels", "specdec.kernels")):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            if top.name == "specdec" and parts[0] in ("kernels", "conf"):
                continue  # links to the folders at the top
            name = ".".join([prefix, *parts])
            found[name.removesuffix(".__init__") if len(parts) > 1 else name] = path
    return found


SOURCES = sources()


def part(module: str) -> str:
    """specdec.drafter.ngram -> drafter."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, wherever they stand; `from a import b` is a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in SOURCES else base


def problems(module: str, source: str) -> list[str]:
    """What a module imports and may not."""
    mine, found = part(module), []
    for name in imports(module, ast.parse(source)):
        top = name.split(".")[0]
        if top != "specdec":
            if mine in TORCH_ONLY and top != "torch" and top not in sys.stdlib_module_names:
                found.append(f"{module} imports {top}: {mine} stands on torch alone")
            continue
        theirs = part(name)
        if theirs != mine and theirs not in ALLOWED[mine]:
            found.append(f"{module} imports {name}: {mine} may import {sorted(ALLOWED[mine]) or 'nothing of specdec'}")
        last = name.split(".")[-1]
        inside = len(name.split(".")) > 2
        if theirs in METHODS and inside and name != module and not (theirs == mine and last.startswith("_")):
            found.append(f"{module} imports {name}: methods are known by their interface alone")
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module: str) -> None:
    assert part(module) in ALLOWED, f"say in ALLOWED where {module} belongs"
    assert problems(module, SOURCES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("specdec.types", "import specdec.sampling"),
        ("specdec.nn.layers", "from specdec.sampling import warp"),
        ("specdec.sampling", "from specdec.nn import KVCache"),
        ("specdec.kernels.cpu.ops", "from specdec.nn import ModelConfig"),
        ("specdec.drafter.ngram", "from specdec.drafter.suffix import Suffix"),
        ("specdec.drafter.ngram", "from specdec.drafter import suffix"),
        ("specdec.drafter.ngram", "from . import suffix"),
        ("specdec.drafter.ngram", "from .suffix import Suffix"),
        ("specdec.drafter.ngram", "from ..target import Target"),
        ("specdec.drafter.ngram", "def f():\n    import specdec.verifier"),
        ("specdec.drafter.ngram", "import numpy"),
        ("specdec.verifier.block", "from specdec.drafter._head import find_head"),
        ("specdec.verifier.block", "from specdec.target import Target"),
        ("specdec.target.toy", "from specdec.drafter import Drafter"),
        ("specdec.decoding.decoder", "from specdec.drafter.none import NoDraft"),
        ("specdec.decoding.decoder", "from specdec.verifier._common import coins"),
        ("specdec.decoding.decoder", "from specdec import metrics"),
        ("specdec.testing.laws", "from specdec.verifier.block import Block"),
        ("specdec.metrics", "from specdec.decoding import Trace"),
        ("specdec.tracking.wandb", "import specdec.experiment"),
        ("specdec.composition", "from specdec.cli import run"),
        ("specdec.composition", "from specdec.drafter.ngram import NGram"),
    ],
)
def test_forbidden_imports_are_seen(module: str, source: str) -> None:
    """Control."""
    assert problems(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("specdec.drafter.ngram", "from specdec.drafter import Drafter\nfrom specdec.drafter._head import find_head"),
        ("specdec.target.toy", "from specdec.target.llama import Llama"),
        ("specdec.decoding.decoder", "from specdec.drafter import Drafter\nimport zlib, torch"),
        ("specdec.testing.syncs", "from specdec.target.toy import Toy\nfrom specdec.decoding import decoder as loop"),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert problems(module, source) == []


# ---- what a file may hold --------------------------------------------------------------------------------------------


def swallows(tree: ast.AST) -> list[int]:
    """Lines of handlers that catch everything and do not raise it again."""
    broad = {"Exception", "BaseException"}
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else broad
            again = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
            if names & broad and not ("BaseException" in names and again):
                lines.append(node.lineno)
    return lines


READS = {"item", "tolist", "cpu", "numpy"}


def reads(tree: ast.Module) -> list[int]:
    """Lines that read a tensor on the host, outside classes that say graphable = False, and their modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = any(isinstance(t, ast.Name) and t.id == "graphable" for t in targets)
            if named and isinstance(node.value, ast.Constant) and node.value.value is False:
                return []
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    return [call.lineno for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in READS]


IN_A_STEP = [
    name
    for name in SOURCES
    if part(name) in ("drafter", "verifier", "sampling", "types") or name == "specdec.decoding.state"
]


@pytest.mark.parametrize("module", IN_A_STEP)
def test_nothing_in_a_step_reads_the_device(module: str) -> None:
    assert reads(ast.parse(SOURCES[module].read_text())) == []


@pytest.mark.parametrize("module", SOURCES)
def test_no_error_is_swallowed(module: str) -> None:
    assert swallows(ast.parse(SOURCES[module].read_text())) == []


@pytest.mark.parametrize("module", SOURCES)
def test_files_stay_readable(module: str) -> None:
    path = SOURCES[module].relative_to(ROOT)
    limit, why = LONG.get(path.as_posix(), (300, "the limit of a file that does one thing"))
    lines = SOURCES[module].read_text().count("\n")
    assert lines <= limit, f"{path} has {lines} lines, more than {limit} ({why}): split it"


def test_controls_of_the_above() -> None:
    assert swallows(ast.parse("try:\n    f()\nexcept Exception:\n    pass")) == [3]
    assert swallows(ast.parse("try:\n    f()\nexcept (OSError, Exception) as e:\n    g(e)")) == [3]
    assert swallows(ast.parse("try:\n    f()\nexcept:\n    pass")) == [3]
    assert swallows(ast.parse("try:\n    f()\nexcept BaseException:\n    undo()\n    raise")) == []
    assert swallows(ast.parse("try:\n    f()\nexcept OSError:\n    pass")) == []
    assert reads(ast.parse("class A:\n    def propose(self, x):\n        return x.lengths.tolist()")) == [3]
    assert reads(ast.parse("class A:\n    graphable = False\n    def f(self, x):\n        return x.item()")) == []
    assert reads(ast.parse("class A:\n    graphable: bool = False\n    def f(self, x):\n        return x.item()")) == []
    assert set(LONG) <= {path.relative_to(ROOT).as_posix() for path in SOURCES.values()}
    assert {"specdec.drafter.ngram", "specdec.kernels.cpu.ops", "specdec.decoding.state"} <= set(SOURCES)
    assert {part(name) for name in SOURCES} == set(ALLOWED)
