"""Load shedding: who is refused at arrival."""

from __future__ import annotations

import time

import pytest

from cluster.errors import Overloaded
from engine.request import FinishReason, Request, RequestState
from engine.scheduling.fair_share import FairShare
from engine.scheduling.load_shedding import FORGOTTEN_S, LoadShedding, StartRate
from engine.scheduling.policy import FirstComeFirstServed
from tests.support.engine.schedulers import make_request, make_scheduler, run_step


class Clock:
    """time.monotonic that moves by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)


def a_request(tenant: str, weight: float = 1.0, deadline_at: float | None = None) -> Request:
    request = make_request(tenant, 4)
    request.tenant, request.weight, request.deadline_at = tenant, weight, deadline_at
    return request


def is_refused(shedding: LoadShedding, request: Request, waiting: list[Request]) -> bool:
    try:
        shedding.check(request, waiting, 0, FairShare())
    except Overloaded:
        return True
    return False


def test_a_full_queue_refuses_only_who_has_their_share_of_it() -> None:
    shedding = LoadShedding(max_queue=10)
    waiting = [a_request("heavy") for _ in range(10)]
    assert is_refused(shedding, a_request("heavy"), waiting)
    for _ in range(5):  # half of ten
        assert not is_refused(shedding, a_request("light"), waiting)
        waiting.append(a_request("light"))
    assert is_refused(shedding, a_request("light"), waiting)
    assert not is_refused(shedding, a_request("vip", weight=8.0), waiting)


def test_each_tenant_has_a_bound_of_its_own() -> None:
    shedding = LoadShedding(max_queue=10, max_queue_per_tenant=3)
    waiting = [a_request("a") for _ in range(3)]
    with pytest.raises(Overloaded, match="3 of your requests are queued"):
        shedding.check(a_request("a"), waiting, 0, FairShare())
    shedding.check(a_request("a"), waiting, 1, FairShare())  # the next step takes one on
    shedding.check(a_request("b"), waiting, 0, FairShare())


def test_what_would_wait_too_long_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    shedding = LoadShedding(max_queue_wait_s=10.0)
    waiting = [a_request("a") for _ in range(20)]
    assert not is_refused(shedding, a_request("a"), waiting)  # nothing is known yet
    for _ in range(5):
        shedding.record_step(["a"], {"a"})
        clock.now_s += 1.0
    shedding.record_step(["a"], set())  # five starts in five seconds
    assert shedding.wait_s("a", 20) == 20
    with pytest.raises(Overloaded, match=r"wait about 20 s, and may wait 10 s"):
        shedding.check(a_request("a"), waiting, 0, FairShare())
    assert not is_refused(shedding, a_request("a"), waiting[:8])
    assert not is_refused(shedding, a_request("b"), waiting)  # it goes before them
    shedding.check(a_request("a"), waiting, 15, FairShare())  # the next step takes on fifteen

    clock.now_s += FORGOTTEN_S  # nobody waited: the rate stays for a while
    shedding.record_step(["a"], set())
    assert shedding.wait_s("a", 20) == 20
    clock.now_s += 1.0
    assert shedding.wait_s("a", 20) == LoadShedding().wait_s("a", 20) == 0
    shedding.record_step([], {"a"})
    assert shedding.wait_s("a", 20) == 0


def test_slow_starts_are_measured_as_slow_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rate = StartRate()
    for second in range(601):
        rate.record_step(second % 100 == 0 and second > 0, True)
        clock.now_s += 1.0
    assert rate.wait_s(3) == 300

    for _ in range(100):
        rate.record_step(10, True)
        clock.now_s += 1.0
    assert 0.1 <= rate.wait_s(1) < 0.2  # what was slow is past
    for _ in range(60):
        rate.record_step(0, True)
        clock.now_s += 1.0
    assert rate.wait_s(1) == pytest.approx(60)  # no start for so long
    rate.record_step(0, False)
    assert rate.wait_s(1) < 5  # nobody waits for it


@pytest.mark.parametrize("num_light", [0, 1, 8])
def test_no_wait_looks_shorter_for_what_others_start_meanwhile(
    num_light: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    scheduler = make_scheduler(policy=FairShare(), max_num_batched_tokens=64)
    predicted_s: dict[Request, float] = {}
    waited_s: dict[Request, float] = {}

    def fill_queue(tenant: str, num_waiting: int, num_prompt: int, max_tokens: int) -> None:
        for index in range(num_waiting - sum(r.tenant == tenant for r in scheduler.waiting)):
            arrival = clock.now_s + index / 100
            request = make_request(f"{tenant}{arrival}", num_prompt, max_tokens, arrival)
            request.tenant = tenant
            scheduler.add(request)
            if tenant == "heavy" and clock.now_s > 150:  # the rate is known by now
                predicted_s[request] = scheduler.load_shedding.wait_s(tenant, num_waiting)

    for _ in range(400):
        fill_queue("heavy", 8, num_prompt=60, max_tokens=20)
        fill_queue("light", num_light, num_prompt=4, max_tokens=2)
        run_step(scheduler)
        clock.now_s += 1.0
        for request in predicted_s.keys() - waited_s.keys() - set(scheduler.waiting):
            waited_s[request] = clock.now_s - request.arrived_at
    assert len(waited_s) > 20
    predicted = sum(predicted_s[request] for request in waited_s)
    assert predicted == pytest.approx(sum(waited_s.values()), rel=0.2)


def test_coming_back_after_giving_way_is_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    steps: list[list[str]] = []
    monkeypatch.setattr(scheduler.load_shedding, "record_step", lambda *step: steps.append(step[0]))
    request = make_request("a", 4)
    scheduler.add(request)
    run_step(scheduler)
    scheduler.preempt(request)
    run_step(scheduler)
    assert request.state is RequestState.RUNNING and steps == [["all"], []]


def test_a_deadline_that_would_be_missed_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    scheduler = make_scheduler(policy=FairShare(), max_num_seqs=1)
    for index in range(6):
        scheduler.add(make_request(f"r{index}", 4, max_tokens=2, arrival=index))
    for _ in range(6):
        run_step(scheduler)
        clock.now_s += 1.0
    num_waiting = len(scheduler.waiting)
    assert num_waiting == 3  # two steps each
    late = make_request("late", 4)
    late.deadline_at = clock.now_s + 3.0
    with pytest.raises(Overloaded, match=r"may wait 3 s"):
        scheduler.add(late)
    late.deadline_at = clock.now_s + 20.0
    scheduler.add(late)


def test_places_without_blocks_are_not_idle() -> None:
    scheduler = make_scheduler(num_global=33, max_num_batched_tokens=64, max_queue=3)
    for index in range(5):
        scheduler.add(make_request(f"r{index}", 50, max_tokens=70, arrival=index))
        run_step(scheduler)
    assert (len(scheduler.running), len(scheduler.waiting)) == (2, 3)
    with pytest.raises(Overloaded, match="3 requests are queued"):
        scheduler.add(make_request("refused", 50))
    for request in list(scheduler.waiting):
        scheduler.finish(request, FinishReason.ABORT)
    for index in range(3 + 6):
        scheduler.add(make_request(f"s{index}", 4))  # six places are idle again


def test_who_waits_behind_whom() -> None:
    waiting = [a_request("heavy") for _ in range(10)]
    light = a_request("light", weight=3.0)
    assert FirstComeFirstServed().num_ahead(light, waiting) == 10
    assert FairShare().num_ahead(light, waiting) == 0
    waiting += [a_request("light", weight=3.0) for _ in range(3)]
    assert FairShare().num_ahead(light, waiting) == 3
    light.priority = 1
    assert FairShare().num_ahead(light, waiting) == 0
    assert FairShare().num_ahead(a_request("heavy"), waiting) == 10
