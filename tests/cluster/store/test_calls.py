"""The KV store against real servers: exact bytes, and no call that makes a step wait."""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from cluster.config import StoreConfig
from cluster.metrics import Metrics
from cluster.store.kv_store import KVStore
from cluster.store.redis import RedisAddress
from tests.support.store.redis_servers import redis_server
from tests.support.store.stores import (
    FINGERPRINT,
    KEYS,
    SIZE,
    VALUE_BYTES,
    Stores,
    booked,
    count,
    pause,
    payload,
    put_all,
    read_all,
)
from tests.support.waiting import wait_for


def test_values_come_back_exactly(address: RedisAddress, stores: Stores) -> None:
    store = stores(address)
    value = os.urandom(3_000_017)
    assert store.put("t", b"big", [value[:5], memoryview(value)[5:70_000], value[70_000:]])
    put_all(store)
    assert store.look_up("t", [b"big", b"nothing", KEYS[0]]).result(5) == [len(value), None, SIZE]
    into = [bytearray(1_000_000), bytearray(17), bytearray(2_000_000)]
    assert store.read("t", [(b"big", into)]).result(5) == [True]
    assert b"".join(into) == value
    assert read_all(store) == [payload(key) for key in KEYS]


def test_results_tell_which_keys_came(
    address: RedisAddress, stores: Stores, registry: CollectorRegistry
) -> None:
    store = stores(address)
    put_all(store, KEYS[:3])
    expected = [payload(key) for key in KEYS[:3]]
    assert read_all(store, [*KEYS[:3], b"no", b"none"]) == [*expected, None, None]
    assert count(registry, "reads", "ok") == 3 and count(registry, "reads", "missing") == 2
    assert store.read("t", []).result(1) == []


def test_a_value_is_written_once(
    address: RedisAddress, stores: Stores, registry: CollectorRegistry
) -> None:
    one, other = stores(address), stores(address)
    put_all(one)
    put_all(other)
    assert count(registry, "writes", "written") == len(KEYS)
    assert count(registry, "writes", "present") == len(KEYS)


def test_a_cancelled_read_ends_and_asks_no_more(address: RedisAddress, stores: Stores) -> None:
    store = stores(address, connections=1)
    keys = [b"k%d" % i for i in range(200)]
    put_all(store, keys)
    memory = [bytearray(SIZE) for _ in keys]
    read = store.read("t", [(key, [view]) for key, view in zip(keys, memory, strict=True)])
    read.cancel()
    came = read.result(5)
    as_it_was = [bytes(view) for view in memory]
    assert read_all(store, KEYS[:1]) == [None]  # the connection goes on working
    assert not all(came) and [bytes(view) for view in memory] == as_it_was


def test_calls_of_the_step_do_not_wait(tmp_path: Path, stores: Stores) -> None:
    """A server that takes connections and never answers; the slowest of many calls counts."""
    silent = socket.socket(socket.AF_UNIX)
    silent.bind(str(tmp_path / "silent"))
    silent.listen()
    with silent:
        store = stores(RedisAddress(f"unix://{tmp_path}/silent", timeout_s=0.2))
        value, memory = bytes(SIZE), bytearray(SIZE)
        slowest_s = 0.0
        for i in range(200):
            start_s = time.perf_counter()
            store.put("t", b"%d" % i, [value])
            lookup = store.look_up("t", KEYS)
            read = store.read("t", [(KEYS[0], [memory])])
            slowest_s = max(slowest_s, time.perf_counter() - start_s)
        assert slowest_s < 0.1  # the timeout is twice that
        assert lookup.result(5) == [None] * len(KEYS) and read.result(5) == [False]


def test_a_full_queue_drops_and_counts(
    tmp_path: Path, stores: Stores, registry: CollectorRegistry
) -> None:
    with redis_server(tmp_path) as address:
        store = stores(address, queue_bytes=2 * SIZE)
        pause(address, 1)
        taken = [store.put("t", key, [payload(key)]) for key in KEYS]
        assert taken[:2] == [True, True] and taken[-1] is False
        assert not store.takes("t", 2 * SIZE) and not store.flush(0.01)
        assert store.flush(5) and store.takes("t", 2 * SIZE)
        assert count(registry, "writes", "queue_full") == taken.count(False)
        assert count(registry, "writes", "written") == taken.count(True)


def test_flush_waits_only_for_what_was_put_before(
    address: RedisAddress, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tenant puts a value whenever one of its own is sent: the queue is never empty."""
    numbers = itertools.count()

    def budget_of(tenant: str) -> int:
        if tenant == "other":
            store.put("other", b"%d" % next(numbers), [b"v"])
        return 1 << 30

    store = stores(address, budget_of=budget_of)
    store.put("other", b"first", [b"v"])
    for key in KEYS:
        assert store.put("t", key, [payload(key)]) and store.flush(2)
        assert store.look_up("t", [key]).result(5) == [SIZE]
    assert store.status.queue_bytes > 0


def test_removals_keep_their_place_among_the_puts(address: RedisAddress, stores: Stores) -> None:
    store = stores(address)
    put_all(store, KEYS[:1])
    pause(address, 0.3)  # so that all of these wait
    store.put("t", KEYS[1], [payload(KEYS[1])])
    store.put("t", KEYS[2], [payload(KEYS[2])])
    store.put("other", KEYS[2], [payload(KEYS[2])])
    store.remove("t", KEYS[:3])
    store.put("t", KEYS[2], [payload(KEYS[2])])
    assert store.flush(5)
    assert store.look_up("t", KEYS[:3]).result(5) == [None, None, SIZE]
    assert store.look_up("other", KEYS[2:3]).result(5) == [SIZE]
    assert booked(address) == VALUE_BYTES


def test_a_removal_waits_for_a_server_that_is_away(tmp_path: Path, stores: Stores) -> None:
    with redis_server(tmp_path, "--appendonly", "yes") as address:
        store = stores(address)
        put_all(store)
        address.client().shutdown()
        wait_for(lambda: not store.look_up("t", KEYS).result(5)[0] and not store.is_up)
        store.remove("t", KEYS[:1])
        with redis_server(tmp_path, "--appendonly", "yes"):
            assert store.flush(5)
            assert store.look_up("t", KEYS[:2]).result(5) == [None, SIZE]


def test_the_status_says_how_full_the_server_is(tmp_path: Path, stores: Stores) -> None:
    with redis_server(tmp_path, "--maxmemory", "100mb") as address:
        store = stores(address)
        wait_for(lambda: store.status.max_bytes)
        before = store.status
        put_all(store)
        wait_for(lambda: store.status.used_bytes > before.used_bytes + SIZE)
        assert store.status.max_bytes == 100 << 20 and store.status.is_up
    put_all(store)
    wait_for(lambda: not store.status.is_up)


def test_nobody_is_left_waiting_at_the_end(tmp_path: Path, registry: CollectorRegistry) -> None:
    with redis_server(tmp_path) as address:
        store = KVStore(address, FINGERPRINT, "m", Metrics(registry), StoreConfig(connections=1))
        pause(address, 1)
        jobs = [store.look_up("t", KEYS) for _ in range(3)]
        store.close()
        assert all(job.done() for job in jobs)


def test_what_alerts_read_is_shown_before_it_happens(
    tmp_path: Path, stores: Stores, registry: CollectorRegistry
) -> None:
    stores(RedisAddress(f"unix://{tmp_path}/nobody"))
    for metric, outcome in (("reads", "damaged"), ("writes", "queue_full")):
        labels = {"model": "m", "outcome": outcome}
        assert registry.get_sample_value(f"briolette_kv_store_{metric}_total", labels) == 0
