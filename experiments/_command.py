"""The command lines of the benchmarks: KEY=VALUE options, --help, --render, a mistake in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from _gpu import Results, begin
from omegaconf import OmegaConf

T = TypeVar("T")


def read_options(name: str, text: str | None, parse: Callable[[Sequence[str]], T], arguments: Sequence[str]) -> T:
    """What `parse` makes of the KEY=VALUE arguments. --help, which shows `text` and the defaults, and a mistake end here."""
    if {"-h", "--help"} & set(arguments):
        print(text, OmegaConf.to_yaml(OmegaConf.structured(parse([]))), sep="\n")
        sys.exit()
    try:
        return parse([argument for argument in arguments if argument != "--render"])
    except ValueError as error:
        sys.exit(f"{name}: {error}")


def run_benchmark(
    name: str,
    text: str | None,
    parse: Callable[[Sequence[str]], Any],
    benchmark: Callable[[Any], Any],
    render: Callable[[dict[str, Any]], str],
    arguments: Sequence[str],
) -> Results:
    """Measure what is missing, unless --render, and write the tables. `benchmark` raises ValueError for a user's mistake."""
    options = read_options(name, text, parse, arguments)
    results = Results(Path(options.results), name, render)
    if "--render" not in arguments:
        try:
            made = benchmark(options)
        except ValueError as error:
            sys.exit(f"{name}: {error}")
        results.measure(made.setup(), begin(name, arguments, options.revision), made.jobs())
    results.write_report()
    return results
