"""A circuit breaker: stop asking what doesn't answer, try again later, say so once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

FIRST_RETRY_S = 0.25
LONGEST_RETRY_S = 30.0

log = logging.getLogger(__name__)


class Breaker:
    """Closed while things work. Opened by a failure, it allows one try after a pause that doubles
    with each further failure, and closes when a try succeeds. Any thread may call.

    `what` begins the log lines, one for each change between working and not working; `on_change`
    is told whether it works now.
    """

    def __init__(
        self,
        what: str,
        on_change: Callable[[bool], None] = lambda works: None,
        first_retry_s: float = FIRST_RETRY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._on_change = on_change
        self._first_retry_s = first_retry_s
        self._clock = clock
        self._lock = threading.Lock()
        self._pause_s: float | None = None  # None while closed
        self._retry_at = 0.0

    @property
    def is_closed(self) -> bool:
        """Whether things worked when last seen."""
        return self._pause_s is None

    @property
    def retry_in_s(self) -> float:
        """Seconds until the next try is allowed; 0 while closed."""
        return 0.0 if self.is_closed else max(0.0, self._retry_at - self._clock())

    def failed(self, reason: str, bug: Exception | None = None) -> None:
        """A call failed: hold off. Of a `bug` the log says where it came from."""
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
        """A call worked."""
        if self._pause_s is None:  # the usual case takes no lock
            return
        with self._lock:
            was_closed, self._pause_s = self._pause_s is None, None
        if not was_closed:
            log.warning("%s: works again", self._what)
            self._on_change(True)
