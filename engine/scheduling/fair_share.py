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
    """What one tenant has received so far."""

    counter: float = 0.0
    service: float = 0.0
    weight: float = 1.0
    num_started: int = 0  # requests that ran when the step began, or had been preempted


class FairShare:
    """Serves the tenant with the lowest counter first; within a tenant by priority, then arrival.

    A counter grows by the cost of the tenant's tokens over its weight. Each position of a request
    is charged once: a tenant doesn't pay for what is recomputed after a preemption.
    """

    def __init__(self, costs: TokenCosts | None = None) -> None:
        self._costs = costs or TokenCosts()
        self._accounts: defaultdict[str, _Account] = defaultdict(_Account)
        self._backlogged: set[str] = set()  # tenants in the last step

    def order(self, requests: Collection[Request]) -> list[Request]:
        """Rank by the counter that a request's tenant has once those before it are served."""
        by_tenant: defaultdict[str, list[Request]] = defaultdict(list)
        for request in requests:
            by_tenant[request.tenant].append(request)
        for tenant, own in by_tenant.items():
            account = self._accounts[tenant]
            account.weight = own[0].weight
            account.num_started = sum(_has_started(request) for request in own)
        self._lift({request.tenant for request in requests if _is_backlogged(request)})
        keyed = []
        for tenant, own in by_tenant.items():
            counter, num_started = self._standing(tenant)
            for request in sorted(own, key=lambda r: (-r.priority, r.arrived_at)):
                keyed.append(((counter, num_started), request))
                counter += request.num_pending_tokens / request.weight  # about what it will cost
        return [request for _, request in sorted(keyed, key=lambda pair: pair[0])]

    def select_victim(
        self,
        waiting: Request,
        running: Sequence[Request],
        seats: Mapping[Request, float],
        num_seats: int,
    ) -> Request | None:
        """Choose a victim for a tenant that runs nothing, or has at most half its share of seats.

        It is the last request of a tenant that has a higher counter and more than its share of
        seats; else the last of the same tenant with a lower priority. From half its share on, a
        tenant takes only seats that others leave.
        """
        held: defaultdict[str, float] = defaultdict(float)
        for request, num in seats.items():
            held[request.tenant] += num
        weights = {tenant: self._accounts[tenant].weight for tenant in held}
        each = num_seats / sum(weights.values())
        share = {tenant: max(1.0, each * weight) for tenant, weight in weights.items()}

        own, standing = waiting.tenant, self._standing(waiting.tenant)
        runs_nothing = held[own] == seats[waiting]
        if held[own] <= (share[own] if runs_nothing else share[own] / 2):
            for request in reversed(running):
                tenant = request.tenant
                if held[tenant] > share[tenant] and self._standing(tenant) > standing:
                    return request
        lower = [r for r in running if r.tenant == own and r.priority < waiting.priority]
        return lower[-1] if lower else None

    def may_backfill(self, request: Request, blocked: Sequence[Request]) -> bool:
        """True if no request of its tenant is blocked: a tenant's requests keep their order."""
        return all(other.tenant != request.tenant for other in blocked)

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
        """Lift the counters of tenants that return from idling (the counter lift of VTC).

        A returning tenant starts at the minimum of the backlogged tenants' counters, or at the
        maximum of all if none is backlogged, so that idle time earns no credit.
        """
        waited = [self._accounts[tenant].counter for tenant in self._backlogged & backlogged]
        every = [account.counter for account in self._accounts.values()]
        level = min(waited) if waited else max(every, default=0.0)
        for tenant in backlogged - self._backlogged:
            account = self._accounts[tenant]
            account.counter = max(account.counter, level)
        self._backlogged = backlogged

    def _standing(self, tenant: str) -> tuple[float, float]:
        """Return the tenant's rank: lowest counter first, then fewest started requests by weight.

        Preempted requests count as started: recomputed tokens aren't charged, so that two equal
        tenants would otherwise preempt each other for ever.
        """
        account = self._accounts[tenant]
        return account.counter, account.num_started / account.weight


def _is_backlogged(request: Request) -> bool:
    """True for requests that compete for the budget; a decode gets its token in each step."""
    return request.state is RequestState.WAITING or request.num_pending_tokens > 1


def _has_started(request: Request) -> bool:
    return request.state is RequestState.RUNNING or request.num_preemptions > 0
