"""Random requests against a scheduler, with every promise checked at every step."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import Overloaded
from engine.batch import build_batch
from engine.cache.kv_cache_group import cdiv
from engine.request import FinishReason, Owner, Request, RequestState
from engine.scheduling.fair_share import FairShare
from engine.scheduling.policy import FirstComeFirstServed, Policy
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.scheduler_output import SchedulerOutput
from tests.support.engine.fake_kv import FakeKV
from tests.support.engine.memory_store import MemoryStore
from tests.support.engine.schedulers import (
    GLOBAL,
    SLIDING,
    evict_all,
    make_request,
    make_scheduler,
)

TENANTS = ("a", "b", "c", "d")
SESSIONS = (None, "s", "t")
WEIGHTS = dict(zip(TENANTS, (1.0, 1.0, 3.0, 0.5), strict=True))


class NotedOrder(FairShare):
    """Remembers the order of the last step."""

    def order(self, requests: Collection[Request]) -> list[Request]:
        self.last = super().order(requests)
        return list(self.last)


@dataclass
class Simulation:
    """Random requests against a scheduler, with every promise checked at every step."""

    rng: random.Random
    scheduler: Scheduler
    store: MemoryStore | None
    arrivals: list[tuple[int, Request]]
    cancellations: dict[int, list[Request]]
    failure_rate: float
    live: dict[Request, int | None] = field(default_factory=dict)  # computed tokens; None: waits
    num_refused: int = 0
    num_resumed: int = 0  # starts after a preemption that found something
    num_dropped_bytes: int = 0

    @staticmethod
    def draw(seed: int, policy: Policy) -> Simulation:
        rng = random.Random(seed)
        block_size = rng.choice([1, 2, 4, 16])
        window = rng.choice([1, 3, 8, 20])
        max_model_len = rng.randint(2, 100)
        min_global = cdiv(max_model_len, block_size) + 1
        min_sliding = cdiv(window - 1, block_size) + 2
        max_num_seqs = rng.randint(1, 8)
        polls = rng.choice([0, 1, 5, None])
        store = MemoryStore(polls, fails=rng.random() < 0.2) if rng.random() < 0.4 else None
        kinds = rng.choice([(GLOBAL, SLIDING), (GLOBAL, SLIDING), (GLOBAL,), (SLIDING,)])
        scheduler = make_scheduler(
            block_size=block_size,
            num_global=min_global + rng.choice([0, rng.randint(0, 3 * min_global)]),
            num_sliding=min_sliding + rng.choice([0, rng.randint(0, 8 * min_sliding)]),
            window=window,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=rng.choice([1, 3, 16, 64]),
            max_queue=rng.choice([3, 100]),
            checkpoint_blocks=rng.choice([0, 1, 3]),
            kinds=kinds,
            policy=policy,
            store=store,
        )
        texts = [[rng.randrange(100) for _ in range(max_model_len)] for _ in range(3)]
        arrivals, cancellations = [], dict[int, list[Request]]()
        for index in range(rng.randint(1, 20)):
            num_prompt = rng.randint(1, max(1, (max_model_len - 1) // rng.choice([1, 4])))
            max_tokens = rng.randint(1, max_model_len - num_prompt)
            request = make_request(f"r{index}", num_prompt, max_tokens)
            request.tenant, request.session = rng.choice(TENANTS), rng.choice(SESSIONS)
            request.weight, request.priority = WEIGHTS[request.tenant], rng.choice([0, 0, 1, -1])
            num_shared = rng.choice([num_prompt, rng.randint(0, num_prompt)])
            request.prompt_ids[:num_shared] = rng.choice(texts)[:num_shared]
            if rng.random() < 0.2:  # resumed
                request.output_ids = [1] * rng.randint(0, max_tokens - 1)
            step = rng.randint(0, 40)
            arrivals.append((step, request))
            if rng.random() < 0.2 or polls is None:
                cancellations.setdefault(step + rng.randint(1, 40), []).append(request)
        arrivals.sort(key=lambda arrival: arrival[0])
        for order, (_, request) in enumerate(arrivals):
            request.arrived_at = order
        failure_rate = rng.choice([0, 0, 0.01, 0.05])
        return Simulation(rng, scheduler, store, arrivals, cancellations, failure_rate)

    def run(self) -> None:
        self.fake_kv = FakeKV(self.scheduler.kv)
        if self.store is not None:
            self.store.blocks = self.fake_kv
        num_tokens = sum(len(r.prompt_ids) + r.max_tokens for _, r in self.arrivals)
        pending = list(self.arrivals)
        for step in range(num_tokens + 200):
            while pending and pending[0][0] <= step:
                self.add(pending.pop(0)[1])
            for request in self.cancellations.get(step, []):
                if request in self.live:
                    self.finish(request, FinishReason.ABORT)
            if self.store is not None and self.rng.random() < 0.2:
                evict_all(self.scheduler)
            if self.rng.random() < 0.05:
                self.drop((self.rng.choice(TENANTS), "s"))
            self.step()
            if not pending and not self.live:
                break
        assert not self.live, "a request without an end"
        assert all(group.pool.num_used == 0 for group in self.scheduler.kv.groups.values())
        assert self.store is None or not self.store.on_their_way

    def drop(self, owner: Owner) -> None:
        kept = self.scheduler.kv.index.resumable_blocks()
        kept.pop(owner, None)
        self.num_dropped_bytes += self.scheduler.kv.drop(owner)
        self.scheduler.check_integrity()
        assert self.scheduler.kv.index.resumable_blocks() == kept, "others have lost something"

    def add(self, request: Request) -> None:
        try:
            self.scheduler.add(request)
            self.live[request] = None
        except Overloaded:
            self.num_refused += 1

    def finish(self, request: Request, reason: FinishReason, *, is_sound: bool = True) -> None:
        self.scheduler.finish(request, reason, is_sound=is_sound)
        del self.live[request]

    def step(self) -> None:
        output = self.scheduler.schedule()
        for request in output.preempted:
            self.live[request] = None
        self.check(output)
        requests = [item.request for item in output.scheduled]
        whole_step_fails = self.rng.random() < self.failure_rate
        failed = {r for r in output.sampling if self.rng.random() < self.failure_rate}
        if requests:
            batch = build_batch(output, self.scheduler.kv)
            broken = set(requests) if whole_step_fails else failed
            self.fake_kv.write_and_check(batch, requests, broken)
            last_rows = np.cumsum(batch.query_lens)[[s.samples for s in output.scheduled]] - 1
            assert batch.logits_indices.tolist() == last_rows.tolist()
        if whole_step_fails:
            for request in requests:
                self.finish(request, FinishReason.ERROR)
        else:
            self.update(output, failed)
        self.scheduler.check_integrity()

    def update(self, output: SchedulerOutput, failed: set[Request]) -> None:
        self.scheduler.update(output, failed)
        for request in output.sampling:
            if request in failed:
                self.finish(request, FinishReason.ERROR, is_sound=False)
                continue
            request.output_ids.append(self.rng.randrange(100))
            if len(request.output_ids) == request.max_tokens:
                self.finish(request, FinishReason.LENGTH)

    def check(self, output: SchedulerOutput) -> None:
        assert output.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        requests = [item.request for item in output.scheduled]
        assert len(set(requests)) == len(requests)
        if isinstance(self.scheduler.policy, NotedOrder):
            running = [r for r in self.scheduler.policy.last if r.state is RequestState.RUNNING]
            assert not running or running[0] in requests, "the first one makes no progress"
        else:
            self.check_arrivals(output, requests)
        for item in output.scheduled:
            num_computed = self.live[item.request]
            if num_computed is None:
                num_computed = self.check_start(item.request)
            # Each token once per life, in order: a step begins where the last one ended.
            assert item.request.num_computed_tokens == num_computed
            self.live[item.request] = num_computed = num_computed + item.num_new_tokens
            assert item.num_new_tokens >= 1
            assert item.samples == (num_computed == item.request.num_tokens)

    def check_arrivals(self, output: SchedulerOutput, requests: list[Request]) -> None:
        if output.preempted and self.scheduler.running:
            youngest = max(request.arrived_at for request in self.scheduler.running)
            assert all(request.arrived_at > youngest for request in output.preempted)
        # Where requests wait for blocks, those that came later may be running before them.
        candidates = self.live if self.store is None else self.scheduler.running
        if candidates:
            oldest = min(candidates, key=lambda request: request.arrived_at)
            assert oldest in requests, "the oldest request makes no progress"

    def check_start(self, request: Request) -> int:
        num_cached = request.num_computed_tokens
        assert num_cached % self.scheduler.kv.block_size == 0 and num_cached < request.num_tokens
        if request.num_preemptions == 0:
            assert request.num_cached_tokens == num_cached
        else:
            self.num_resumed += num_cached > 0
        return num_cached


POLICIES = pytest.mark.parametrize("policy", [FirstComeFirstServed, NotedOrder])


@POLICIES
@given(seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_no_block_leaked_no_request_without_an_end_no_starvation(
    policy: type[Policy], seed: int
) -> None:
    Simulation.draw(seed, policy()).run()


@POLICIES
def test_the_simulation_reaches_what_it_is_for(policy: type[Policy]) -> None:
    counts: Counter[str] = Counter()
    for seed in range(60):
        simulation = Simulation.draw(seed, policy())
        simulation.run()
        scheduler = simulation.scheduler
        counts["preemptions"] += scheduler.num_preemptions
        counts["refused"] += simulation.num_refused
        counts["resumed after a preemption"] += simulation.num_resumed
        counts["bytes dropped with a session"] += simulation.num_dropped_bytes
        counts["hits"] += sum(use.num_hits for use in scheduler.prefix_stats.values())
        for kind, num_evicted in scheduler.kv.index.num_evicted.items():
            counts[f"evicted {kind.value}"] += num_evicted
        if simulation.store is not None:
            counts["blocks loaded"] += simulation.store.num_loaded
        for _, request in simulation.arrivals:
            counts[str(request.finish_reason)] += 1
    assert len(counts) == 12 and min(counts.values()) >= 3, counts
