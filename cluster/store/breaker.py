"""A circuit breaker: stop calling what fails, try again later, log each change once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

FIRST_RETRY_S = 0.25
LONGEST_RETRY_S = 30.0

log = logging.getLogger(__name__)


class Breaker:
    """A circuit breaker with exponential backoff. Any thread may call.

    It is closed while calls succeed. A failure opens it; then it allows one try after a pause that
    doubles with each further failure, and closes when a try succeeds.
    """

    def __init__(
        self,
        what: str,
        first_retry_s: float = FIRST_RETRY_S,
        *,
        on_change: Callable[[bool], None] = lambda works: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start closed.

        Args:
            what: What it guards: begins the log lines, one for each change.
            first_retry_s: The first pause.
            on_change: Called with True when it closes, False when it opens.
            clock: The clock by which pauses run.
        """
        self._what = what
        self._on_change = on_change
        self._first_retry_s = first_retry_s
        self._clock = clock
        self._lock = threading.Lock()
        self._pause_s: float | None = None  # None while closed
        self._retry_at = 0.0

    @property
    def is_closed(self) -> bool:
        """True if the last call succeeded."""
        return self._pause_s is None

    @property
    def retry_in_s(self) -> float:
        """Seconds until the next try is allowed; 0 while closed."""
        return 0.0 if self.is_closed else max(0.0, self._retry_at - self._clock())

    def failed(self, reason: str, bug: Exception | None = None) -> None:
        """Record that a call failed, and hold off. The log shows the traceback of a `bug`."""
        with self._lock:
            was_closed = self._pause_s is None
            if not was_closed and self.retry_in_s > 0:
                return  # another thread's call, begun before the pause
            pause_s = self._first_retry_s if self._pause_s is None else self._pause_s * 2
            self._pause_s = min(pause_s, LONGEST_RETRY_S)
            self._retry_at = self._clock() + self._pause_s
        if was_closed:
            log.warning("%s: %s", self._what, reason, exc_info=bug)
            self._on_change(False)

    def succeeded(self) -> None:
        """Record that a call succeeded, and close."""
        if self._pause_s is None:  # the usual case takes no lock
            return
        with self._lock:
            was_closed, self._pause_s = self._pause_s is None, None
        if not was_closed:
            log.warning("%s: works again", self._what)
            self._on_change(True)
