"""What a machine would give, from a model's shape and a few measured pieces: formula and limits in `formula`.

`python -m specdec.projection measured.json` prints it; the schema of measured.json is in `measured`.
"""

from __future__ import annotations

from specdec.projection.band import Band, Quantity
from specdec.projection.formula import Projection
from specdec.projection.machine import B200, H200, Machine, load_machine
from specdec.projection.measured import Measured, load_measured, parse_measured
from specdec.projection.model import EAGLE3_HEADS, MAVERICK, DraftHead, Model, expected_experts

__all__ = [
    "B200",
    "EAGLE3_HEADS",
    "H200",
    "MAVERICK",
    "Band",
    "DraftHead",
    "Machine",
    "Measured",
    "Model",
    "Projection",
    "Quantity",
    "expected_experts",
    "load_machine",
    "load_measured",
    "parse_measured",
]
