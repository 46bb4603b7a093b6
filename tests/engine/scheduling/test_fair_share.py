"""Fair share, by a scheduler without a model: VTC's bound, weights, newcomers, prices, places."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.lib.by_arrival import ByArrival
from engine.request import FinishReason, Request, RequestState
from engine.scheduling.fair_share import FairShare
from engine.scheduling.policy import Policy, Work
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.scheduler_output import SchedulerOutput
from engine.scheduling.token_costs import CACHED, DECODE, TokenCosts
from tests.support.engine.geometry import spec_of
from tests.support.engine.schedulers import make_request, make_scheduler, run_step, shares

SMALL: dict[str, Any] = {"num_global": 129, "num_sliding": 65, "max_num_batched_tokens": 32}


@dataclass
class Tenant:
    """Sends requests of random lengths, so that `num_waiting` of them always wait."""

    name: str
    weight: float = 1.0
    num_waiting: int = 2
    longest_prompt: int = 40
    longest_answer: int = 20


@dataclass
class Traffic:
    """Tenants at work on a scheduler, and the service that each has had after each step."""

    scheduler: Scheduler
    tenants: list[Tenant]
    rng: random.Random
    served: list[dict[str, float]] = field(default_factory=list)
    backlogged: list[set[str]] = field(default_factory=list)  # whom the step left waiting
    num_starts: int = 0
    _num_sent: int = 0

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for tenant in self.tenants:
                self.fill_queue(tenant)
            num_before = len(self.scheduler.waiting)
            output = run_step(self.scheduler)
            self.num_starts += num_before - len(self.scheduler.waiting)
            assert output.scheduled
            self.scheduler.check_integrity()
            shares = self.scheduler.shares
            self.served.append({t.name: shares[t.name].service for t in self.tenants})
            self.backlogged.append({request.tenant for request in self.scheduler.waiting})

    def fill_queue(self, tenant: Tenant) -> None:
        waiting = Counter(request.tenant for request in self.scheduler.waiting)
        for _ in range(tenant.num_waiting - waiting[tenant.name]):
            self._num_sent += 1
            num_prompt = self.rng.randint(1, tenant.longest_prompt)
            num_answer = self.rng.randint(1, tenant.longest_answer)
            self.scheduler.add(self.request(tenant, num_prompt, num_answer))

    def request(self, tenant: Tenant, num_prompt: int, num_answer: int) -> Request:
        arrival = float(self._num_sent)
        request = make_request(f"{tenant.name}{self._num_sent}", num_prompt, num_answer, arrival)
        request.tenant, request.weight = tenant.name, tenant.weight
        return request

    def gap(self, a: Tenant, b: Tenant) -> float:
        """The largest difference in weighted service over steps that left both waiting."""
        largest = 0.0
        ahead: list[float] = []
        for served, backlogged in zip(self.served, self.backlogged, strict=True):
            if not {a.name, b.name} <= backlogged:
                ahead.clear()
                continue
            ahead.append(served[a.name] / a.weight - served[b.name] / b.weight)
            largest = max(largest, max(ahead) - min(ahead))
        return largest

    def bound(self, *tenants: Tenant) -> float:
        """VTC's, with the prices of this policy."""
        longest = max(tenant.longest_prompt for tenant in tenants)
        capacity = self.scheduler.kv.max_request_tokens
        assert capacity is not None
        return 2 * max(longest, DECODE * capacity) / min(tenant.weight for tenant in tenants)

    def jain(self, start: int, stop: int) -> float:
        """Jain's index of weighted service between two steps."""
        rates = [
            (self.served[stop][t.name] - self.served[start][t.name]) / t.weight
            for t in self.tenants
        ]
        return sum(rates) ** 2 / (len(rates) * sum(rate**2 for rate in rates))


def traffic(
    tenants: list[Tenant], seed: int = 0, policy: Policy | None = None, **sizes: int
) -> Traffic:
    scheduler = make_scheduler(policy=policy or FairShare(), **{**SMALL, **sizes})
    return Traffic(scheduler, tenants, random.Random(seed))


def a_request(tenant: str, num_prompt: int, max_tokens: int = 20, arrival: float = 0) -> Request:
    request = make_request(f"{tenant}-{arrival:g}", num_prompt, max_tokens, arrival)
    request.tenant = tenant
    return request


def has(output: SchedulerOutput, tenant: str) -> int:
    return sum(s.num_new_tokens for s in output.scheduled if s.request.tenant == tenant)


