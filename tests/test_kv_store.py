"""The KV store against real servers: exact bytes, budgets, and everything that can go wrong."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from prometheus_client import CollectorRegistry

from cluster.breaker import Breaker
from cluster.config import StoreConfig
from cluster.errors import ConfigError
from cluster.kv_keys import OVERHEAD_BYTES, tenant_prefix, value_name
from cluster.kv_queue import Value
from cluster.kv_rates import LIFE_S, NUM_LOOKUPS, RateMeter, Rates, worth_fetching
from cluster.kv_store import KVStore
from cluster.kv_value import HEADER_BYTES
from cluster.metrics import Metrics
from cluster.redis import RedisAddress
from tests.redis_servers import redis_server, wait_until

SIZE = 100_000
FINGERPRINT = b"a model"
KEYS = [b"key-%d" % i for i in range(8)]

Stores = Callable[..., KVStore]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def stores(registry: CollectorRegistry) -> Iterator[Stores]:
    metrics = Metrics(registry)
    with ExitStack() as stack:

        def make(address: RedisAddress, fingerprint: bytes = FINGERPRINT, **config: Any) -> KVStore:
            return stack.enter_context(
                KVStore(address, fingerprint, "m", metrics, StoreConfig(**config))
            )

        yield make


@pytest.fixture
def address(tmp_path: Path) -> Iterator[RedisAddress]:
    with redis_server(tmp_path) as found:
        yield found


def payload(key: bytes, size: int = SIZE) -> bytes:
    return (key * size)[:size]


def put_all(store: KVStore, keys: list[bytes] = KEYS, tenant: str = "t") -> None:
    for key in keys:
        assert store.put(tenant, key, [payload(key)])
    assert store.flush(5)


def read_all(
    store: KVStore, keys: list[bytes] = KEYS, tenant: str = "t", size: int = SIZE
) -> list[bytes | None]:
    memory = [bytearray(size) for _ in keys]
    read = store.read(tenant, [(key, [view]) for key, view in zip(keys, memory, strict=True)])
    came = read.result(10)
    assert read.done()
    return [bytes(view) if ok else None for ok, view in zip(came, memory, strict=True)]


def count(registry: CollectorRegistry, kind: str, outcome: str) -> float:
    name = f"briolette_kv_store_{kind}_total"
    return registry.get_sample_value(name, {"model": "m", "outcome": outcome}) or 0.0


# -- the usual way


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
    """Another tenant puts a value whenever one of its own is written: the queue is never empty."""
    store, numbers = stores(address), itertools.count()

    def put_another(outcome: str, value: Value) -> None:
        if outcome == "written" and value.tenant == "other":
            store.put("other", b"%d" % next(numbers), [b"v"])

    monkeypatch.setattr(store._writer, "_on_outcome", put_another)
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
        wait_until(lambda: not store.look_up("t", KEYS).result(5)[0] and not store.is_up)
        store.remove("t", KEYS[:1])
        with redis_server(tmp_path, "--appendonly", "yes"):
            assert store.flush(5)
            assert store.look_up("t", KEYS[:2]).result(5) == [None, SIZE]


def pause(address: RedisAddress, seconds: float) -> None:
    with address.client() as client:
        client.execute_command("CLIENT", "PAUSE", round(seconds * 500), "ALL")


# -- lifetimes and budgets


def test_unused_values_expire_and_leave_nothing(address: RedisAddress, stores: Stores) -> None:
    store = stores(address, ttl_s=1.0)
    put_all(store)
    client = address.client()
    assert client.dbsize() > 0
    wait_until(lambda: client.dbsize() == 0)


def test_use_prolongs_a_life(address: RedisAddress, stores: Stores) -> None:
    store = stores(address, ttl_s=1.0)
    put_all(store, KEYS[:2])
    end = time.monotonic() + 1.3
    while time.monotonic() < end:
        store.look_up("t", KEYS[:1], is_use=True).result(5)
        store.look_up("t", KEYS[1:2]).result(5)
        time.sleep(0.1)
    assert store.look_up("t", KEYS[:2]).result(5) == [SIZE, None]


def booked(address: RedisAddress, tenant: str = "t") -> int:
    with address.client() as client:
        return int(client.hget(tenant_prefix(tenant) + b"usage", "bytes") or 0)


VALUE_BYTES = SIZE + HEADER_BYTES + OVERHEAD_BYTES


def test_the_budget_takes_the_oldest_used_of_its_tenant(
    address: RedisAddress, stores: Stores
) -> None:
    store = stores(address, tenant_bytes=3 * VALUE_BYTES)
    put_all(store, KEYS[:3])
    put_all(store, KEYS[:3], tenant="other")
    time.sleep(0.005)  # the order of uses is kept by the millisecond
    store.look_up("t", KEYS[:1], is_use=True).result(5)
    time.sleep(0.005)
    store.look_up("t", KEYS[:3]).result(5)
    put_all(store, KEYS[3:4])
    sizes = store.look_up("t", KEYS[:4]).result(5)
    assert sizes[0] == sizes[3] == SIZE and sizes.count(None) == 1
    assert store.look_up("other", KEYS[:3]).result(5) == [SIZE] * 3
    assert booked(address) == 3 * VALUE_BYTES


def test_several_decoders_agree_on_the_budget(address: RedisAddress, stores: Stores) -> None:
    pair = [stores(address, tenant_bytes=4 * VALUE_BYTES) for _ in range(2)]
    keys = [b"k%d" % i for i in range(40)]
    for i, key in enumerate(keys):
        assert pair[i % 2].put("t", key, [payload(key)])
    assert all(store.flush(5) for store in pair)
    sizes = pair[0].look_up("t", keys).result(5)
    assert len(sizes) - sizes.count(None) == 4
    assert booked(address) == 4 * VALUE_BYTES


def test_a_value_above_the_whole_budget_is_not_kept(
    address: RedisAddress, stores: Stores, registry: CollectorRegistry
) -> None:
    store = stores(address, tenant_bytes=SIZE // 2)
    put_all(store, KEYS[:1])
    assert store.look_up("t", KEYS[:1]).result(5) == [None]
    assert count(registry, "writes", "over_budget") == 1 and booked(address) == 0


def test_books_are_right_within_what_redis_uses(address: RedisAddress, stores: Stores) -> None:
    client = address.client()
    before = client.info("memory")["used_memory"]
    store = stores(address)
    keys = [os.urandom(32) for _ in range(200)]
    for key in keys:
        assert store.put("t", key, [os.urandom(SIZE)])
    assert store.flush(5)
    grown = client.info("memory")["used_memory"] - before
    assert booked(address) == pytest.approx(grown, rel=0.1)


@pytest.mark.parametrize(
    "other", ["a:kv", "a}", "{a}", "a:", "", "A", "a/../b", "a%3Akv", "*", "a\n", "ä"]
)
def test_no_call_reaches_another_tenant(address: RedisAddress, stores: Stores, other: str) -> None:
    store = stores(address, connections=1)
    put_all(store, KEYS[:1], tenant="a")
    tricks = [KEYS[0], b"kv:" + KEYS[0], b"}:kv:" + KEYS[0], value_name("a", KEYS[0])]
    assert store.look_up(other, tricks).result(5) == [None] * len(tricks)
    assert read_all(store, tricks, other) == [None] * len(tricks)
    assert not tenant_prefix("a").startswith(tenant_prefix(other))
    assert not tenant_prefix(other).startswith(tenant_prefix("a"))


# -- what is no good is never decoded


def damage(address: RedisAddress, how: str) -> None:
    name, client = value_name("t", KEYS[0]), address.client()
    if how == "a byte of the payload":
        client.setrange(name, HEADER_BYTES + 777, b"\x00")
    elif how == "a byte of the checksum":
        client.setrange(name, HEADER_BYTES - 1, bytes([client.getrange(name, 47, 47)[0] ^ 1]))
    elif how == "no magic":
        client.setrange(name, 0, b"XXXX")
    elif how == "appended":
        client.append(name, b"more")
    elif how == "truncated":
        client.set(name, client.getrange(name, 0, 5000))
    elif how == "shorter than a header":
        client.set(name, b"BRKV")
    elif how == "of another key":
        client.set(name, client.get(value_name("t", KEYS[1])))
    elif how == "of another tenant":
        client.set(name, client.get(value_name("other", KEYS[0])))
    elif how == "another version":
        client.setrange(name, 4, b"\x63\x00")
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "outcome"),
    [
        ("a byte of the payload", "damaged"),
        ("a byte of the checksum", "damaged"),
        ("no magic", "damaged"),
        ("appended", "damaged"),
        ("truncated", "damaged"),
        ("shorter than a header", "damaged"),
        ("of another key", "damaged"),
        ("of another tenant", "damaged"),
        ("another version", "foreign"),
    ],
)
def test_damaged_values_are_refused_and_removed(
    address: RedisAddress, stores: Stores, registry: CollectorRegistry, how: str, outcome: str
) -> None:
    store = stores(address, connections=1)
    put_all(store, KEYS[:1], tenant="other")
    put_all(store)
    damage(address, how)
    assert read_all(store) == [None, *map(payload, KEYS[1:])]
    assert count(registry, "reads", outcome) == 1
    assert read_all(store, KEYS[:2]) == [None, payload(KEYS[1])]
    assert count(registry, "reads", "missing") == 1, "it was removed"
    put_all(store, KEYS[:1])
    assert read_all(store, KEYS[:1]) == [payload(KEYS[0])]


def test_another_models_values_are_refused(
    address: RedisAddress, stores: Stores, registry: CollectorRegistry
) -> None:
    put_all(stores(address))
    assert read_all(stores(address, b"another model")) == [None] * len(KEYS)
    assert count(registry, "reads", "foreign") == len(KEYS)


def test_memory_of_another_size_is_refused(address: RedisAddress, stores: Stores) -> None:
    store = stores(address, connections=1)
    put_all(store, KEYS[:2])
    assert read_all(store, KEYS[:1], size=SIZE - 1) == [None]
    assert read_all(store, KEYS[1:2], size=SIZE + 1) == [None]


# -- a server that is full, away, closed or dying


def test_a_full_server_stops_writing_for_a_while_and_is_still_read(
    tmp_path: Path,
    stores: Stores,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("cluster.kv_writer.RETRY_S", 0.5)
    with redis_server(tmp_path) as address:
        store, client = stores(address), address.client()
        put_all(store, KEYS[:3])
        client.config_set("maxmemory", 1)
        with caplog.at_level(logging.WARNING):
            store.put("poor", KEYS[4], [payload(KEYS[4])])  # has nothing of its own to give up
            assert store.flush(5)
            assert not store.put("poor", KEYS[5], [payload(KEYS[5])]) and not store.takes("poor", 1)
            assert read_all(store, KEYS[:3]) == [payload(key) for key in KEYS[:3]]
            assert gauge(registry, "writable") == 0 and store.is_up
            client.config_set("maxmemory", 0)
            wait_until(lambda: store.put("poor", KEYS[5], [payload(KEYS[5])]))
            assert store.flush(5)
        assert read_all(store, KEYS[5:6], "poor") == [payload(KEYS[5])]
        assert count(registry, "writes", "server_full") >= 2
        assert gauge(registry, "writable") == 1
        lines = [record.message for record in caplog.records]
        assert len(lines) == 2 and "maxmemory" in lines[0] and lines[1].endswith("works again")


def test_a_tenant_without_room_stops_no_others(
    tmp_path: Path, stores: Stores, registry: CollectorRegistry
) -> None:
    with redis_server(tmp_path, "--maxmemory", "8mb") as address:
        store = stores(address)
        put_all(store, [b"k%d" % i for i in range(30)])
        client = address.client()
        client.config_set("maxmemory", client.info("memory")["used_memory"])
        pause(address, 0.4)  # so that both are in one batch
        store.put("t", b"first", [b"v"])
        assert store.put("poor", KEYS[0], [payload(KEYS[0])])  # has nothing to give up
        assert store.put("t", KEYS[0], [payload(KEYS[0])]) and store.flush(5)
        assert store.look_up("t", KEYS[:1]).result(5) == [SIZE]
        assert count(registry, "writes", "server_full") == 1
        assert not store.takes("poor", 1) and store.takes("t", 1)
        assert store.take_lost() == [("poor", KEYS[0])]


def test_a_batch_of_a_stuck_tenant_stops_no_others(
    tmp_path: Path, stores: Stores, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_server(tmp_path, "--maxmemory", "8mb") as address:
        store = stores(address)
        put_all(store, [b"k%d" % i for i in range(30)])
        client = address.client()
        client.config_set("maxmemory", client.info("memory")["used_memory"])
        with caplog.at_level(logging.WARNING):
            put_all(store, KEYS[:1], "poor")  # has nothing to give up
        assert not store.takes("poor", 1) and store.takes("t", 1)
        assert not store.put("poor", KEYS[1], [b"v"])
        assert count(registry, "writes", "server_full") == 2
        assert gauge(registry, "writable") == 0 and not store.status.is_writable
        put_all(store, KEYS[:1])
        assert store.look_up("t", KEYS[:1]).result(5) == [SIZE]
        [line] = [record.message for record in caplog.records]
        assert "'poor'" in line and "maxmemory" in line


def test_a_server_that_refuses_all_is_left_alone_by_all(
    tmp_path: Path, stores: Stores, registry: CollectorRegistry
) -> None:
    with redis_server(tmp_path, "--min-replicas-to-write", "1") as address:
        store = stores(address)
        put_all(store, KEYS[:1], "one")
        assert not store.takes("one", 1) and not store.takes("other", 1)
        assert count(registry, "writes", "server_full") == 1
        assert gauge(registry, "writable") == 0
        assert store.look_up("one", KEYS, is_use=True).result(5) == [None] * len(KEYS)
        assert store.is_up, "it still can be read"


def test_on_a_full_server_the_queue_is_given_up(
    tmp_path: Path, stores: Stores, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.kv_queue.BATCH_VALUES", 1)
    with redis_server(tmp_path, "--maxmemory", "1") as address:
        store = stores(address)
        pause(address, 0.4)
        for key in KEYS:
            assert store.put("t", key, [payload(key)])
        start_s = time.monotonic()
        assert store.flush(4) and time.monotonic() - start_s < 2, "not after the pause"
        assert count(registry, "writes", "server_full") == len(KEYS)
        assert store.status.queue_bytes == 0 and not store.status.is_writable
        assert not store.put("t", b"later", [b"v"])
        assert store.take_lost() == [("t", key) for key in [*KEYS, b"later"]]
        assert store.take_lost() == []


def gauge(registry: CollectorRegistry, name: str) -> float | None:
    return registry.get_sample_value(f"briolette_kv_store_{name}", {"model": "m"})


def test_on_a_full_server_a_tenant_writes_over_its_own(
    tmp_path: Path, stores: Stores, registry: CollectorRegistry
) -> None:
    with redis_server(tmp_path, "--maxmemory", "8mb") as address:
        store = stores(address)
        put_all(store, KEYS[:2], tenant="other")
        keys = [b"k%d" % i for i in range(150)]
        for key in keys:
            assert store.put("t", key, [payload(key)]) and store.flush(5)
        assert count(registry, "writes", "written") == 152
        assert read_all(store, keys[-1:]) == [payload(keys[-1])]
        assert store.look_up("other", KEYS[:2]).result(5) == [SIZE, SIZE]
        info = address.client().info("memory")
        assert info["used_memory"] <= info["maxmemory"] + 2 * SIZE


def test_a_server_that_goes_and_comes_back(
    tmp_path: Path,
    stores: Stores,
    registry: CollectorRegistry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        with redis_server(tmp_path) as address:
            store = stores(address)
            put_all(store)
        assert read_all(store) == [None] * len(KEYS)
        wait_until(lambda: not store.is_up and gauge(registry, "up") == 0)
        start_s = time.perf_counter()
        for _ in range(50):
            assert not store.put("t", b"k", [b"v"])
            assert store.look_up("t", KEYS).done(), "known to be away: no wait"
        assert time.perf_counter() - start_s < 0.2
        with redis_server(tmp_path):
            wait_until(lambda: store.is_up)
            put_all(store)
            assert read_all(store) == [payload(key) for key in KEYS]
            assert gauge(registry, "up") == 1
            lines = [record.message for record in caplog.records]
            assert len(lines) == 2 and lines[1].endswith("works again")
            assert "redis.sock" in lines[0]


def test_a_restart_that_nobody_noticed_costs_no_failure(
    tmp_path: Path, stores: Stores, registry: CollectorRegistry
) -> None:
    with redis_server(tmp_path) as address:
        store = stores(address, connections=1)
        put_all(store)
        assert read_all(store, KEYS[:1]) == [payload(KEYS[0])]
    with redis_server(tmp_path):
        put_all(store)
        assert read_all(store) == [payload(key) for key in KEYS]
        assert count(registry, "reads", "unreachable") == 0


def test_a_server_that_dies_mid_read(tmp_path: Path, stores: Stores) -> None:
    """A proxy passes on a part of a value, then the connection breaks."""
    with redis_server(tmp_path) as address, Cut(tmp_path, after_bytes=250_000) as cut:
        put_all(stores(address))
        store = stores(cut.address, connections=1)
        came = read_all(store)
        assert came[:2] == [payload(KEYS[0]), payload(KEYS[1])] and came[2:] == [None] * 6
        wait_until(lambda: store.is_up)


@pytest.mark.parametrize("where", ["_send", "_look_at_memory", "_on_outcome"])
def test_a_bug_in_the_writer_is_told_once_and_writing_goes_on(
    address: RedisAddress,
    stores: Stores,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    store = stores(address)
    put_all(store, KEYS[:1])
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(store._writer, where, broken)
        assert store.put("t", KEYS[1], [payload(KEYS[1])]) and store.flush(5)
        wait_until(lambda: caplog.records)
        if where == "_send":
            assert store.take_lost() == [("t", KEYS[1])]
            assert count(registry, "writes", "unreachable") == 1
        time.sleep(0.5)  # within which the server is tried again
    wait_until(lambda: store.is_up)
    put_all(store)
    assert read_all(store) == [payload(key) for key in KEYS]
    assert [bool(record.exc_info) for record in caplog.records] == [True, False]
    assert "no such thing" in caplog.text


def test_a_bug_in_a_reader_is_told_once_and_reading_goes_on(
    address: RedisAddress,
    stores: Stores,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = stores(address, connections=1)
    put_all(store)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("cluster.kv_reader.parse_header", broken)
        assert read_all(store) == [None] * len(KEYS)
        wait_until(lambda: len(caplog.records) == 2)  # broken, and works again
        patch.setattr(store._reader, "_look_up", broken)
        assert store.look_up("t", KEYS).result(5) == [None] * len(KEYS)
        wait_until(lambda: len(caplog.records) == 4)
    assert count(registry, "reads", "unreachable") == len(KEYS)
    assert read_all(store) == [payload(key) for key in KEYS]
    assert "no such thing" in caplog.text


def broken(*_: object) -> None:
    raise KeyError("no such thing")


class Cut:
    """Passes bytes between clients and the test's server, slowly where there is a `pause_s` after
    each piece that clients send, and hangs up within an answer.
    """

    def __init__(
        self,
        directory: Path,
        after_bytes: int,
        tls: ssl.SSLContext | None = None,
        pause_s: float = 0.0,
    ) -> None:
        self._server, self._left, self._tls = str(directory / "redis.sock"), after_bytes, tls
        self._pause_s = pause_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        if pause_s:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
        scheme, port = "rediss" if tls else "redis", self._listener.getsockname()[1]
        self.address = RedisAddress(f"{scheme}://localhost:{port}", timeout_s=1.0)
        self._start(self._accept)

    def __enter__(self) -> Cut:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _start(self, run: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=run, args=args, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                if self._tls is not None:
                    client = self._tls.wrap_socket(client, server_side=True)
            except ssl.SSLError:
                continue  # a client that doesn't trust us
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._server)
            self._start(self._pump, client, server, False)
            self._start(self._pump, server, client, True)

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        try:
            while data := source.recv(10_000):
                if is_answer and self._left > 0:
                    self._left -= len(data)
                    if self._left <= 0:
                        break
                if not is_answer:
                    time.sleep(self._pause_s)
                sink.sendall(data)
        except OSError:
            pass  # the other direction has hung up
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_a_hanging_server_is_given_up(tmp_path: Path, stores: Stores) -> None:
    with redis_server(tmp_path) as address:
        store = stores(RedisAddress(address.url, timeout_s=0.2), connections=1)
        put_all(store)
        pause(address, 2)
        start_s = time.perf_counter()
        assert read_all(store) == [None] * len(KEYS)
        assert time.perf_counter() - start_s < 1.0 and not store.is_up


def test_passwords(tmp_path: Path, stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    secret = tmp_path / "password"
    with redis_server(tmp_path, "--requirepass", "right") as address:
        with caplog.at_level(logging.WARNING):
            secret.write_text("wrong\n")
            store = stores(RedisAddress(address.url, password_file=secret))
            wait_until(lambda: not store.is_up)
            assert read_all(store) == [None] * len(KEYS)
            secret.write_text("right\n")
            wait_until(lambda: store.is_up)
        put_all(store)
        put_all(stores(RedisAddress(f"unix://:right@{tmp_path}/redis.sock")))
        assert read_all(store) == [payload(key) for key in KEYS]
    text = caplog.text.lower()
    assert "password" in text and "right" not in text


def test_a_new_password_holds_for_the_next_connection(tmp_path: Path, stores: Stores) -> None:
    """Also for a user's, and in a client's pool."""
    secret = tmp_path / "password"
    secret.write_text("old\nand more\n")
    with redis_server(tmp_path, "--requirepass", "old") as address:
        socket_path = address.url.removeprefix("unix://")
        admin = RedisAddress(f"unix://:old@{socket_path}").client()
        admin.execute_command("ACL", "SETUSER", "me", "on", "allkeys", "+@all", ">old")
        for url in (address.url, f"unix://me@{socket_path}"):
            secret.write_text("old\nand more\n")
            store = stores(RedisAddress(url, secret), connections=1)
            client = RedisAddress(url, secret).client()
            put_all(store, KEYS[:2])
            assert client.ping() and read_all(store, KEYS[:1]) == [payload(KEYS[0])]
            admin.config_set("requirepass", "new")
            admin.execute_command("ACL", "SETUSER", "me", "resetpass", ">new")
            admin.client_kill_filter(_type="normal", skipme=True)
            secret.unlink()
            with pytest.raises(redis.AuthenticationError, match="can't be read"):
                client.ping()
            secret.write_text("new\n")
            assert client.ping() and read_all(store, KEYS[:1]) == [payload(KEYS[0])]
            put_all(store, KEYS[1:2])
            assert store.is_up
            admin.config_set("requirepass", "old")
            admin.execute_command("ACL", "SETUSER", "me", "resetpass", ">old")


def test_logs_show_no_password() -> None:
    assert str(RedisAddress("rediss://me:secret@host:6380/1")) == "rediss://host:6380/1"


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379"])
def test_an_address_that_can_not_be_used(url: str, stores: Stores) -> None:
    with pytest.raises(ConfigError, match=r"store\.url"):
        stores(RedisAddress(url))


def test_over_tcp(tmp_path: Path, stores: Stores) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with redis_server(tmp_path, "--port", str(port), "--bind", "127.0.0.1"):
        store = stores(RedisAddress(f"redis://127.0.0.1:{port}/0"))
        put_all(store)
        assert read_all(store) == [payload(key) for key in KEYS]


@pytest.mark.parametrize("is_tls", [False, True])
def test_a_slow_link_carries_long_values(
    tmp_path: Path, stores: Stores, registry: CollectorRegistry, is_tls: bool
) -> None:
    """For longer than the timeout, which counts silence only."""
    tls = certificate = None
    if is_tls:
        certificate, tls = make_certificate(tmp_path)
    size, timeout_s = 3_000_000, 0.5
    with redis_server(tmp_path), Cut(tmp_path, 1 << 40, tls, pause_s=0.005) as slow:
        store = stores(RedisAddress(slow.address.url, ca_file=certificate, timeout_s=timeout_s))
        start_s = time.perf_counter()
        assert store.put("t", b"k", [payload(b"k", size)]) and store.flush(30)
        assert time.perf_counter() - start_s > 2 * timeout_s, "the link wasn't slow"
        assert count(registry, "writes", "written") == 1 and store.is_up


def make_certificate(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """For localhost, and a server's context with it."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context


