"""StepBuilder: one step in the making, with what is left of its token budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence

from engine.cache.kv_cache import KVCache
from engine.cache.prefix import Prefix
from engine.request import Request, RequestState
from engine.scheduling.active_requests import ActiveRequests
from engine.scheduling.policy import Policy, Work
from engine.scheduling.prefix_loader import PrefixLoader
from engine.scheduling.scheduler_output import ScheduledRequest, SchedulerOutput
from engine.spans import uncut


class StepBuilder:
    """Admits waiting requests to a step and grows running ones, as far as tokens and blocks last.

    Each decode that the step has not reached yet has one token of the budget reserved, so that the
    chunk of a prompt before it can't take it.
    """

    def __init__(
        self,
        order: Sequence[Request],
        *,
        requests: ActiveRequests,
        kv: KVCache,
        loader: PrefixLoader,
        policy: Policy,
        token_budget: int,
        max_num_seqs: int,
    ) -> None:
        """`order` has all running and startable requests, the most urgent first."""
        self._order = order
        self._requests, self._kv, self._loader, self._policy = requests, kv, loader, policy
        self._budget, self._max_num_seqs = token_budget, max_num_seqs
        self._queue = deque(order)
        self._decodes = {r for r in requests.running if r.num_pending_tokens == 1}
        self._scheduled: dict[Request, ScheduledRequest] = {}
        self._preempted: list[Request] = []
        self._found: dict[Request, list[Prefix]] = {}
        self._is_closed = False  # to waiting requests
        self.blocked: list[Request] = []  # waiting requests that found no room
        self.started: list[Request] = []  # those that ran for the first time

    def __iter__(self) -> Iterator[Request]:
        """The requests that are still to be served, in order, while there is budget."""
        while self._queue and self._budget > 0:
            request = self._queue.popleft()
            if request not in self._preempted:
                yield request

    def build(self) -> SchedulerOutput:
        """Return the finished step."""
        return SchedulerOutput(list(self._scheduled.values()), self._preempted)

    def admit(self, request: Request) -> bool:
        """Start a waiting request, in place of others if need be; True if it runs now.

        One that finds no room blocks those behind it, except what the policy backfills.
        """
        if self._limit(request) <= 0:
            return False
        if self._is_closed or not self._may_start(request) or not self._start(request):
            if request.state is RequestState.WAITING:
                self.blocked.append(request)
            return False
        if self.blocked:
            self._requests.backfilled[request] = list(self.blocked)
        if request.num_preemptions == 0:
            self.started.append(request)
        return True

    def grow(self, request: Request) -> None:
        """Allocate the blocks of a running request's next tokens.

        Where none are free, others are preempted; where there are none to preempt, it is itself.
        A request that gets fewer tokens than the budget has for it closes the step to waiting
        requests: what it lacks, blocks or a larger budget, they would take from it.
        """
        limit = self._limit(request)
        self._decodes.discard(request)
        if limit <= 0:
            return
        if not self._scheduled and self._num_affordable(request, limit) == 0:
            limit = self._budget  # a span at the head of the step may take the decodes' tokens
        num_affordable = self._num_affordable(request, limit)
        num_new = self._num_allocatable(request, num_affordable)
        while num_affordable and not num_new and self.reclaim():
            num_new = self._num_allocatable(request, num_affordable)
        if num_new < min(request.num_pending_tokens, limit):
            self._is_closed = True
        if num_new:
            self._take(request, num_new)
        elif num_affordable:
            self._preempt(request)

    def reclaim(self) -> bool:
        """Preempt the last running request that isn't served yet; False if there is none.

        Waiting requests behind it leave the step too, which is closed to them from now on.
        """
        self._is_closed = True
        while self._queue:
            last = self._queue.pop()
            if last.state is RequestState.RUNNING:
                self._preempt(last)
                return True
        return False

    # Tokens

    def _limit(self, request: Request) -> int:
        """Tokens of the budget that the request may take."""
        is_reserved = request in self._decodes
        return self._budget if is_reserved else self._budget - len(self._decodes)

    def _num_affordable(self, request: Request, limit: int) -> int:
        """How many of its tokens the request may compute, if blocks last.

        0 where a span is next that needs a step with more budget left: spans aren't cut.
        """
        start = request.num_computed_tokens
        return uncut(request.spans, start + min(request.num_pending_tokens, limit)) - start

    def _num_allocatable(self, request: Request, num_tokens: int) -> int:
        """How many of these tokens free blocks can hold."""
        start = request.num_computed_tokens
        num_tokens = min(num_tokens, self._kv.max_new_tokens(request))
        return uncut(request.spans, start + num_tokens) - start

    def _take(self, request: Request, num_new: int) -> None:
        self._kv.allocate(request, num_new)
        self._found.clear()
        self._budget -= num_new
        self._scheduled[request] = ScheduledRequest(
            request,
            start=request.num_computed_tokens,
            num_new_tokens=num_new,
            samples=num_new == request.num_pending_tokens,
            is_decode=num_new == 1 and request.num_computed_tokens >= len(request.prompt_ids),
        )

    def _preempt(self, request: Request) -> None:
        if (item := self._scheduled.pop(request, None)) is not None:
            self._budget += item.num_new_tokens
        self._requests.preempt(request)
        self._found.clear()
        self._preempted.append(request)

    # Room for a waiting request

    def _may_start(self, request: Request) -> bool:
        return not self.blocked or self._policy.may_backfill(request, self.blocked)

    def _start(self, request: Request) -> bool:
        """Start a request behind its prefix, in place of others if need be; False if it can't."""
        if request.asks_store and self._loader.fetch(request, self._prefixes(request)[-1]):
            return False
        victims: list[Request] = []
        candidates = self._victims(request)
        while (prefix := self._fitting(request, victims)) is None:
            victim = next(candidates, None)
            if victim is None:
                return False
            victims.append(victim)
        if victims:
            if self._makes_room_for_blocked(victims):
                return False
            for victim in victims:
                self._preempt(victim)
            self._decodes.difference_update(victims)  # their tokens are free for others
            prefix = self._fitting(request)  # preempting has changed what is cached
        if prefix is None or not self._loader.start(request, prefix, self._prefixes(request)):
            return False
        self._found.clear()
        self._policy.charge(request, request.num_computed_tokens, Work.CACHED)
        self._requests.started(request)
        return True

    def _fitting(self, request: Request, without: Collection[Request] = ()) -> Prefix | None:
        """Return the longest prefix behind which the request fits, `without` some running ones.

        It fits if there is a seat for it and blocks for all its known tokens. To ask for its first
        chunk only would admit prompts that preempt each other halfway.
        """
        if len(self._requests.running) - len(without) >= self._max_num_seqs:
            return None
        fitting = (p for p in self._prefixes(request) if self._kv.can_hold(request, p, without))
        return next(fitting, None)

    def _prefixes(self, request: Request) -> list[Prefix]:
        """Return the request's prefixes, looked up once, as long as the KV cache doesn't change."""
        if request not in self._found:
            self._found[request] = self._loader.find(request)
        return self._found[request]

    def _victims(self, request: Request) -> Iterator[Request]:
        """Requests to preempt so that `request` fits, one after the other.

        Backfilled ones come first (the newest first), then the policy's victims.
        """
        running = [other for other in self._order if other.state is RequestState.RUNNING]
        for backfilled in reversed(self._backfilled_past(request)):
            running.remove(backfilled)
            yield backfilled
        while (victim := self._select_victim(request, running)) is not None:
            running.remove(victim)
            yield victim

    def _select_victim(self, request: Request, running: Sequence[Request]) -> Request | None:
        seats = {other: self._num_seats(other) for other in (*running, request)}
        return self._policy.select_victim(request, running, seats, self._max_num_seqs)

    def _num_seats(self, request: Request) -> float:
        """One of max_num_seqs, or more for a request with a larger share of the KV cache."""
        capacity = self._kv.max_request_tokens
        share = 0.0 if capacity is None else request.num_tokens / capacity
        return max(1.0, share * self._max_num_seqs)

    def _makes_room_for_blocked(self, victims: Sequence[Request]) -> bool:
        """True if preempting the victims would also make room for the head-of-line request.

        That one must then start first.
        """
        if not self.blocked:
            return False
        first = self.blocked[0]
        without = {*victims, *self._backfilled_past(first)}
        return self._fitting(first, without) is not None

    def _backfilled_past(self, request: Request) -> list[Request]:
        """Requests that were backfilled past `request` and still rank behind it, in order."""
        behind = self._order[self._order.index(request) :]
        return [other for other in behind if request in self._requests.backfilled.get(other, ())]