@given(seed=st.integers(0, 2**32), weight=st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=20, deadline=None)
def test_the_difference_in_service_stays_within_the_bound(seed: int, weight: float) -> None:
    rng = random.Random(seed)
    heavy = Tenant("heavy", 1.0, 80, rng.choice([4, 40, 100]), rng.choice([1, 20]))
    light = Tenant("light", weight, 8, rng.choice([4, 40, 100]), rng.choice([1, 20]))
    both = traffic([heavy, light], seed, max_num_seqs=rng.choice([1, 2, 8]))
    both.run(300)
    assert both.gap(heavy, light) <= both.bound(heavy, light)


def test_by_arrival_the_difference_passes_the_bound() -> None:
    heavy, light = Tenant("heavy", 1.0, 40), Tenant("light", 1.0, 4)
    gaps = {}
    for policy in (FairShare(), ByArrival()):
        both = traffic([heavy, light], policy=policy)
        both.run(1000)
        gaps[type(policy)] = both.gap(heavy, light)
        bound = both.bound(heavy, light)
    assert gaps[FairShare] < bound / 4 and gaps[ByArrival] > bound, (gaps, bound)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=5, deadline=None)
def test_eight_unequal_weights_are_served_in_proportion(seed: int) -> None:
    weights = [1, 1, 2, 2, 3, 4, 6, 8]
    tenants = [Tenant(f"t{i}", weight, 3) for i, weight in enumerate(weights)]
    eight = traffic(tenants, seed, max_num_seqs=8)
    eight.run(900)
    assert min(eight.jain(start, start + 300) for start in range(100, 600, 20)) >= 0.95


def test_who_was_idle_has_no_credit() -> None:
    busy, idle = Tenant("busy", num_waiting=8), Tenant("idle", num_waiting=8)
    both = traffic([busy], max_model_len=512)
    both.run(300)
    both.scheduler.add(a_request("idle", 4, max_tokens=200))  # decodes all along, and asks no more
    both.run(150)
    both.tenants.append(idle)
    both.served.clear()
    both.backlogged.clear()
    both.run(300)
    assert both.gap(busy, idle) <= both.bound(busy, idle) / 4


def test_who_comes_when_nobody_waits_starts_level_with_all() -> None:
    scheduler = make_scheduler(policy=FairShare(), **SMALL)
    scheduler.add(a_request("a", 8, max_tokens=50))
    for _ in range(30):
        run_step(scheduler)
    scheduler.add(a_request("b", 8))
    run_step(scheduler)
    counters = {tenant: share.counter for tenant, share in scheduler.shares.items()}
    assert counters["b"] >= counters["a"] - DECODE


def test_a_newcomers_whole_prompt_enters_the_next_step() -> None:
    heavy = traffic([Tenant("heavy", num_waiting=20, longest_prompt=100)], max_num_seqs=8)
    heavy.run(50)
    heavy.scheduler.add(a_request("light", 24, arrival=1e6))
    assert has(run_step(heavy.scheduler), "light") == 24


def test_a_newcomer_gets_a_place_of_who_has_most() -> None:
    scheduler = make_scheduler(policy=FairShare(), max_num_seqs=4, **SMALL)
    for arrival in range(8):
        scheduler.add(a_request("heavy", 4, arrival=arrival))
    for _ in range(3):
        run_step(scheduler)
    assert len(scheduler.running) == 4
    scheduler.add(a_request("light", 4, arrival=9))
    output = run_step(scheduler)
    assert [r.request_id for r in output.preempted] == ["heavy-3"]
    assert has(output, "light") == 4 and has(output, "heavy") == 3


def test_several_of_a_newcomer_get_places_at_once_up_to_half_its_share() -> None:
    scheduler = make_scheduler(policy=FairShare(), max_num_seqs=8, **SMALL)
    for arrival in range(12):
        scheduler.add(a_request("heavy", 4, arrival=arrival))
    for _ in range(3):
        run_step(scheduler)
    assert len(scheduler.running) == 8
    for arrival in range(20, 26):
        scheduler.add(a_request("light", 4, arrival=arrival))
    output = run_step(scheduler)
    assert has(output, "light") == 8 and len(output.preempted) == 2
    assert has(output, "heavy") == 6  # those that stay decode in the same step


def test_a_newcomer_gets_blocks_of_a_request_that_holds_all() -> None:
    scheduler = make_scheduler(policy=FairShare(), num_global=33, max_num_batched_tokens=64)
    giant = a_request("heavy", 120, max_tokens=8)
    scheduler.add(giant)
    while not giant.output_ids:
        run_step(scheduler)
    light = a_request("light", 16, max_tokens=4)
    scheduler.add(light)
    assert has(run_step(scheduler), "light") == 16
    while not light.is_finished:
        run_step(scheduler)
    while not giant.is_finished:
        run_step(scheduler)
        scheduler.check_integrity()
    assert len(giant.output_ids) == 8


