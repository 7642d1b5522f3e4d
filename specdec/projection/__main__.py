"""`python -m specdec.projection measured.json [--machine h200|b200|FILE ...]`: tables, and a JSON and a PNG if asked."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.projection.figure import figure
from specdec.projection.formula import Projection
from specdec.projection.machine import MACHINES, load_machine
from specdec.projection.measured import load_measured
from specdec.projection.model import EAGLE3_HEADS, MAVERICK
from specdec.projection.tables import Question, as_json, markdown


def _arguments(argv: Sequence[str]) -> Any:
    parser = argparse.ArgumentParser(
        "python -m specdec.projection", description="Tokens/s of a machine from measured pieces."
    )
    parser.add_argument("measured", type=Path, help="schema: specdec/projection/measured.py")
    parser.add_argument(
        "--machine", nargs="+", default=list(MACHINES), help="h200, b200 or a JSON file (default: both)"
    )
    parser.add_argument("--head", choices=EAGLE3_HEADS, default="bf16-full", help="draft head (default: NVIDIA's)")
    parser.add_argument("--drafts", nargs="+", type=int, default=[3], help="tokens drafted a step (default: 3)")
    parser.add_argument("--context", type=int, default=1024, help="committed tokens, as measured (default: 1024)")
    parser.add_argument("--target-tps", type=float, default=1000.0, help="tokens/s per user to break (default: 1000)")
    parser.add_argument("--acceptance-length", type=float, help="of the server table (default: published mean)")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--png", type=Path, help="write the curve here")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Print the Markdown of every machine and write what was asked for."""
    args = _arguments(argv)
    if min(args.drafts) < 1:
        raise ValueError(
            f"--drafts {min(args.drafts)} is less than 1: plain decoding is always shown beside the drafts"
        )
    measured = load_measured(args.measured)
    question = Question(tuple(args.drafts), args.context, args.target_tps, args.acceptance_length)
    projections = [Projection(MAVERICK, EAGLE3_HEADS[args.head], load_machine(name), measured) for name in args.machine]
    print("\n".join(markdown(projection, question) for projection in projections))
    if args.json:
        args.json.write_text(json.dumps([as_json(p, question) for p in projections], indent=1) + "\n")
    if args.png:
        figure(projections, question).savefig(args.png)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
