"""Conformance suites as public API: an outside drafter or verifier certifies itself with one call.

check_drafter(MyDrafter, TargetOnly())      its output is plain output, and it never syncs the host
check_verifier(MyVerifier())                what it emits follows the target's law
"""

from specdec.testing.drafters import DrafterReport, check_drafter
from specdec.testing.errors import ConformanceError
from specdec.testing.laws import LawReport, check_verifier
from specdec.testing.replay import Replay
from specdec.testing.syncs import check_no_sync

__all__ = [
    "ConformanceError",
    "DrafterReport",
    "LawReport",
    "Replay",
    "check_drafter",
    "check_no_sync",
    "check_verifier",
]
