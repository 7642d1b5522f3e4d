"""What the conformance suites raise."""

from __future__ import annotations

__all__ = ["ConformanceError"]


class ConformanceError(AssertionError):
    """A drafter or verifier broke a promise of the framework; the message says which, in one sentence."""
