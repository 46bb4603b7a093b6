"""The scheduler: which tokens of which requests the next step computes, and what happens after it.

Continuous batching over a token budget. A request has one progress number, num_computed_tokens;
the scheduler only ever asks how many of its pending tokens fit into this step, so that a chunk of a
prompt, a whole prompt and a decoded token are one case.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence

from engine.cache.block_store import BlockStore, NullBlockStore, StoredBlock
from engine.cache.kv_cache import KVCache
from engine.request import FinishReason, Request, RequestState
from engine.scheduling.load_shedding import LoadShedding
from engine.scheduling.policy import FirstComeFirstServed, Policy, TenantShare, Work
from engine.scheduling.prefix_loader import PrefixCacheStats, PrefixLoader
from engine.scheduling.scheduler_output import ScheduledRequest, SchedulerOutput
from engine.spans import uncut


class Scheduler:
    """Holds the waiting and the running requests and owns their blocks' bookkeeping.

    No request starves: `add` takes only requests that fit alone (the engine core checks), who
    overtakes one that finds no room gives way to it, and the first one running can always take
    blocks from the others.
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
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._held_up: list[Request] = []  # found no room in the last step
        self._overtaken: dict[Request, list[Request]] = {}  # by those that run in their stead
        self.num_preemptions = 0
        self._loader = PrefixLoader(kv, self.store)

    @property
    def waits_for_blocks(self) -> bool:
        """Whether no request can go on before the store brings its blocks."""
        states = {request.state for request in (*self.running, *self.waiting)}
        return states == {RequestState.WAITING_FOR_BLOCKS}

    @property
    def prefix_stats(self) -> Mapping[str, PrefixCacheStats]:
        """By tenant."""
        return self._loader.prefix_stats

    @property
    def shares(self) -> dict[str, TenantShare]:
        """How each tenant stands; empty where the policy makes no difference between them."""
        return self.policy.shares()

    def add(self, request: Request) -> None:
        """Queue a request. Raises Overloaded when it would wait too long, or too many wait."""
        is_full = any(other.state is RequestState.WAITING for other in self._held_up)
        num_idle = 0 if is_full else max(0, self.max_num_seqs - len(self.running))
        self.load_shedding.check(request, self.waiting, num_idle, self.policy)
        self._loader.ask_store(request)
        self.waiting.append(request)

    def withdraw(self, request: Request) -> None:
        """Drop a request that has not been accepted after all, as far as it got."""
        if request in self.waiting:
            self.waiting.remove(request)
        self.store.release(request)

    def finish(self, request: Request, reason: FinishReason, *, is_sound: bool = True) -> None:
        """End a request in any state and take its blocks back. Not while a step is computed.

        What it has computed stays for others to resume from, unless it isn't sound.
        """
        if request.state is RequestState.RUNNING:
            if not is_sound:
                self.kv.forget(request)
                self.store.discard(request)
            self.running.remove(request)
            self._release(request, keep=is_sound)
        else:
            self.waiting.remove(request)
            self.store.release(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def schedule(self) -> SchedulerOutput:
        """Choose the next step and allocate its blocks; empty when nothing can be computed.

        A chunk leaves a token of the budget to each decode behind it.
        """
        self._loader.look_for_blocks(self.waiting)
        output = SchedulerOutput()
        ready = [r for r in self.waiting if r.state is RequestState.WAITING]
        order = self.policy.order([*self.running, *ready])
        queue = deque(order)
        budget = self.max_num_batched_tokens
        decodes = {request for request in self.running if request.num_pending_tokens == 1}
        started: list[str] = []  # their queues
        is_closed = False  # blocks ran out, a newcomer's wouldn't last
        self._held_up = []
        while queue and budget > 0:
            request = queue.popleft()
            if request in output.preempted:
                continue
            is_waiting = request.state is RequestState.WAITING
            is_decode = request in decodes
            decodes.discard(request)
            limit = budget if is_decode else budget - len(decodes)
            if limit <= 0:
                continue
            if is_waiting:
                may_start = not is_closed and self._may_start(request)
                if not (may_start and self._let_in(request, order, output)):
                    if request.state is RequestState.WAITING:
                        self._held_up.append(request)
                    continue
                if self._held_up:
                    self._overtaken[request] = list(self._held_up)
                if request.num_preemptions == 0:
                    started.append(self.policy.queue_of(request))
                decodes.difference_update(output.preempted)
                budget = self.max_num_batched_tokens - output.num_tokens  # some may have given way
                limit = budget - len(decodes)
            if not output.scheduled and self._num_new_tokens(request, limit) is None:
                limit = budget  # the first one's span comes before decodes, else it might never fit
            while (num_new := self._num_new_tokens(request, limit)) == 0 and queue:
                is_closed = True
                if (last := queue.pop()).state is RequestState.RUNNING:
                    self._preempt(last, output)
            is_closed |= num_new != min(request.num_pending_tokens, limit)
            if num_new is None:
                continue
            if num_new == 0:
                self._preempt(request, output)
                break
            budget -= self._take(request, num_new, output)
        self.load_shedding.saw_step(started, {self.policy.queue_of(r) for r in self.waiting})
        return output

    def update(self, output: SchedulerOutput, failed: Collection[Request] = ()) -> None:
        """The step was computed: move on, let others find the blocks that are full now, and give
        back those that windows have left. What was computed for the `failed` is charged, but no
        progress.
        """
        self.charge(output)
        for item in output.scheduled:
            if item.request not in failed:
                item.request.num_computed_tokens = item.stop
                self._save(item.request, self.kv.commit(item.request))

    def charge(self, output: SchedulerOutput) -> None:
        """Charge for the step, also where it failed; a second time adds nothing."""
        for item in output.scheduled:
            work = Work.DECODE if item.is_decode else Work.PREFILL
            self.policy.charge(item.request, item.stop, work)

    def _num_new_tokens(self, request: Request, budget: int) -> int | None:
        """How many of its tokens the step computes: 0 where it lacks blocks, None where a span is
        next that has to wait for a step with more of the budget left.
        """
        start, spans = request.num_computed_tokens, request.spans
        stop = uncut(spans, start + min(request.num_pending_tokens, budget))
        if stop == start:
            return None
        return uncut(spans, min(stop, start + self.kv.max_new_tokens(request))) - start

    def _take(self, request: Request, num_new: int, output: SchedulerOutput) -> int:
        self.kv.allocate(request, num_new)
        item = ScheduledRequest(
            request,
            request.num_computed_tokens,
            num_new,
            samples=num_new == request.num_pending_tokens,
            is_decode=num_new == 1 and request.num_computed_tokens >= len(request.prompt_ids),
        )
        output.scheduled.append(item)
        return num_new

    def _may_start(self, request: Request) -> bool:
        return not self._held_up or self.policy.may_overtake(request, self._held_up)

    def _let_in(self, request: Request, order: list[Request], output: SchedulerOutput) -> bool:
        """Start it, in place of running ones if that makes room for it."""
        if request.asks_store:
            request.asks_store = False
            if self._loader.ask_store(request):
                return False
        giving_way = self._giving_way(request, order)
        if giving_way is None or (giving_way and self._suits_first(giving_way, order)):
            return False
        for other in giving_way:
            output.scheduled[:] = [item for item in output.scheduled if item.request is not other]
            self._preempt(other, output)
        return self._admit(request)

    def _giving_way(self, request: Request, order: list[Request]) -> list[Request] | None:
        """Those without which it has room: who overtook it, the last first, then whom the policy
        names; None where all of them don't suffice.
        """
        running = [other for other in order if other.state is RequestState.RUNNING]
        overtakers = self._overtakers(request, order)
        giving_way: list[Request] = []
        while not self._has_room(request, giving_way):
            if overtakers:
                last: Request | None = overtakers.pop()
            else:
                places = {other: self._places(other) for other in (*running, request)}
                last = self.policy.gives_way(request, running, places, self.max_num_seqs)
            if last is None:
                return None
            running.remove(last)
            giving_way.append(last)
        return giving_way

    def _suits_first(self, giving_way: list[Request], order: list[Request]) -> bool:
        """Whether the first one held up would fit then, and at once take the room from others."""
        if not self._held_up:
            return False
        first = self._held_up[0]
        return self._has_room(first, {*giving_way, *self._overtakers(first, order)})

    def _overtakers(self, request: Request, order: list[Request]) -> list[Request]:
        """Who runs in its stead, as far as the policy still has them behind it."""
        behind = order[order.index(request) :]
        return [other for other in behind if request in self._overtaken.get(other, ())]

    def _places(self, request: Request) -> float:
        """One of `max_num_seqs`, or as many as its part of the KV cache comes to."""
        capacity = self.kv.max_request_tokens
        part = 0.0 if capacity is None else request.num_tokens / capacity
        return max(1.0, part * self.max_num_seqs)

    def _has_room(self, request: Request, without: Collection[Request]) -> bool:
        if len(self.running) - len(without) >= self.max_num_seqs:
            return False
        return self._loader.fits(request, without)

    def _admit(self, request: Request) -> bool:
        """Start it, if it fits."""
        if not self._loader.start(request):
            return False
        self.policy.charge(request, request.num_computed_tokens, Work.CACHED)
        self.waiting.remove(request)
        self.running.append(request)
        request.state = RequestState.RUNNING
        return True

    def _preempt(self, request: Request, output: SchedulerOutput) -> None:
        """Back to the queue; prompt and output are kept. It resumes from what is cached then."""
        self.running.remove(request)
        self._release(request)
        self.waiting.insert(0, request)
        request.state = RequestState.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.asks_store = True
        self.num_preemptions += 1
        output.preempted.append(request)

    def _release(self, request: Request, *, keep: bool = True) -> None:
        if keep:
            self._save(request, self.kv.checkpoint(request))
        self.kv.free(request)
        self._overtaken.pop(request, None)

    def _save(self, request: Request, blocks: Sequence[StoredBlock]) -> None:
        if blocks:
            self.store.save(request, blocks)

    def check_integrity(self) -> None:
        """Assert that states, lists and blocks agree, and that nothing is held when idle."""
        self.kv.check_integrity()
        assert all(r.state is RequestState.RUNNING for r in self.running)
        queued = (RequestState.WAITING, RequestState.WAITING_FOR_BLOCKS)
        assert all(r.state in queued and r.num_computed_tokens == 0 for r in self.waiting)
        assert set(self.running) == self.kv.requests, "rows and running requests differ"
        assert self._overtaken.keys() <= self.kv.requests, "who doesn't run has overtaken nobody"
