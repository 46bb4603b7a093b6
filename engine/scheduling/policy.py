"""Policy: what the scheduler asks about the order of requests; and first come, first served."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.request import Request, RequestState


class Work(enum.Enum):
    """What was done for a token."""

    CACHED = "cached"  # it was found in the KV cache or in a store
    PREFILL = "prefill"  # computed in a chunk
    DECODE = "decode"  # computed alone, to get the next one


@dataclass(frozen=True, slots=True)
class TenantShare:
    """A tenant's standing under a policy that shares by tenant."""

    weight: float
    service: float  # counter, in the cost of a prompt's first token
    counter: float  # service over weight, lifted after idle times; the lowest goes first


class Policy(Protocol):
    """Ranks requests by what they are and what it was charged; knows neither blocks nor budgets."""

    def order(self, requests: Collection[Request]) -> list[Request]:
        """Return all running and startable requests, the most urgent first; asked once a step.

        Every request must come to the front at last, since only the front one is sure to make
        progress: the last running one is preempted first.
        """

    def select_victim(
        self,
        waiting: Request,
        running: Sequence[Request],
        seats: Mapping[Request, float],
        num_seats: int,
    ) -> Request | None:
        """Choose the request to preempt for a waiting one that finds no room.

        Args:
            waiting: The request without room.
            running: The candidates, in order.
            seats: How many of the engine's seats (`max_num_seqs`) each of these requests takes:
                one, or more if it has a larger share of the KV cache.
            num_seats: All of the engine's seats.

        Returns:
            One of `running`; None if `waiting` has to wait.
        """

    def may_backfill(self, request: Request, blocked: Sequence[Request]) -> bool:
        """True if the request may start before the `blocked` ones, which rank higher but find no
        room. It is preempted as soon as one of them would fit in its place.
        """

    def charge(self, request: Request, stop: int, work: Work) -> None:
        """Charge for work on the request's tokens up to position `stop`, each position once."""

    def queue_of(self, request: Request) -> str:
        """Name the queue of the request: a queue's requests start one after the other, whatever
        starts from other queues meanwhile.
        """

    def num_ahead(self, request: Request, waiting: Sequence[Request]) -> int:
        """Count the `waiting` requests that start before this one in its queue."""

    def shares(self) -> dict[str, TenantShare]:
        """Each tenant's standing; empty if the policy doesn't share by tenant."""


class FirstComeFirstServed:
    """Ranks by arrival, running requests first. Waiting requests neither preempt nor overtake.

    A preempted request keeps its rank before those that came later.
    """

    def order(self, requests: Collection[Request]) -> list[Request]:
        return sorted(requests, key=lambda r: (r.state is not RequestState.RUNNING, r.arrived_at))

    def select_victim(
        self,
        waiting: Request,
        running: Sequence[Request],
        seats: Mapping[Request, float],
        num_seats: int,
    ) -> Request | None:
        return None

    def may_backfill(self, request: Request, blocked: Sequence[Request]) -> bool:
        return False

    def charge(self, request: Request, stop: int, work: Work) -> None:
        pass

    def queue_of(self, request: Request) -> str:
        return "all"

    def num_ahead(self, request: Request, waiting: Sequence[Request]) -> int:
        return len(waiting)

    def shares(self) -> dict[str, TenantShare]:
        return {}
