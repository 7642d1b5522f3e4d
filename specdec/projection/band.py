"""A number with its uncertainty. Bands combine edge by edge: the parts of a projection are taken to err together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["measured", "published", "assumed"]


@dataclass(frozen=True, slots=True)
class Band:
    """low <= mid <= high of one quantity, in the unit its owner names."""

    low: float
    mid: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.mid <= self.high < float("inf"):
            raise ValueError(f"[{self.low}, {self.mid}, {self.high}] is not 0 <= low <= mid <= high: order the three")

    @classmethod
    def ordered(cls, *values: float) -> Band:
        """Three values in any order, for differences whose sign of growth is not known beforehand."""
        return cls(*sorted(values))

    @classmethod
    def exactly(cls, value: float) -> Band:
        return cls(value, value, value)

    @property
    def edges(self) -> tuple[float, float, float]:
        return self.low, self.mid, self.high

    @property
    def falling(self) -> tuple[float, float, float]:
        """The edges as they stand in a quotient: the highest rate gives the lowest time."""
        return self.high, self.mid, self.low

    def __add__(self, other: Band) -> Band:
        return Band(*(a + b for a, b in zip(self.edges, other.edges, strict=True)))

    def __mul__(self, factor: Band | float) -> Band:
        other = factor if isinstance(factor, Band) else Band.exactly(factor)
        return Band(*(a * b for a, b in zip(self.edges, other.edges, strict=True)))

    def per(self, other: Band) -> Band:
        """self / other with opposite edges: a rate from an amount and a time."""
        return Band(*(a / b for a, b in zip(self.edges, other.falling, strict=True)))

    def ratio(self, other: Band) -> Band:
        """self / other edge by edge: what both share (machine, all-reduce) cancels."""
        return Band.ordered(*(a / b for a, b in zip(self.edges, other.edges, strict=True)))

    def map(self, function: Callable[[float], float]) -> Band:
        """A monotone function of each edge."""
        return Band.ordered(*map(function, self.edges))


@dataclass(frozen=True, slots=True)
class Quantity(Band):
    """A band that says where it comes from."""

    kind: Kind
    source: str


def read_band(value: Any, what: str) -> Band:
    """A JSON number or [low, mid, high] as a band; ValueError names `what` when it is neither."""
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise ValueError(f"{what} is {value!r}: give a number or [low, mid, high]")
    try:
        return Band(*map(float, values))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def read_quantity(value: Any, what: str) -> Quantity:
    """{"value": number | [low, mid, high], "kind": ..., "source": ...} as a quantity."""
    check_keys(value, {"value", "kind", "source"}, what)
    if value["kind"] not in get_args(Kind):
        raise ValueError(f"{what}.kind is {value['kind']!r}: give one of {', '.join(get_args(Kind))}")
    if not isinstance(value["source"], str) or not value["source"]:
        raise ValueError(f"{what}.source is {value['source']!r}: say in words where the number comes from")
    return Quantity(*read_band(value["value"], f"{what}.value").edges, value["kind"], value["source"])


def read_count(value: Any, what: str, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} is {value!r}: give a whole number of at least {least}")
    return value


def check_keys(value: Any, required: set[str], what: str, optional: frozenset[str] = frozenset()) -> None:
    """ValueError unless `value` is a JSON object with the required keys and no unknown one."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r}: give an object with the keys {', '.join(sorted(required))}")
    if missing := required - set(value):
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}: add what the schema asks for")
    if unknown := set(value) - required - optional:
        allowed = ", ".join(sorted(required | optional))
        raise ValueError(f"{what} has the unknown keys {', '.join(sorted(unknown))}: allowed are {allowed}")
