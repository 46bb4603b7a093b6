"""A tenant's quota: tokens a minute and requests in flight."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cluster.errors import InvalidRequest, QuotaExceeded
from cluster.tenants.tenancy import Tenant

BUSY_RETRY_S = 1.0  # when one of a tenant's requests will end is unknown
ROUNDING = 1e-6  # tokens: a client that waited exactly `retry_after_s` is admitted


class TokenBucket:
    """A token bucket that refills evenly with one minute's allowance, and holds no more than that.

    Its level falls below 0 when tokens are taken that weren't there: a debt, to be refilled first.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._clock = clock
        self._filled_at = clock()

    def resize(self, per_minute: int) -> None:
        """Change the allowance; a bucket that was half full stays half full."""
        self._fill()
        self._level *= per_minute / self.per_minute
        self.per_minute = per_minute

    def wait_s(self, num_tokens: int) -> float:
        """Return the seconds until `num_tokens` can be taken; 0 if they can be now."""
        self._fill()
        missing = num_tokens - self._level
        return missing * 60.0 / self.per_minute if missing > ROUNDING else 0.0

    def take(self, num_tokens: int) -> None:
        """Take tokens, whether or not they are there."""
        self._fill()
        self._level -= num_tokens

    def give_back(self, num_tokens: int) -> None:
        """Return tokens that were taken."""
        self._fill()
        self._level = min(float(self.per_minute), self._level + num_tokens)

    def _fill(self) -> None:
        now = self._clock()
        filled = self._level + (now - self._filled_at) * self.per_minute / 60.0
        self._level, self._filled_at = min(float(self.per_minute), filled), now


class Quota:
    """One tenant's quota; its limits may change at any time. Any thread may call.

    It is the lease of each of the tenant's calls: a `with` block counts one request in flight.
    """

    def __init__(self, tenant: Tenant, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._bucket: TokenBucket | None = None  # None: no limit
        self._last_bucket: TokenBucket | None = None  # so that lifting a limit erases no debt
        self._num_in_flight = 0
        self.update(tenant)

    @property
    def tenant(self) -> Tenant:
        """The tenant, with its current terms."""
        return self._tenant

    def update(self, tenant: Tenant) -> None:
        """Apply changed terms of the same tenant."""
        with self._lock:
            self._tenant, per_minute = tenant, tenant.tokens_per_minute
            if per_minute is None:
                self._bucket = None
                return
            self._bucket = self._last_bucket or TokenBucket(per_minute, self._clock)
            self._bucket.resize(per_minute)
            self._last_bucket = self._bucket

    def __enter__(self) -> None:
        """Count one more request in flight.

        Raises:
            QuotaExceeded: If as many as allowed are in flight, or the tenant has a debt of tokens.
        """
        limit = self._tenant.max_in_flight
        with self._lock:
            if limit is not None and self._num_in_flight >= limit:
                raise self._exceeded(
                    f"has {self._num_in_flight} requests in flight, its limit", BUSY_RETRY_S
                )
            if self._bucket is not None and (wait_s := self._bucket.wait_s(1)) > 0:
                raise self._used_up(self._bucket.per_minute, wait_s)
            self._num_in_flight += 1

    def __exit__(self, *_: object) -> None:
        """Count one request less in flight."""
        with self._lock:
            self._num_in_flight -= 1

    def charge(self, num_tokens: int) -> None:
        """Charge the tokens of a prompt, before any work is done for it.

        Raises:
            QuotaExceeded: If they exceed what is left of this minute; nothing is charged.
            InvalidRequest: If they exceed what a whole minute allows; nothing is charged.
        """
        with self._lock:
            if self._bucket is None:
                return
            if num_tokens > self._bucket.per_minute:
                raise InvalidRequest(
                    f"The prompt has {num_tokens:,} tokens, and the tenant {self._tenant.name} may "
                    f"use {self._bucket.per_minute:,} in a minute: shorten it, or ask for a larger "
                    "quota."
                )
            if (wait_s := self._bucket.wait_s(num_tokens)) > 0:
                raise self._used_up(self._bucket.per_minute, wait_s)
            self._bucket.take(num_tokens)

    def refund(self, num_tokens: int) -> None:
        """Return the tokens of a prompt that was charged and not computed."""
        with self._lock:
            if self._bucket is not None:
                self._bucket.give_back(num_tokens)

    def charge_output(self, num_tokens: int) -> None:
        """Charge generated tokens. They may leave a debt, for which the next request waits."""
        with self._lock:
            if self._bucket is not None:
                self._bucket.take(num_tokens)

    def _used_up(self, per_minute: int, wait_s: float) -> QuotaExceeded:
        return self._exceeded(f"has used its {per_minute:,} tokens a minute", wait_s)

    def _exceeded(self, what: str, wait_s: float) -> QuotaExceeded:
        error = QuotaExceeded(f"The tenant {self._tenant.name} {what}; retry after {wait_s:.1f} s.")
        error.retry_after_s = wait_s
        return error