def crowded() -> tuple[Scheduler, Request, Request]:
    """A long answer that holds most of the KV cache, and a long prompt that waits for its end."""
    scheduler = make_scheduler(policy=FairShare(), num_global=33, max_num_batched_tokens=64)
    giant, waits = a_request("a", 60, max_tokens=40), a_request("w", 72, max_tokens=4, arrival=1)
    scheduler.add(giant)
    while not giant.output_ids:
        run_step(scheduler)
    scheduler.add(waits)
    run_step(scheduler)
    assert waits in scheduler.waiting
    return scheduler, giant, waits


def test_a_light_tenant_does_not_wait_behind_who_finds_no_room() -> None:
    scheduler, giant, waits = crowded()
    for arrival in range(2, 12):
        light = a_request("light", 8, max_tokens=2, arrival=arrival)
        scheduler.add(light)
        assert has(run_step(scheduler), "light") == 8
        run_step(scheduler)
        assert light.is_finished
    assert waits in scheduler.waiting and giant.num_preemptions == 0


def test_who_overtook_gives_way_as_soon_as_that_makes_room() -> None:
    scheduler, giant, waits = crowded()
    first, last = a_request("light", 30, arrival=2), a_request("light", 26, arrival=3)
    own = a_request("w", 4, arrival=4)
    for request in (first, last, own):
        scheduler.add(request)
    run_step(scheduler)
    assert scheduler.running == [giant, first, last] and scheduler.num_preemptions == 0
    scheduler.finish(giant, FinishReason.ABORT)
    assert run_step(scheduler).preempted == [last]
    assert scheduler.running == [first, waits]
    while not all(request.is_finished for request in (first, last, waits, own)):
        run_step(scheduler)
        scheduler.check_integrity()


def test_nobody_gives_way_to_who_would_lose_the_room_at_once() -> None:
    scheduler, _, waits = crowded()
    light = a_request("light", 68, arrival=2)
    light.weight = 2.0
    scheduler.add(light)
    output = run_step(scheduler)  # without the giant, the one that goes first would fit, too
    assert output.preempted == [] and waits in scheduler.waiting and light in scheduler.waiting


def test_nobody_gives_way_where_that_makes_too_little_room() -> None:
    scheduler = make_scheduler(policy=FairShare(), num_global=33, max_num_batched_tokens=128)
    large = a_request("large", 80, arrival=0)
    small = [a_request("small", 14, arrival=arrival) for arrival in (1, 2)]
    light = a_request("light", 40, arrival=3)
    large.weight, small[0].weight, small[1].weight, light.weight = 8.0, 0.1, 0.1, 4.0
    for request in (large, *small):
        scheduler.add(request)
    run_step(scheduler)
    scheduler.add(light)
    output = run_step(scheduler)  # one of the small ones would be taken, and not be enough
    assert output.preempted == [] and light in scheduler.waiting


def test_equals_hardly_take_each_others_places() -> None:
    tenants = [Tenant("a", longest_prompt=30), Tenant("b", longest_prompt=30), Tenant("c", 2.0)]
    three = traffic(tenants, max_num_seqs=8)
    three.run(600)
    assert three.num_starts > 200
    assert three.scheduler.num_preemptions < three.num_starts / 20


def test_alone_a_tenant_has_the_whole_engine() -> None:
    scheduler = make_scheduler(policy=FairShare(), max_num_seqs=8, **SMALL)
    for arrival in range(10):
        scheduler.add(a_request("only", 16, arrival=arrival))
    assert [run_step(scheduler).num_tokens for _ in range(4)] == [32] * 4
    run_step(scheduler)
    assert len(scheduler.running) == 8


