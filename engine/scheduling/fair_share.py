"""Fair share: a virtual token counter for each tenant decides whose tokens enter the next step.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), with weights, chunked
prefill, prices from the model's own work, and preemption: docs/decisions/0010-fair-share.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from engine.request import Request, RequestState
from engine.scheduling.policy import TenantShare, Work
from engine.scheduling.token_costs import TokenCosts


@dataclass(slots=True)
class _Account:
    """What a tenant has received."""

    counter: float = 0.0
    service: float = 0.0
    weight: float = 1.0
    num_begun: int = 0  # requests that ran when the step began, or had given way


class FairShare:
    """The tenant with the lowest counter goes first; within it priority, then arrival.

    A counter grows by the cost of the tenant's tokens over its weight. Each position of a request
    is charged once: that it had to give way and is computed again is not its tenant's fault.
    """

    def __init__(self, costs: TokenCosts | None = None) -> None:
        self._costs = costs or TokenCosts()
        self._accounts: defaultdict[str, _Account] = defaultdict(_Account)
        self._backlogged: set[str] = set()  # of the last step

    def order(self, requests: Collection[Request]) -> list[Request]:
        """By the counter that each request's tenant has when those before it are served."""
        by_tenant: defaultdict[str, list[Request]] = defaultdict(list)
        for request in requests:
            by_tenant[request.tenant].append(request)
        for tenant, own in by_tenant.items():
            account = self._accounts[tenant]
            account.weight = own[0].weight
            account.num_begun = sum(_has_begun(request) for request in own)
        self._lift({request.tenant for request in requests if _is_backlogged(request)})
        keyed = []
        for tenant, own in by_tenant.items():
            counter, begun = self._standing(tenant)
            for request in sorted(own, key=lambda r: (-r.priority, r.arrived_at)):
                keyed.append(((counter, begun), request))
                counter += request.num_pending_tokens / request.weight  # about what it will cost
        return [request for _, request in sorted(keyed, key=lambda pair: pair[0])]

    def gives_way(
        self,
        waiting: Request,
        running: Sequence[Request],
        places: Mapping[Request, float],
        num_places: int,
    ) -> Request | None:
        """For a tenant that has nothing running, or less than half its share of places: the last
        one of a tenant that is further ahead and has more than its share. Else one of the same
        tenant's lower priorities.

        From half its share on, a tenant that is behind gets the places that others leave.
        """
        held: defaultdict[str, float] = defaultdict(float)
        for request, num in places.items():
            held[request.tenant] += num
        weights = {tenant: self._accounts[tenant].weight for tenant in held}
        each = num_places / sum(weights.values())
        share = {tenant: max(1.0, each * weight) for tenant, weight in weights.items()}
        own = share[waiting.tenant]
        is_first = held[waiting.tenant] == places[waiting]
        if held[waiting.tenant] <= (own if is_first else own / 2):
            standing = self._standing(waiting.tenant)
            for request in reversed(running):
                tenant = request.tenant
                if held[tenant] > share[tenant] and self._standing(tenant) > standing:
                    return request
        lower = [r for r in running if r.tenant == waiting.tenant and r.priority < waiting.priority]
        return lower[-1] if lower else None

    def may_overtake(self, request: Request, held_up: Sequence[Request]) -> bool:
        """Other tenants' requests; a tenant's own keep their order."""
        return all(other.tenant != request.tenant for other in held_up)

    def charge(self, request: Request, stop: int, work: Work) -> None:
        start = request.num_charged_tokens
        if stop > start:
            request.num_charged_tokens = stop
            cost = self._costs.cost(work, start, stop)
            account = self._accounts[request.tenant]
            account.service += cost
            account.counter += cost / request.weight

    def queue_of(self, request: Request) -> str:
        return request.tenant

    def num_ahead(self, request: Request, waiting: Sequence[Request]) -> int:
        own = (other for other in waiting if other.tenant == request.tenant)
        return sum(other.priority >= request.priority for other in own)

    def shares(self) -> dict[str, TenantShare]:
        return {
            tenant: TenantShare(account.weight, account.service, account.counter)
            for tenant, account in self._accounts.items()
        }

    def _lift(self, backlogged: set[str]) -> None:
        """Who was idle comes back at the lowest counter of those that have been waiting, or, where
        nobody has, at the highest of all: what one didn't ask for is no credit.
        """
        standing = [self._accounts[tenant].counter for tenant in self._backlogged & backlogged]
        every = [account.counter for account in self._accounts.values()]
        level = min(standing) if standing else max(every, default=0.0)
        for tenant in backlogged - self._backlogged:
            account = self._accounts[tenant]
            account.counter = max(account.counter, level)
        self._backlogged = backlogged

    def _standing(self, tenant: str) -> tuple[float, float]:
        """The lowest goes first; of equals, as after a lift, who has less begun. If who gave way
        went before equals that run, they would take turns without end: nothing is charged twice.
        """
        account = self._accounts[tenant]
        return account.counter, account.num_begun / account.weight


def _is_backlogged(request: Request) -> bool:
    """A decoding request gets its token in each step; all others compete for the budget."""
    return request.state is RequestState.WAITING or request.num_pending_tokens > 1


def _has_begun(request: Request) -> bool:
    return request.state is RequestState.RUNNING or request.num_preemptions > 0
