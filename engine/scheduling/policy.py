"""Who goes first: what the scheduler asks of a policy, and first come, first served."""

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
    """How a tenant stands; a policy that shares by tenant tells it."""

    weight: float
    service: float  # counter, in the cost of a prompt's first token
    counter: float  # service over weight, lifted where it was idle; the lowest goes first


class Policy(Protocol):
    """Decides from the requests and from what it was charged; knows neither blocks nor budgets."""

    def order(self, requests: Collection[Request]) -> list[Request]:
        """All that run or wait, the most urgent first; asked once a step. The last one running is
        preempted first.

        Must bring every request to the front at last: the front one always makes progress.
        """

    def gives_way(
        self,
        waiting: Request,
        running: Sequence[Request],
        places: Mapping[Request, float],
        num_places: int,
    ) -> Request | None:
        """Which of the `running` ones, in the order, is preempted for one that finds no room;
        None: it waits.

        `places` says how many of the engine's `num_places` each of them and this one take.
        """

    def may_overtake(self, request: Request, held_up: Sequence[Request]) -> bool:
        """Whether one may start before these, which go first but find no room. It gives its place
        back as soon as one of them would fit.
        """

    def charge(self, request: Request, stop: int, work: Work) -> None:
        """This was done for the request's tokens up to position `stop`; each counts once."""

    def queue_of(self, request: Request) -> str:
        """A name for those that start one after the other, whatever else starts meanwhile."""

    def num_ahead(self, request: Request, waiting: Sequence[Request]) -> int:
        """How many of these start before it in its queue."""

    def shares(self) -> dict[str, TenantShare]:
        """By tenant; empty where tenants make no difference."""


class FirstComeFirstServed:
    """By arrival, those that run before those that wait; nobody gives way to a newcomer. A
    preempted request keeps its place before those that came later.
    """

    def order(self, requests: Collection[Request]) -> list[Request]:
        return sorted(requests, key=lambda r: (r.state is not RequestState.RUNNING, r.arrived_at))

    def gives_way(
        self,
        waiting: Request,
        running: Sequence[Request],
        places: Mapping[Request, float],
        num_places: int,
    ) -> Request | None:
        return None

    def may_overtake(self, request: Request, held_up: Sequence[Request]) -> bool:
        return False

    def charge(self, request: Request, stop: int, work: Work) -> None:
        pass

    def queue_of(self, request: Request) -> str:
        return "all"

    def num_ahead(self, request: Request, waiting: Sequence[Request]) -> int:
        return len(waiting)

    def shares(self) -> dict[str, TenantShare]:
        return {}