@given(seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_nothing_is_left_unused_while_somebody_waits(seed: int) -> None:
    rng = random.Random(seed)
    tenants = [Tenant(f"t{i}", rng.choice([1, 5]), rng.choice([1, 10])) for i in range(4)]
    four = traffic(tenants, seed, max_num_seqs=8, num_sliding=129)
    scheduler = four.scheduler
    for _ in range(100):
        four.run(1)
        for tenant in tenants:
            four.fill_queue(tenant)
        output = scheduler.schedule()
        is_full = len(scheduler.running) == 8 or output.num_tokens == 32
        assert is_full or not scheduler.waiting
        scheduler.update(output)
        for request in list(scheduler.running):
            scheduler.finish(request, FinishReason.ABORT)


def test_who_gave_way_does_not_go_before_equals_that_run() -> None:
    policy = FairShare()
    runs, gave_way, new = (a_request(tenant, 8) for tenant in ("runs", "gave_way", "new"))
    runs.state = RequestState.RUNNING
    gave_way.num_preemptions = 1
    assert policy.order([runs, gave_way, new]) == [new, runs, gave_way]


def test_higher_priorities_go_first_within_a_tenant_only() -> None:
    scheduler = make_scheduler(policy=FairShare(), max_num_seqs=1)
    other = a_request("other", 4, arrival=0)
    late, urgent = a_request("a", 4, arrival=1), a_request("a", 4, arrival=2)
    urgent.priority = 9
    for request in (other, late, urgent):
        scheduler.add(request)
    order = []
    while scheduler.running or scheduler.waiting:
        order += [name for name, _, _ in shares(run_step(scheduler)) if name not in order]
    assert order == ["other-0", "a-2", "a-1"]


def test_a_higher_priority_takes_the_place_of_its_tenants_lower_one() -> None:
    scheduler = make_scheduler(policy=FairShare(), max_num_seqs=2)
    for arrival in range(2):
        scheduler.add(a_request("a", 4, arrival=arrival))
    run_step(scheduler)
    urgent = a_request("a", 4, arrival=2)
    urgent.priority = 1
    scheduler.add(urgent)
    output = run_step(scheduler)
    assert [r.request_id for r in output.preempted] == ["a-1"]
    assert urgent in [s.request for s in output.scheduled]


def test_cached_tokens_cost_less_and_no_position_is_charged_twice() -> None:
    scheduler = make_scheduler(policy=FairShare(), max_num_batched_tokens=64)
    cold, warm = a_request("cold", 33, max_tokens=1), a_request("cold", 33, max_tokens=1)
    scheduler.add(cold)
    run_step(scheduler)
    assert scheduler.shares["cold"].service == 33
    scheduler.add(warm)
    run_step(scheduler)
    assert scheduler.shares["cold"].service == pytest.approx(33 + 32 * CACHED + 1)

    again = a_request("again", 20, max_tokens=3)
    scheduler.add(again)
    run_step(scheduler)
    scheduler.preempt(again)
    scheduler.kv.drop(None)
    while not again.is_finished:
        run_step(scheduler)
    assert again.num_preemptions == 1
    assert scheduler.shares["again"].service == 20 + 1 + DECODE  # the first again, in a chunk


def test_what_was_computed_is_charged_also_where_it_failed() -> None:
    scheduler = make_scheduler(policy=FairShare())
    request = a_request("a", 12)
    scheduler.add(request)
    output = scheduler.schedule()
    scheduler.update(output, [request])
    scheduler.finish(request, FinishReason.ERROR, is_sound=False)
    assert scheduler.shares["a"].service == 12


def test_decodes_that_give_way_leave_their_tokens_to_chunks() -> None:
    scheduler = make_scheduler(policy=FairShare(), max_num_seqs=4, **SMALL)
    for arrival in range(4):
        scheduler.add(a_request("heavy", 4, arrival=arrival))
    for _ in range(2):
        run_step(scheduler)
    scheduler.add(a_request("light", 60, arrival=9))
    output = run_step(scheduler)
    assert len(output.preempted) == 1
    assert (has(output, "heavy"), has(output, "light")) == (3, SMALL["max_num_batched_tokens"] - 3)


def test_weights_divide_what_is_counted() -> None:
    policy = FairShare()
    request = a_request("a", 10)
    request.weight = 4.0
    policy.charge(request, 8, Work.PREFILL)
    share = policy.shares()["a"]
    assert (share.service, share.counter) == (8, 2)


def test_prices_follow_the_models_work() -> None:
    costs = TokenCosts.from_spec(spec_of("26B-A4B"))
    assert costs.cost(Work.PREFILL, 0, 1) == 1
    assert costs.cost(Work.DECODE, 0, 1) == DECODE
    assert costs.cost(Work.CACHED, 0, 1000) == pytest.approx(1000 * CACHED)
    parts = [costs.cost(Work.PREFILL, start, start + 100) for start in range(0, 3000, 100)]
    assert sum(parts) == pytest.approx(costs.cost(Work.PREFILL, 0, 3000))
    assert parts == sorted(parts)
    far = [costs.cost(Work.DECODE, p, p + 1) - DECODE for p in (0, 1024, 2048, 131_072)]
    sliding = 1024 * costs.per_near_position
    assert far[3] == pytest.approx(131_072 * costs.per_position + sliding)


def test_experts_count_by_those_that_a_token_uses() -> None:
    moe = replace(spec_of("26B-A4B"), num_experts=128, top_k_experts=8, moe_intermediate_size=64)
    costs = [
        TokenCosts.from_spec(replace(moe, top_k_experts=top_k)).per_position for top_k in (8, 16)
    ]
    # Beside more work for its experts, what a token looks back at weighs less.
    assert 0 < costs[1] < costs[0]
