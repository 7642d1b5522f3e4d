"""Where a run is kept. The run folder is the source; a tracker copies a finished one elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

__all__ = ["NoTracking", "Tracker"]


class Tracker(Protocol):
    """Copies a finished run folder. It never raises for an outage: a copy is worth less than the run."""

    def log(self, folder: Path, group: str | None = None) -> str | None:
        """Copy `folder`; where the copy is to be found, None without one. `group`: the sweep it belongs to."""


class NoTracking:
    """The run folder is all there is."""

    def log(self, folder: Path, group: str | None = None) -> str | None:
        """Nothing to copy."""
        return None
