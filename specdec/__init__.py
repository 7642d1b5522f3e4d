"""specdec: speculative decoding as a research framework. `specdec.load` is the way in from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.composition import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import what `load` needs when it is first asked for: `import specdec.types` stays light."""
    if name == "load":
        from specdec.composition import load

        return load
    raise AttributeError(f"module 'specdec' has no attribute {name!r}")


def __dir__() -> list[str]:
    """With `load`, also before it is first asked for."""
    return sorted({*globals(), *__all__})
