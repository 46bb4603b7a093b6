"""What goes wrong with a KV store: damaged values, servers that die or hang, bugs of ours."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import redis
from prometheus_client import CollectorRegistry

from cluster.metrics import Metrics
from cluster.store.redis import RedisAddress
from cluster.store.scripts import value_name
from cluster.store.sender import Sender
from cluster.store.value import HEADER_BYTES
from tests.support.store.redis_proxy import Cut
from tests.support.store.redis_servers import redis_server
from tests.support.store.stores import (
    KEYS,
    SIZE,
    Stores,
    count,
    gauge,
    pause,
    payload,
    put_all,
    read_all,
)
from tests.support.waiting import wait_for


def damage(address: RedisAddress, how: str) -> None:
    name, client = value_name("t", KEYS[0]), address.client()

    def stored(tenant: str, key: bytes) -> bytes:
        value = client.get(value_name(tenant, key))
        assert isinstance(value, bytes)
        return value

    if how == "a byte of the payload":
        client.setrange(name, HEADER_BYTES + 777, b"\x00")
    elif how == "a byte of the checksum":
        client.setrange(name, HEADER_BYTES - 1, bytes([stored("t", KEYS[0])[47] ^ 1]))
    elif how == "no magic":
        client.setrange(name, 0, b"XXXX")
    elif how == "appended":
        client.append(name, b"more")
    elif how == "truncated":
        client.set(name, client.getrange(name, 0, 5000))
    elif how == "shorter than a header":
        client.set(name, b"BRKV")
    elif how == "of another key":
        client.set(name, stored("t", KEYS[1]))
    elif how == "of another tenant":
        client.set(name, stored("other", KEYS[0]))
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
        wait_for(lambda: not store.is_up and gauge(registry, "up") == 0)
        start_s = time.perf_counter()
        for _ in range(50):
            assert not store.put("t", b"k", [b"v"])
            assert store.look_up("t", KEYS).done(), "known to be away: no wait"
        assert time.perf_counter() - start_s < 0.2
        with redis_server(tmp_path):
            wait_for(lambda: store.is_up)
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
        wait_for(lambda: store.is_up)


@pytest.mark.parametrize("where", ["send", "look_at_memory", "outcome"])
def test_a_bug_in_the_writer_is_told_once_and_writing_goes_on(
    address: RedisAddress,
    stores: Stores,
    metrics: Metrics,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    store = stores(address)
    put_all(store, KEYS[:1])
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        if where == "outcome":
            patch.setattr(metrics, "kv_store_writes_total", broken)
        else:
            patch.setattr(Sender, where, broken)
        assert store.put("t", KEYS[1], [payload(KEYS[1])]) and store.flush(5)
        wait_for(lambda: caplog.records)
        if where == "send":
            assert store.take_lost() == [("t", KEYS[1])]
            assert count(registry, "writes", "unreachable") == 1
        time.sleep(0.5)  # within which the server is tried again
    wait_for(lambda: store.is_up)
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
        patch.setattr("cluster.store.reader.parse_header", broken)
        assert read_all(store) == [None] * len(KEYS)
        wait_for(lambda: len(caplog.records) == 2)  # broken, and works again
        patch.setattr("cluster.store.reader.tenant_prefix", broken)
        assert store.look_up("t", KEYS).result(5) == [None] * len(KEYS)
        wait_for(lambda: len(caplog.records) == 4)
    assert count(registry, "reads", "unreachable") == len(KEYS)
    assert read_all(store) == [payload(key) for key in KEYS]
    assert "no such thing" in caplog.text


def broken(*_: object) -> None:
    raise KeyError("no such thing")


def test_a_hanging_server_is_given_up(tmp_path: Path, stores: Stores) -> None:
    with redis_server(tmp_path) as address:
        store = stores(RedisAddress(address.url, timeout_s=0.2), connections=1)
        put_all(store)
        pause(address, 2)
        start_s = time.perf_counter()
        assert read_all(store) == [None] * len(KEYS)
        assert time.perf_counter() - start_s < 1.0 and not store.is_up


def test_a_wrong_type_under_a_key_is_no_crash(address: RedisAddress, stores: Stores) -> None:
    store, client = stores(address, connections=1), address.client()
    client.lpush(value_name("t", KEYS[0]), "what is this")
    assert read_all(store, KEYS[:1]) == [None]
    client.delete(value_name("t", KEYS[0]))
    wait_for(lambda: store.is_up)
    put_all(store, KEYS[:1])
    assert isinstance(client, redis.Redis)
