"""The scheduler and its block tables, driven without a model."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from cluster.errors import Overloaded
from engine.request import FinishReason, Request, RequestState
from engine.scheduling.policy import FirstComeFirstServed
from tests.support.engine.fake_kv import FakeKV
from tests.support.engine.memory_store import MemoryStore
from tests.support.engine.schedulers import make_request, make_scheduler, run_step, shares


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
    with pytest.raises(Overloaded, match="3 requests are queued"):
        scheduler.add(make_request("d", 3))
    run_step(scheduler)
    with pytest.raises(Overloaded, match="1 requests are queued"):
        scheduler.add(make_request("d", 3))


def test_without_a_queue_idle_places_are_taken() -> None:
    scheduler = make_scheduler(max_queue=0, max_num_seqs=1)
    scheduler.add(make_request("a", 3))
    with pytest.raises(Overloaded):
        scheduler.add(make_request("b", 3))
    run_step(scheduler)
    with pytest.raises(Overloaded, match="0 requests are queued"):
        scheduler.add(make_request("b", 3))


def test_a_policy_chooses_who_goes_first() -> None:
    class ShortestFirst(FirstComeFirstServed):
        def order(self, requests: Collection[Request]) -> list[Request]:
            return sorted(requests, key=lambda request: request.num_tokens)

    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.policy = ShortestFirst()
    scheduler.add(make_request("long", 9, arrival=0))
    scheduler.add(make_request("short", 3, arrival=1))
    assert shares(run_step(scheduler)) == [("short", 3, True)]


def test_a_request_waits_for_its_blocks_without_holding_up_others() -> None:
    store = MemoryStore(polls=1)
    scheduler = make_scheduler(store=store)
    store.blocks = FakeKV(scheduler.kv)
    scheduler.add(make_request("stored", 8))
    while scheduler.running or scheduler.waiting:
        run_step(scheduler)
    stored, other = make_request("stored", 9, arrival=0), make_request("other", 3, arrival=1)
    scheduler.add(stored)
    scheduler.add(other)
    assert stored.state is RequestState.WAITING_FOR_BLOCKS
    assert other.state is RequestState.WAITING
    assert shares(run_step(scheduler)) == [("other", 3, True)]
    assert shares(run_step(scheduler)) == [("other", 1, True), ("stored", 1, True)]
    scheduler.check_integrity()

    store.polls = None
    gone = make_request("stored", 12)
    scheduler.add(gone)
    assert gone in store.on_their_way
    scheduler.finish(gone, FinishReason.ABORT)
    assert gone not in store.on_their_way