def test_over_tls(tmp_path: Path, stores: Stores) -> None:
    """The server that comes with us has no TLS: a proxy that ends it stands before."""
    certificate, context = make_certificate(tmp_path)
    with redis_server(tmp_path), Cut(tmp_path, after_bytes=1 << 40, tls=context) as proxy:
        store = stores(RedisAddress(proxy.address.url, ca_file=certificate))
        put_all(store)
        assert read_all(store) == [payload(key) for key in KEYS]
        distrusting = stores(RedisAddress(proxy.address.url))
        wait_until(lambda: not distrusting.is_up)


# -- decisions


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
    monkeypatch.setattr("cluster.kv_rates.LEAST_BYTES", 1)
    pause(address, 1.0)
    read = store.read("t", [(key, [bytearray(SIZE)]) for key in KEYS])
    wait_until(lambda: read._num_under_way)
    read.cancel()
    came = read.result(5)
    assert 0 < sum(came) < len(KEYS), "what was under way still comes"
    wait_until(lambda: store.rates.read_bytes_per_s)


def test_the_status_says_how_full_the_server_is(tmp_path: Path, stores: Stores) -> None:
    with redis_server(tmp_path, "--maxmemory", "100mb") as address:
        store = stores(address)
        wait_until(lambda: store.status.max_bytes)
        before = store.status
        put_all(store)
        wait_until(lambda: store.status.used_bytes > before.used_bytes + SIZE)
        assert store.status.max_bytes == 100 << 20 and store.status.is_up
    put_all(store)
    wait_until(lambda: not store.status.is_up)


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
    breaker = Breaker("It", changes.append, first_retry_s=1.0, clock=lambda: now[0])
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


def test_a_wrong_type_under_a_key_is_no_crash(address: RedisAddress, stores: Stores) -> None:
    store, client = stores(address, connections=1), address.client()
    client.lpush(value_name("t", KEYS[0]), "what is this")
    assert read_all(store, KEYS[:1]) == [None]
    client.delete(value_name("t", KEYS[0]))
    wait_until(lambda: store.is_up)
    put_all(store, KEYS[:1])
    assert isinstance(client, redis.Redis)
