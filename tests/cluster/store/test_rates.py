"""Fetch or recompute, by measured rates; and how long a server is left alone."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from cluster.store.breaker import Breaker
from cluster.store.rates import LIFE_S, NUM_LOOKUPS, RateMeter, Rates, worth_fetching
from cluster.store.redis import RedisAddress
from tests.support.store.stores import KEYS, SIZE, Stores, pause, put_all, read_all
from tests.support.waiting import wait_for


def test_fetch_where_that_is_sooner() -> None:
    assert worth_fetching(1_000_000, 0.1, 1e9, 0.001)
    assert not worth_fetching(1_000_000_000, 0.1, 1e9, 0.001)
    assert not worth_fetching(1_000, 0.001, 1e9, latency_s=0.002)
    assert worth_fetching(1_000_000_000, 1e-4, None, 0.0), "unknown rates are to be measured"
    assert worth_fetching(1_000_000_000, None, 1e9, 0.0)


def test_a_slow_read_weighs_as_long_as_it_takes() -> None:
    meter = RateMeter()
    meter.saw_read(100, 1.0)
    assert meter.rates.read_bytes_per_s is None, "too short to tell"
    meter.saw_read(1 << 30, 1.0)
    meter.saw_read(1 << 30, 6.0)
    assert meter.rates.read_bytes_per_s == pytest.approx((1 << 30) / 2.0)


def test_the_latency_follows_the_last_look_ups() -> None:
    meter = RateMeter()
    meter.saw_lookup(1.0)  # a slow start
    assert meter.rates.latency_s == 1.0
    meter.saw_lookup(0.01)
    assert meter.rates.latency_s == 0.01
    for _ in range(NUM_LOOKUPS):
        meter.saw_lookup(0.02)
    meter.saw_lookup(5.0)
    assert meter.rates.latency_s == 0.02
    for _ in range(NUM_LOOKUPS):
        meter.saw_lookup(0.5)
    assert meter.rates.latency_s == 0.5


def test_an_old_rate_is_measured_anew() -> None:
    now_s = 0.0
    meter = RateMeter(clock=lambda: now_s)
    meter.saw_read(1 << 30, 1.0)
    meter.saw_lookup(0.01)
    now_s = LIFE_S
    assert meter.rates == Rates(1 << 30, 0.01)
    now_s += 1
    assert meter.rates == Rates(None, 0.0)


def test_a_cancelled_read_tells_the_rate_too(
    address: RedisAddress, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores(address, connections=1)
    put_all(store)
    read_all(store, KEYS[:1])  # so that it is connected before the server pauses
    monkeypatch.setattr("cluster.store.rates.MIN_READ_BYTES", 1)
    pause(address, 1.0)
    read = store.read("t", [(key, [bytearray(SIZE)]) for key in KEYS])
    wait_for(lambda: read.num_in_flight)
    read.cancel()
    came = read.result(5)
    assert 0 < sum(came) < len(KEYS), "what was in flight still comes"
    wait_for(lambda: store.rates.read_bytes_per_s)


def test_decisions_rest_on_what_reads_reached(
    address: RedisAddress, stores: Stores, registry: CollectorRegistry
) -> None:
    store = stores(address)
    put_all(store)
    store.look_up("t", KEYS).result(5)
    read_all(store)
    assert store.rates.read_bytes_per_s and store.rates.latency_s > 0
    assert store.worth_fetching(SIZE, 100_000.0)
    assert not store.worth_fetching(10**15, 1e-6)
    for choice in ("fetch", "recompute"):
        labels = {"model": "m", "choice": choice}
        name = "briolette_kv_store_decisions_total"
        assert registry.get_sample_value(name, labels) == 1


def test_a_breaker_backs_off_and_tries_again() -> None:
    now, changes = [0.0], list[bool]()
    breaker = Breaker("It", first_retry_s=1.0, on_change=changes.append, clock=lambda: now[0])
    breaker.failed("broken")
    breaker.failed("broken")  # one that began before
    assert not breaker.is_closed and breaker.retry_in_s == 1.0
    now[0] = 1.0
    breaker.failed("still broken")
    assert breaker.retry_in_s == 2.0
    for _ in range(20):
        now[0] += breaker.retry_in_s
        breaker.failed("still broken")
    assert breaker.retry_in_s == 30.0
    breaker.succeeded()
    assert breaker.is_closed and breaker.retry_in_s == 0.0 and changes == [False, True]
