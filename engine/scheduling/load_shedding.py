"""Load shedding: refuses requests at arrival, where the queue or the wait in it is too long."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from cluster.errors import Overloaded
from engine.request import Request
from engine.scheduling.policy import Policy

REMEMBERED_S = 30.0  # of steps that left requests waiting; older steps weigh half
FORGOTTEN_S = 600.0  # after so long without waiting requests no rate is known


class LoadShedding:
    """Bounds the queue, each tenant's part of it, and the time in it.

    A full queue still accepts tenants that have less than their share of it, by weight.
    """

    def __init__(
        self,
        max_queue: int = 1024,
        max_queue_per_tenant: int | None = None,
        max_queue_wait_s: float | None = None,
    ) -> None:
        """Set the limits.

        Args:
            max_queue: Queued requests of all tenants.
            max_queue_per_tenant: Queued requests of one tenant; None: no limit.
            max_queue_wait_s: Estimated seconds until a request starts; None: no limit.
        """
        self._max_queue = max_queue
        self._max_queue_per_tenant = max_queue_per_tenant
        self._max_queue_wait_s = max_queue_wait_s
        self._rates: defaultdict[str, StartRate] = defaultdict(StartRate)  # by the policy's queue
        self._waiting: set[str] = set()  # the queues in which the last step left requests waiting

    def check(
        self, request: Request, waiting: Sequence[Request], num_idle: int, policy: Policy
    ) -> None:
        """Check a request at arrival.

        Args:
            request: The new request.
            waiting: Those in the queue.
            num_idle: Seats that the next step can give; as many requests don't count as queued.
            policy: Says which requests start before it.

        Raises:
            Overloaded: The queue is full, or the request would wait too long.
        """
        num_own = sum(other.tenant == request.tenant for other in waiting)
        limit = self._max_queue_per_tenant
        if limit is not None and num_own >= limit + num_idle:
            raise Overloaded(
                f"{num_own} of your requests are queued, the limit (engine.max_queue_per_tenant). "
                "Retry when one has finished."
            )
        share = _share(request, waiting)
        if len(waiting) >= self._max_queue + num_idle and num_own >= share * self._max_queue:
            raise Overloaded(f"{len(waiting)} requests are queued. Retry later.")
        num_ahead = policy.num_ahead(request, waiting) - num_idle
        wait_s, limit_s = self.wait_s(policy.queue_of(request), num_ahead), self._limit_s(request)
        if limit_s is not None and wait_s > limit_s:
            raise Overloaded(
                f"This request would wait about {wait_s:.0f} s, and may wait {limit_s:.0f} s. "
                "Retry later."
            )

    def record_step(self, started: Iterable[str], waiting: set[str]) -> None:
        """Record a step.

        Args:
            started: The queue of each request that the step started for the first time.
            waiting: The queues in which it left requests waiting.
        """
        num_starts = Counter(started)
        for queue in self._waiting | waiting:
            self._rates[queue].record_step(num_starts[queue], queue in waiting)
        self._waiting = waiting

    def wait_s(self, queue: str, num_ahead: int) -> float:
        """Estimate the seconds until `num_ahead` requests of a queue have started; 0 if unknown."""
        return self._rates[queue].wait_s(num_ahead) if queue in self._rates else 0.0

    def _limit_s(self, request: Request) -> float | None:
        """Seconds that the request may wait: as configured, and not past its deadline."""
        limits = [] if self._max_queue_wait_s is None else [self._max_queue_wait_s]
        if request.deadline_at is not None:
            limits.append(request.deadline_at - time.monotonic())
        return min(limits, default=None)


class StartRate:
    """The rate at which requests of one queue start while others wait in it."""

    def __init__(self) -> None:
        self._num_starts = self._seconds = 0.0
        self._since_start_s = 0.0  # of the seconds, those after the last start
        self._measured_at = -math.inf  # the last step that counted
        self._stepped_at: float | None = None  # the last step, if it left requests waiting

    def record_step(self, num_starts: int, is_waiting: bool) -> None:
        """Record a step that started so many requests, and whether it left others waiting."""
        now = time.monotonic()
        if self._is_forgotten():
            self._num_starts = self._seconds = 0.0
        if self._stepped_at is not None:
            self._measure(now - self._stepped_at, num_starts)
            self._measured_at = now
        if num_starts or not is_waiting:
            self._since_start_s = 0.0
        self._stepped_at = now if is_waiting else None

    def wait_s(self, num_ahead: int) -> float:
        """Estimate the seconds until `num_ahead` requests have started, from the recent rate.

        It is at least the time since the last start, and 0 while no rate is known.
        """
        if num_ahead <= 0 or self._is_forgotten():
            return 0.0
        return max(num_ahead * self._seconds / max(1.0, self._num_starts), self._since_start_s)

    def _measure(self, seconds: float, num_starts: int) -> None:
        """Add seconds in which requests waited. The last start or two are never halved away: where
        each takes minutes, they are all that is known.
        """
        self._seconds += seconds
        self._since_start_s += seconds
        self._num_starts += num_starts
        if self._seconds > REMEMBERED_S and self._num_starts >= 2:
            self._seconds, self._num_starts = self._seconds / 2, self._num_starts / 2

    def _is_forgotten(self) -> bool:
        return self._stepped_at is None and time.monotonic() - self._measured_at > FORGOTTEN_S


def _share(request: Request, waiting: Sequence[Request]) -> float:
    """Return the tenant's share of the queue, by weight, among the tenants that are in it."""
    weights = {other.tenant: other.weight for other in (*waiting, request)}
    return request.weight / sum(weights.values())
