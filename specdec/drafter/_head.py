"""Where trained heads lie."""

from __future__ import annotations

from pathlib import Path

__all__ = ["HEADS", "find_head"]

HEADS = Path(__file__).parents[1] / "heads"  # what ships


def find_head(name: str | Path) -> Path:
    """The folder of that name, else the shipped head of that name."""
    for folder in (Path(name).expanduser(), HEADS / name):
        if folder.is_dir():
            return folder
    shipped = sorted(path.parent.name for path in HEADS.glob("*/config.json"))
    raise ValueError(
        f"drafter.checkpoint={name} is neither a folder nor a head that ships ({', '.join(shipped) or 'none does'}): "
        "give the folder of a trained head, or train one with `specdec train drafter=eagle3`"
    )
