"""Wait for a condition, at most for a time."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Poll a condition; fail the test if it does not come true in time."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, "waited too long"
        time.sleep(0.01)
