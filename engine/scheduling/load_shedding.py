"""Load shedding: who is refused at arrival, instead of waiting in a queue that is too long."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from cluster.errors import Overloaded
from engine.request import Request
from engine.scheduling.policy import Policy

REMEMBERED_S = 30.0  # seconds in which somebody waited; older ones weigh half
FORGOTTEN_S = 600.0  # seconds in which nobody waited, after which no rate is known


class LoadShedding:
    """Bounds the queue, each tenant's part of it, and the time in it.

    A full queue locks out no tenant that has less than its share of it.
    """

    def __init__(
        self,
        max_queue: int = 1024,
        max_queue_per_tenant: int | None = None,
        max_queue_wait_s: float | None = None,
    ) -> None:
        self._max_queue = max_queue
        self._max_queue_per_tenant = max_queue_per_tenant
        self._max_queue_wait_s = max_queue_wait_s
        self._rates: defaultdict[str, StartRate] = defaultdict(StartRate)  # by the policy's queue
        self._waiting: set[str] = set()  # the queues that the last step left somebody in

    def check(
        self, request: Request, waiting: Sequence[Request], num_idle: int, policy: Policy
    ) -> None:
        """Raises Overloaded for a request that may not wait, or would wait too long. Those that
        the next step can take on, `num_idle`, don't count as queued.
        """
        num_own = sum(other.tenant == request.tenant for other in waiting)
        most = self._max_queue_per_tenant
        if most is not None and num_own >= most + num_idle:
            raise Overloaded(
                f"{num_own} of your requests are waiting, the most that may; wait for an answer."
            )
        share = _share(request, waiting)
        if len(waiting) >= self._max_queue + num_idle and num_own >= share * self._max_queue:
            raise Overloaded(f"{len(waiting)} requests are waiting; try again later.")
        num_ahead = policy.num_ahead(request, waiting) - num_idle
        wait_s, most_s = self.wait_s(policy.queue_of(request), num_ahead), self._most_s(request)
        if most_s is not None and wait_s > most_s:
            raise Overloaded(
                f"About {wait_s:.0f} s of waiting are ahead of this request, which may wait "
                f"{most_s:.0f} s; try again later."
            )

    def saw_step(self, started: Iterable[str], waiting: set[str]) -> None:
        """A step took on requests of these queues for the first time, one for each that is named,
        and left some waiting in those.
        """
        num_starts = Counter(started)
        for queue in self._waiting | waiting:
            self._rates[queue].saw_step(num_starts[queue], queue in waiting)
        self._waiting = waiting

    def wait_s(self, queue: str, num_ahead: int) -> float:
        """How long so many starts of the queue take; 0 while that isn't known."""
        return self._rates[queue].wait_s(num_ahead) if queue in self._rates else 0.0

    def _most_s(self, request: Request) -> float | None:
        """How long the request may wait: as configured, and not past its deadline."""
        limits = [] if self._max_queue_wait_s is None else [self._max_queue_wait_s]
        if request.deadline_at is not None:
            limits.append(request.deadline_at - time.monotonic())
        return min(limits, default=None)


class StartRate:
    """How fast the requests of one queue start while some wait in it."""

    def __init__(self) -> None:
        self._num_starts = self._seconds = 0.0
        self._since_start_s = 0.0  # of the seconds, those after the last start
        self._measured_s = -math.inf  # when a step last counted
        self._last_s: float | None = None  # the last step, if it left somebody waiting

    def saw_step(self, num_starts: int, is_waiting: bool) -> None:
        now_s = time.monotonic()
        if self._is_forgotten():
            self._num_starts = self._seconds = 0.0
        if self._last_s is not None:
            self._measure(now_s - self._last_s, num_starts)
            self._measured_s = now_s
        if num_starts or not is_waiting:
            self._since_start_s = 0.0
        self._last_s = now_s if is_waiting else None

    def wait_s(self, num_ahead: int) -> float:
        """How long so many starts take, by the rate of late, and at least as long as there has been
        none; 0 while that isn't known.
        """
        if num_ahead <= 0 or self._is_forgotten():
            return 0.0
        return max(num_ahead * self._seconds / max(1.0, self._num_starts), self._since_start_s)

    def _measure(self, seconds: float, num_starts: int) -> None:
        """Somebody waited for so long. The last start or two are never halved away: where each
        takes minutes, they are what is known.
        """
        self._seconds += seconds
        self._since_start_s += seconds
        self._num_starts += num_starts
        if self._seconds > REMEMBERED_S and self._num_starts >= 2:
            self._seconds, self._num_starts = self._seconds / 2, self._num_starts / 2

    def _is_forgotten(self) -> bool:
        return self._last_s is None and time.monotonic() - self._measured_s > FORGOTTEN_S


def _share(request: Request, waiting: Sequence[Request]) -> float:
    """The tenant's part of the queue, by weight, of those that are in it."""
    weights = {other.tenant: other.weight for other in (*waiting, request)}
    return request.weight / sum(weights.values())
