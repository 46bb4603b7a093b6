"""The scheduler: which tokens of which requests the next step computes, and what happens after it.

NOTE: there is no prefill phase and no decode phase. A request has one progress number,
`num_computed_tokens`, and the scheduler makes it catch up with `num_tokens`. In each step it goes
through the requests in the policy's order:

1. a waiting request is admitted if all its known tokens fit, behind the longest prefix that is
   cached;
2. a running request grows by as many of its pending tokens as the step's token budget and the
   free blocks allow.

So a chunk of a prompt, a whole prompt and a decoded token are one case, and they share steps
(continuous batching with chunked prefill).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from engine.cache.block_store import BlockStore, NullBlockStore
from engine.cache.kv_cache import KVCache
from engine.request import FinishReason, Request, RequestState
from engine.scheduling.active_requests import ActiveRequests
from engine.scheduling.load_shedding import LoadShedding
from engine.scheduling.policy import FirstComeFirstServed, Policy, TenantShare, Work
from engine.scheduling.prefix_loader import PrefixCacheStats, PrefixLoader
from engine.scheduling.scheduler_output import SchedulerOutput
from engine.scheduling.step_builder import StepBuilder


class Scheduler:
    """Holds the waiting and the running requests, and plans their steps.

    No request starves: `add` takes only requests that fit alone (the engine core checks), a
    backfilled request is preempted for the one that it passed, and the first running request can
    always take blocks from the others.
    """

    def __init__(
        self,
        kv: KVCache,
        *,
        max_num_batched_tokens: int = 512,
        max_num_seqs: int = 64,
        policy: Policy | None = None,
        load_shedding: LoadShedding | None = None,
        store: BlockStore | None = None,
    ) -> None:
        assert max_num_batched_tokens >= 1 and 1 <= max_num_seqs <= kv.num_free_rows
        self.kv = kv
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)  # a token a step for each
        self.policy: Policy = policy or FirstComeFirstServed()
        self.load_shedding = load_shedding or LoadShedding()
        self.store: BlockStore = store or NullBlockStore()
        self._requests = ActiveRequests(kv, self.store)
        self._loader = PrefixLoader(kv, self.store)
        self._blocked: list[Request] = []  # found no room in the last step

    @property
    def waiting(self) -> list[Request]:
        """Requests in the queue, preempted ones at its head."""
        return self._requests.waiting

    @property
    def running(self) -> list[Request]:
        """Requests that hold blocks, in the order of their starts."""
        return self._requests.running

    @property
    def num_preemptions(self) -> int:
        """Counter of preemptions since the start."""
        return self._requests.num_preemptions

    @property
    def waits_for_blocks(self) -> bool:
        """True if no request can go on before the store brings its blocks."""
        states = {request.state for request in (*self.running, *self.waiting)}
        return states == {RequestState.WAITING_FOR_BLOCKS}

    @property
    def prefix_stats(self) -> Mapping[str, PrefixCacheStats]:
        """Counters of the prefix cache, by tenant."""
        return self._loader.stats

    @property
    def shares(self) -> dict[str, TenantShare]:
        """Each tenant's standing; empty where the policy makes no difference between tenants."""
        return self.policy.shares()

    def add(self, request: Request) -> None:
        """Queue a request. Raises Overloaded when it would wait too long, or too many wait."""
        is_full = any(other.state is RequestState.WAITING for other in self._blocked)
        num_idle = 0 if is_full else max(0, self.max_num_seqs - len(self.running))
        self.load_shedding.check(request, self.waiting, num_idle, self.policy)
        self._loader.fetch(request, self.kv.find_prefix(request))
        self.waiting.append(request)

    def withdraw(self, request: Request) -> None:
        """Drop a request that isn't accepted after all, queued or not."""
        self._requests.withdraw(request)

    def preempt(self, request: Request) -> None:
        """Return a running request to the queue and free its blocks, between two steps."""
        self._requests.preempt(request)

    def finish(self, request: Request, reason: FinishReason, *, is_sound: bool = True) -> None:
        """End a request in any state and free its blocks, between two steps.

        What it has computed stays cached for others, unless it isn't sound.
        """
        self._requests.finish(request, reason, is_sound=is_sound)

    def schedule(self) -> SchedulerOutput:
        """Plan the next step and allocate its blocks; empty when nothing can be computed."""
        self._loader.poll(self.waiting)
        startable = [r for r in self.waiting if r.state is RequestState.WAITING]
        step = StepBuilder(
            self.policy.order([*self.running, *startable]),
            requests=self._requests,
            kv=self.kv,
            loader=self._loader,
            policy=self.policy,
            token_budget=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
        )
        for request in step:
            if request.state is RequestState.RUNNING or step.admit(request):
                step.grow(request)
        self._blocked = step.blocked
        self.load_shedding.record_step(
            [self.policy.queue_of(request) for request in step.started],
            {self.policy.queue_of(request) for request in self.waiting},
        )
        return step.build()

    def update(self, output: SchedulerOutput, failed: Collection[Request] = ()) -> None:
        """Record a step that was computed: progress, full blocks, blocks before windows.

        Requests in `failed` are charged for it, but make no progress.
        """
        self.charge(output)
        for item in output.scheduled:
            if item.request not in failed:
                self._requests.commit(item.request, item.stop)

    def charge(self, output: SchedulerOutput) -> None:
        """Charge tenants for a step, also for one that failed; a second time adds nothing."""
        for item in output.scheduled:
            work = Work.DECODE if item.is_decode else Work.PREFILL
            self.policy.charge(item.request, item.stop, work)

    def check_integrity(self) -> None:
        """Assert that states, lists and blocks agree, and that no block is held when idle."""
        self._requests.check_integrity()
