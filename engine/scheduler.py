"""The scheduler: which tokens of which requests the next step computes, and what happens after it.

Continuous batching over a token budget. A request has one progress number, num_computed_tokens;
the scheduler only ever asks how many of its pending tokens fit into this step, so that a chunk of a
prompt, a whole prompt and a decoded token are one case.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from cluster.errors import Overloaded
from engine.kv_cache import KVCache
from engine.request import FinishReason, Request, RequestState


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request's share of a step."""

    request: Request
    num_new_tokens: int
    samples: bool  # the step reaches its last known token, so that a new one is sampled
    is_decode: bool  # one token beyond the prompt; for counting only


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: what to compute, in the batch's order, and who had to give way."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.scheduled)

    @property
    def sampling(self) -> list[Request]:
        """The requests that get a token, in the order of the batch's logits."""
        return [item.request for item in self.scheduled if item.samples]


class Policy(Protocol):
    """Who goes first. A pure function of the requests and of what the policy counted before."""

    def order(self, requests: Iterable[Request]) -> list[Request]:
        """The requests, the most urgent first; the last one running is preempted first.

        Must be a total order that doesn't change while a step is scheduled, and must bring every
        request to the front at last: the front one always makes progress.
        """


class FirstComeFirstServed:
    """By arrival. A preempted request keeps its place before those that came later."""

    def order(self, requests: Iterable[Request]) -> list[Request]:
        return sorted(requests, key=lambda request: request.arrival_s)


class BlockStore(Protocol):
    """Where KV blocks of earlier requests may come from. A request waits while they travel."""

    def fetch(self, request: Request) -> bool:
        """Start fetching what is known of the request's prefix; False if there is nothing."""

    def is_ready(self, request: Request) -> bool:
        """Whether the fetch is over, with or without success; never blocks."""

    def cancel(self, request: Request) -> None:
        """The request ended before its blocks came."""


class NullBlockStore:
    """Knows no blocks."""

    def fetch(self, request: Request) -> bool:
        return False

    def is_ready(self, request: Request) -> bool:
        return True

    def cancel(self, request: Request) -> None:
        pass


class Scheduler:
    """Holds the waiting and the running requests and owns their blocks' bookkeeping.

    No request starves: `add` takes only requests that fit alone (the engine core checks), running
    requests come before waiting ones, and the first in the policy's order can always take blocks
    from the others.
    """

    def __init__(
        self,
        kv: KVCache,
        *,
        max_num_batched_tokens: int = 512,
        max_num_seqs: int = 64,
        max_queue: int = 1024,
        policy: Policy | None = None,
        store: BlockStore | None = None,
    ) -> None:
        assert max_num_batched_tokens >= 1 and 1 <= max_num_seqs <= kv.num_free_rows
        self.kv = kv
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.max_queue = max_queue
        self.policy: Policy = policy or FirstComeFirstServed()
        self.store: BlockStore = store or NullBlockStore()
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        """Queue a request. Raises Overloaded when the queue is full; those that the next step can
        take on don't count as queued.
        """
        num_idle = max(0, self.max_num_seqs - len(self.running))
        if len(self.waiting) >= self.max_queue + num_idle:
            raise Overloaded(f"{len(self.waiting)} requests are waiting; try again later.")
        if self.store.fetch(request):
            request.state = RequestState.WAITING_FOR_BLOCKS
        self.waiting.append(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request in any state and take its blocks back. Not while a step is computed."""
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
            self.kv.free(request)
        else:
            self.waiting.remove(request)
            if request.state is RequestState.WAITING_FOR_BLOCKS:
                self.store.cancel(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def schedule(self) -> SchedulerOutput:
        """Choose the next step and allocate its blocks; empty when nothing can be computed."""
        output = SchedulerOutput()
        budget = self.max_num_batched_tokens
        queue = deque(self.policy.order(self.running))
        while queue and budget > 0:
            request = queue.popleft()
            while (num_new := self._num_new_tokens(request, budget)) == 0 and queue:
                self._preempt(queue.pop(), output)
            if num_new == 0:
                self._preempt(request, output)
                break
            budget -= self._take(request, num_new, output)

        # Blocks that ran out just now wouldn't last for a newcomer either.
        if budget == 0 or output.preempted or not self._has_room():
            return output
        for request in self.policy.order(self.waiting):
            if not self._is_ready(request):
                continue
            if budget == 0 or not self._has_room() or not self._fits(request):
                break  # nobody overtakes the first that doesn't fit, else it could wait forever
            self._admit(request)
            budget -= self._take(request, self._num_new_tokens(request, budget), output)
        return output

    def update(self, output: SchedulerOutput) -> None:
        """The step was computed: move on, and give back the blocks that windows have left."""
        for item in output.scheduled:
            item.request.num_computed_tokens += item.num_new_tokens
            self.kv.leave_window(item.request)

    def _num_new_tokens(self, request: Request, budget: int) -> int:
        return min(request.num_pending_tokens, budget, self.kv.max_new_tokens(request))

    def _take(self, request: Request, num_new: int, output: SchedulerOutput) -> int:
        self.kv.allocate(request, num_new)
        item = ScheduledRequest(
            request,
            num_new,
            samples=num_new == request.num_pending_tokens,
            is_decode=num_new == 1 and request.num_computed_tokens >= len(request.prompt_ids),
        )
        output.scheduled.append(item)
        return num_new

    def _has_room(self) -> bool:
        return bool(self.waiting) and len(self.running) < self.max_num_seqs

    def _is_ready(self, request: Request) -> bool:
        if request.state is RequestState.WAITING_FOR_BLOCKS and self.store.is_ready(request):
            request.state = RequestState.WAITING
        return request.state is RequestState.WAITING

    def _fits(self, request: Request) -> bool:
        """Whether all its known tokens fit beside the running requests.

        Asking for the first chunk only would admit prompts that preempt each other halfway. What
        the running requests know is allocated: while it isn't, budget or blocks are used up.
        """
        return self.kv.can_hold(request.num_tokens)

    def _admit(self, request: Request) -> None:
        self.waiting.remove(request)
        self.running.append(request)
        self.kv.add(request)
        request.state = RequestState.RUNNING

    def _preempt(self, request: Request, output: SchedulerOutput) -> None:
        """Back to the queue; prompt and output are kept and will be computed again."""
        self.running.remove(request)
        self.kv.free(request)
        self.waiting.insert(0, request)
        request.state = RequestState.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        output.preempted.append(request)

    def check_integrity(self) -> None:
        """Assert that states, lists and blocks agree, and that nothing is held when idle."""
        self.kv.check_integrity()
        assert all(r.state is RequestState.RUNNING for r in self.running)
        queued = (RequestState.WAITING, RequestState.WAITING_FOR_BLOCKS)
        assert all(r.state in queued and r.num_computed_tokens == 0 for r in self.waiting)
        assert set(self.running) == self.kv.requests, "rows and running requests differ"
