"""The scheduler and its block tables, driven without a model."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import Overloaded
from cluster.spec import AttentionKind
from engine.batch import Batch, build_batch
from engine.kv_cache import KVCache, KVCacheConfig
from engine.request import FinishReason, Request, RequestState, SamplingParams
from engine.scheduler import Scheduler, SchedulerOutput

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def make_scheduler(
    *,
    block_size: int = 4,
    num_global: int = 65,
    num_sliding: int = 65,
    window: int = 8,
    max_model_len: int = 128,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    max_queue: int = 100,
) -> Scheduler:
    kv = KVCache(
        KVCacheConfig(block_size, {GLOBAL: num_global, SLIDING: num_sliding}),
        sliding_window=window,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
    )
    return Scheduler(
        kv,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_queue=max_queue,
    )


def make_request(name: str, num_prompt: int, max_tokens: int = 4, arrival: float = 0) -> Request:
    return Request(
        name, [1] * num_prompt, SamplingParams(), 0, max_tokens=max_tokens, arrival_s=arrival
    )


def run_step(scheduler: Scheduler) -> SchedulerOutput:
    """A step whose model says 1 to everything."""
    output = scheduler.schedule()
    scheduler.update(output)
    for request in output.sampling:
        request.output_ids.append(1)
        if len(request.output_ids) == request.max_tokens:
            scheduler.finish(request, FinishReason.LENGTH)
    return output


def shares(output: SchedulerOutput) -> list[tuple[str, int, bool]]:
    return [(s.request.request_id, s.num_new_tokens, s.samples) for s in output.scheduled]


class FakeKV:
    """Remembers who wrote each slot, and checks that every key a query reads is the right one."""

    def __init__(self, kv: KVCache) -> None:
        self.kv = kv
        self.slots = {
            kind: np.full((group.pool.num_blocks * kv.block_size, 2), -1)
            for kind, group in kv.groups.items()
        }

    def write_and_check(self, batch: Batch, tags: list[int]) -> None:
        """`tags` tells the requests of the batch apart, over their whole lives."""
        tag_of_token = np.repeat(tags, batch.query_lens)
        written = np.stack([tag_of_token, batch.positions.numpy()], axis=1)
        for kind, slots in self.slots.items():
            mapping = batch.slot_mapping[kind].numpy()
            assert len(set(mapping.tolist())) == batch.num_tokens, "two tokens share a slot"
            assert mapping.min() >= self.kv.block_size, "the null block is written"
            slots[mapping] = written
        for kind, slots in self.slots.items():
            window = self.kv.groups[kind].window
            lens = zip(tags, batch.query_lens, batch.seq_lens, strict=True)
            for row, (tag, query_len, seq_len) in enumerate(lens):
                first = seq_len - query_len  # the query that reads farthest back
                positions = np.arange(0 if window is None else max(0, first - window + 1), seq_len)
                blocks = batch.block_tables[kind][row].numpy()[positions // self.kv.block_size]
                read = slots[blocks * self.kv.block_size + positions % self.kv.block_size]
                assert (read[:, 0] == tag).all(), "keys of another request are read"
                assert (read[:, 1] == positions).all(), "keys of other positions are read"


@dataclass
class Simulation:
    """Random requests against a scheduler, with every promise checked at every step."""

    rng: random.Random
    scheduler: Scheduler
    arrivals: list[tuple[int, Request]]
    cancellations: dict[int, list[Request]]
    live: dict[Request, int] = field(default_factory=dict)  # to the number of tokens computed
    num_refused: int = 0

    @staticmethod
    def draw(seed: int) -> Simulation:
        rng = random.Random(seed)
        block_size = rng.choice([1, 2, 4, 16])
        window = rng.choice([1, 3, 8, 20])
        max_model_len = rng.randint(2, 80)
        min_global = cdiv(max_model_len, block_size) + 1
        min_sliding = cdiv(window - 1, block_size) + 2
        max_num_seqs = rng.randint(1, 8)
        scheduler = make_scheduler(
            block_size=block_size,
            num_global=min_global + rng.choice([0, rng.randint(0, 3 * min_global)]),
            num_sliding=min_sliding + rng.choice([0, rng.randint(0, 8 * min_sliding)]),
            window=window,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=rng.choice([1, 3, 16, 64]),
            max_queue=rng.choice([3, 100]),
        )
        arrivals, cancellations = [], dict[int, list[Request]]()
        for index in range(rng.randint(1, 20)):
            num_prompt = rng.randint(1, max_model_len - 1)
            max_tokens = rng.randint(1, max_model_len - num_prompt)
            request = make_request(f"r{index}", num_prompt, max_tokens)
            if rng.random() < 0.2:  # resumed
                request.output_ids = [1] * rng.randint(0, max_tokens - 1)
            step = rng.randint(0, 40)
            arrivals.append((step, request))
            if rng.random() < 0.2:
                cancellations.setdefault(step + rng.randint(1, 40), []).append(request)
        arrivals.sort(key=lambda arrival: arrival[0])
        for order, (_, request) in enumerate(arrivals):
            request.arrival_s = order
        return Simulation(rng, scheduler, arrivals, cancellations)

    def run(self) -> None:
        self.fake_kv = FakeKV(self.scheduler.kv)
        self.tags = {request: tag for tag, (_, request) in enumerate(self.arrivals)}
        num_tokens = sum(len(r.prompt_ids) + r.max_tokens for _, r in self.arrivals)
        pending = list(self.arrivals)
        for step in range(num_tokens + 100):
            while pending and pending[0][0] <= step:
                self.add(pending.pop(0)[1])
            for request in self.cancellations.get(step, []):
                if request in self.live:
                    self.finish(request, FinishReason.ABORT)
            self.step()
            if not pending and not self.live:
                break
        assert not self.live, "a request without an end"
        assert all(group.pool.num_used == 0 for group in self.scheduler.kv.groups.values())

    def add(self, request: Request) -> None:
        try:
            self.scheduler.add(request)
            self.live[request] = 0
        except Overloaded:
            self.num_refused += 1

    def finish(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.finish(request, reason)
        del self.live[request]

    def step(self) -> None:
        output = self.scheduler.schedule()
        for request in output.preempted:
            self.live[request] = 0
        self.check(output)
        if output.scheduled:
            batch = build_batch(output, self.scheduler.kv)
            self.fake_kv.write_and_check(batch, [self.tags[s.request] for s in output.scheduled])
            last_rows = np.cumsum(batch.query_lens)[[s.samples for s in output.scheduled]] - 1
            assert batch.logits_indices.tolist() == last_rows.tolist()
        self.scheduler.update(output)
        for request in output.sampling:
            request.output_ids.append(self.rng.randrange(100))
            if len(request.output_ids) == request.max_tokens:
                self.finish(request, FinishReason.LENGTH)
        self.scheduler.check_integrity()

    def check(self, output: SchedulerOutput) -> None:
        assert output.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        requests = [item.request for item in output.scheduled]
        assert len(set(requests)) == len(requests)
        if output.preempted and self.scheduler.running:
            youngest = max(request.arrival_s for request in self.scheduler.running)
            assert all(request.arrival_s > youngest for request in output.preempted)
        if self.live:
            oldest = min(self.live, key=lambda request: request.arrival_s)
            assert oldest in requests, "the oldest request makes no progress"
        for item in output.scheduled:
            # Each token once per life, in order: a step begins where the last one ended.
            assert item.request.num_computed_tokens == self.live[item.request]
            self.live[item.request] += item.num_new_tokens
            assert item.num_new_tokens >= 1
            assert item.samples == (self.live[item.request] == item.request.num_tokens)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_no_block_leaked_no_request_without_an_end_no_starvation(seed: int) -> None:
    Simulation.draw(seed).run()


def test_the_simulation_reaches_what_it_is_for() -> None:
    num_preemptions = num_refused = num_cancelled = 0
    for seed in range(20):
        simulation = Simulation.draw(seed)
        simulation.run()
        num_preemptions += simulation.scheduler.num_preemptions
        num_refused += simulation.num_refused
        ends = [request.finish_reason for _, request in simulation.arrivals]
        num_cancelled += ends.count(FinishReason.ABORT)
    assert min(num_preemptions, num_refused, num_cancelled) > 5


def test_a_long_prompt_is_cut_into_chunks_and_shares_steps_with_decodes() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    scheduler.add(make_request("short", 6, max_tokens=10, arrival=0))
    scheduler.add(make_request("long", 20, max_tokens=2, arrival=1))
    steps = [shares(run_step(scheduler)) for _ in range(4)]
    assert steps == [
        [("short", 6, True), ("long", 4, False)],
        [("short", 1, True), ("long", 9, False)],
        [("short", 1, True), ("long", 7, True)],
        [("short", 1, True), ("long", 1, True)],
    ]


def test_the_youngest_gives_way_when_blocks_run_out_and_keeps_its_tokens() -> None:
    scheduler = make_scheduler(num_global=6, max_model_len=20, max_num_batched_tokens=32)
    old, young = make_request("old", 8, 12, arrival=0), make_request("young", 4, 8, arrival=1)
    scheduler.add(old)
    scheduler.add(young)
    while not (output := run_step(scheduler)).preempted:
        assert {item.request for item in output.scheduled} == {old, young}
    assert output.preempted == [young]
    assert young.state is RequestState.WAITING and young.num_computed_tokens == 0
    kept = list(young.output_ids)
    assert kept
    while not young.is_finished:
        run_step(scheduler)
        scheduler.check_integrity()
    assert old.is_finished and old.num_preemptions == 0
    assert young.output_ids[: len(kept)] == kept and len(young.output_ids) == 8


def test_nobody_overtakes_a_request_that_does_not_fit_yet() -> None:
    scheduler = make_scheduler(num_global=9, max_model_len=32)
    scheduler.add(make_request("first", 16, 8, arrival=0))
    scheduler.add(make_request("big", 24, 4, arrival=1))
    scheduler.add(make_request("small", 2, 4, arrival=2))
    assert [name for name, _, _ in shares(run_step(scheduler))] == ["first"]
    order = []
    while scheduler.running or scheduler.waiting:
        order += [name for name, _, _ in shares(run_step(scheduler)) if name not in order]
    assert order == ["first", "big", "small"]


def test_a_full_queue_refuses() -> None:
    scheduler = make_scheduler(max_queue=1, max_num_seqs=2)
    for name in ("a", "b", "c"):  # two for the idle places, one that queues
        scheduler.add(make_request(name, 3))
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        scheduler.add(make_request("d", 3))
    run_step(scheduler)
    with pytest.raises(Overloaded, match="1 requests are waiting"):
        scheduler.add(make_request("d", 3))


def test_without_a_queue_idle_places_are_taken() -> None:
    scheduler = make_scheduler(max_queue=0, max_num_seqs=1)
    scheduler.add(make_request("a", 3))
    with pytest.raises(Overloaded):
        scheduler.add(make_request("b", 3))
    run_step(scheduler)
    with pytest.raises(Overloaded, match="0 requests are waiting"):
        scheduler.add(make_request("b", 3))


def test_a_policy_chooses_who_goes_first() -> None:
    class ShortestFirst:
        def order(self, requests: Iterable[Request]) -> list[Request]:
            return sorted(requests, key=lambda request: request.num_tokens)

    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.policy = ShortestFirst()
    scheduler.add(make_request("long", 9, arrival=0))
    scheduler.add(make_request("short", 3, arrival=1))
    assert shares(run_step(scheduler)) == [("short", 3, True)]


def test_a_request_waits_for_its_blocks_without_holding_up_others() -> None:
    class SlowStore:
        arrived = False
        num_cancelled = 0

        def fetch(self, request: Request) -> bool:
            return request.request_id == "stored"

        def is_ready(self, request: Request) -> bool:
            return self.arrived

        def cancel(self, request: Request) -> None:
            self.num_cancelled += 1

    store = SlowStore()
    scheduler = make_scheduler()
    scheduler.store = store
    stored, other = make_request("stored", 5, arrival=0), make_request("other", 5, arrival=1)
    scheduler.add(stored)
    scheduler.add(other)
    assert stored.state is RequestState.WAITING_FOR_BLOCKS
    assert shares(run_step(scheduler)) == [("other", 5, True)]
    store.arrived = True
    assert [name for name, _, _ in shares(run_step(scheduler))] == ["other", "stored"]
    scheduler.check_integrity()

    store.arrived = False
    gone = make_request("stored", 5)
    scheduler.add(gone)
    scheduler.finish(gone, FinishReason.ABORT)
    assert store.num_cancelled == 1
