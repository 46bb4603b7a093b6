"""A clock that a test moves."""

from __future__ import annotations


class Clock:
    """Time that stands still until a test sets `now`, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
