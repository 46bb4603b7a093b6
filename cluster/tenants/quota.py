"""What a tenant has used of its quota: tokens a minute, requests in flight."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cluster.errors import InvalidRequest, QuotaExceeded

BUSY_RETRY_S = 1.0  # when one of a tenant's requests ends, nobody knows
ROUNDING = 1e-6  # tokens: whoever has waited as long as was said gets in


class TokenBucket:
    """Fills evenly with what a minute allows, and holds one minute's worth at most.

    What is taken without asking may leave a debt, which the next one waits for.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._clock = clock
        self._seen = clock()

    def resize(self, per_minute: int) -> None:
        """Another quota from now on; what was half full stays half full."""
        self._fill()
        self._level *= per_minute / self.per_minute
        self.per_minute = per_minute

    def wait_s(self, num_tokens: int) -> float:
        """Seconds until so many can be taken; 0 for now."""
        self._fill()
        missing = num_tokens - self._level
        return missing * 60.0 / self.per_minute if missing > ROUNDING else 0.0

    def take(self, num_tokens: int) -> None:
        """Take tokens, or with a negative number give some back."""
        self._fill()
        self._level = min(float(self.per_minute), self._level - num_tokens)

    def _fill(self) -> None:
        now = self._clock()
        filled = self._level + (now - self._seen) * self.per_minute / 60.0
        self._level, self._seen = min(float(self.per_minute), filled), now


class Quota:
    """Of one tenant, under whatever terms it has at the moment. Any thread may call."""

    def __init__(self, tenant: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._tenant = tenant
        self._clock = clock
        self._lock = threading.Lock()
        self._bucket: TokenBucket | None = None  # None: no limit
        self._last_bucket: TokenBucket | None = None  # a limit that comes back forgives nothing
        self._max_in_flight: int | None = None
        self._num_in_flight = 0

    def limit(self, tokens_per_minute: int | None, max_in_flight: int | None) -> None:
        """The terms from now on; None is no limit."""
        with self._lock:
            self._max_in_flight = max_in_flight
            if tokens_per_minute is None:
                self._bucket = None
                return
            self._bucket = self._last_bucket or TokenBucket(tokens_per_minute, self._clock)
            self._bucket.resize(tokens_per_minute)
            self._last_bucket = self._bucket

    def begin(self) -> None:
        """One request more in flight. Raises QuotaExceeded, also while there is a debt."""
        with self._lock:
            if self._max_in_flight is not None and self._num_in_flight >= self._max_in_flight:
                raise self._exceeded(
                    f"has {self._num_in_flight} requests in flight, as many as it may", BUSY_RETRY_S
                )
            if self._bucket is not None and (wait_s := self._bucket.wait_s(1)) > 0:
                raise self._used_up(self._bucket.per_minute, wait_s)
            self._num_in_flight += 1

    def end(self) -> None:
        """One less."""
        with self._lock:
            self._num_in_flight -= 1

    def charge(self, num_tokens: int) -> None:
        """Take the tokens of a prompt. Raises, with nothing taken, QuotaExceeded, or InvalidRequest
        for a prompt that no waiting makes room for.
        """
        with self._lock:
            if self._bucket is None:
                return
            if num_tokens > self._bucket.per_minute:
                raise InvalidRequest(
                    f"The prompt has {num_tokens:,} tokens, and the tenant {self._tenant} may use "
                    f"{self._bucket.per_minute:,} in a minute: shorten it, or ask for a larger "
                    "quota."
                )
            if (wait_s := self._bucket.wait_s(num_tokens)) > 0:
                raise self._used_up(self._bucket.per_minute, wait_s)
            self._bucket.take(num_tokens)

    def owe(self, num_tokens: int) -> None:
        """Take the tokens of an answer, which are there already; negative ones are given back."""
        with self._lock:
            if self._bucket is not None:
                self._bucket.take(num_tokens)

    def _used_up(self, per_minute: int, wait_s: float) -> QuotaExceeded:
        return self._exceeded(f"has used its {per_minute:,} tokens a minute", wait_s)

    def _exceeded(self, what: str, wait_s: float) -> QuotaExceeded:
        error = QuotaExceeded(f"The tenant {self._tenant} {what}; try again in {wait_s:.1f} s.")
        error.retry_after_s = wait_s
        return error
