"""A decode step as one CUDA graph: captured once for each set of shapes, replayed without the host.

A graph reads and writes fixed addresses. Every tensor that the loop, the target and the methods keep between steps is
therefore found by walking their attributes; what a step, or a new request, replaced by another tensor of the same shape is
copied back into the first one. So drafters are written as if there were no graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["GraphedStep", "Slot", "slots"]

Result = TypeVar("Result")
Slot = tuple[Any, Any]  # an object, and its attribute's name or index


def slots(roots: Sequence[Any]) -> Iterator[Slot]:
    """Every place below the roots that holds a tensor: attributes of objects, elements of lists, tuples and dicts.

    Looks into objects of the roots' own packages. Modules are left out: their parameters stay where they are.
    """
    seen: set[int] = set()
    packages = {_package(root) for root in roots}
    waiting = list(reversed(roots))
    while waiting:
        thing = waiting.pop()
        foreign = not isinstance(thing, dict | list | tuple) and _package(thing) not in packages
        if foreign or isinstance(thing, nn.Module) or id(thing) in seen:
            continue
        seen.add(id(thing))
        inner = []
        for name, value in _items(thing):
            if isinstance(value, Tensor):
                yield thing, name
            else:
                inner.append(value)
        waiting += reversed(inner)


def _package(thing: Any) -> str:
    return type(thing).__module__.split(".")[0]


def _items(thing: Any) -> list[tuple[Any, Any]]:
    if isinstance(thing, dict):
        return list(thing.items())
    if isinstance(thing, list | tuple):
        return list(enumerate(thing))
    if is_dataclass(thing) and not isinstance(thing, type):
        return [(field.name, getattr(thing, field.name)) for field in fields(thing)]
    return list(vars(thing).items()) if hasattr(thing, "__dict__") else []


def _get(slot: Slot) -> Tensor:
    thing, name = slot
    value: Tensor = thing[name] if isinstance(thing, dict | list | tuple) else getattr(thing, name)
    return value


def _put(slot: Slot, tensor: Tensor) -> None:
    thing, name = slot
    if isinstance(thing, dict | list):
        thing[name] = tensor
    elif not isinstance(thing, tuple):
        setattr(thing, name, tensor)


def signature(places: Sequence[Slot]) -> tuple[Any, ...]:
    """What must be the same for a graph to fit: name, shape and dtype of everything kept, and who shares a tensor."""
    tensors = [_get(place) for place in places]
    first: dict[int, int] = {}
    return tuple(
        (place[1], x.shape, x.dtype, first.setdefault(id(x), i))
        for i, (place, x) in enumerate(zip(places, tensors, strict=True))
    )


def _shapes(found: tuple[Any, ...]) -> list[Any]:
    """A signature without who shares what."""
    return [place[:3] for place in found]


class _Graph(Generic[Result]):
    """One captured step and the tensors it works on."""

    def __init__(self, step: Callable[[], Result], places: Sequence[Slot], pool: Any) -> None:
        self.tensors = [_get(place) for place in places]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.result = step()
            self.bind(places)

    def bind(self, places: Sequence[Slot]) -> None:
        """Bring what the places hold now to the captured addresses, and let them hold those."""
        moved: set[int] = set()
        for place, fixed in zip(places, self.tensors, strict=True):
            current = _get(place)
            if current is not fixed:
                if id(fixed) not in moved:
                    fixed.copy_(current)
                moved.add(id(fixed))
                _put(place, fixed)


class GraphedStep(Generic[Result]):
    """Runs a step: as it is the first time that a signature is seen, as a graph from then on.

    A step that leaves other shapes than it found (a drafter that reads a prompt) is no graph: it runs as it is every time.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[Any, ...], _Graph[Result] | None] = {}
        self._unlike: set[tuple[Any, ...]] = set()
        self._current: _Graph[Result] | None = None
        self._pool: Any = None

    def changed(self) -> None:
        """Something outside the step replaced tensors: requests began."""
        self._current = None

    def __call__(self, step: Callable[[], Result], roots: Sequence[Any], static: tuple[Any, ...]) -> Result:
        """roots: the objects that keep tensors between steps. static: whatever else decides what a step launches."""
        if self._current is None:
            places = list(slots(roots))
            found = signature(places)
            key = (*static, *found)
            if key not in self._graphs:
                result = step()
                if key in self._unlike or _shapes(signature(list(slots(roots)))) != _shapes(found):
                    self._unlike.add(key)
                else:
                    self._graphs[key] = None
                return result
            graph = self._graphs[key]
            if graph is None:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                graph = self._graphs[key] = _Graph(step, places, self._pool)
            else:
                graph.bind(places)
            self._current = graph
        self._current.graph.replay()
        return self._current.result
