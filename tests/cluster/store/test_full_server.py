"""A KV store on a server that is full, or that refuses writes."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

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


def test_a_full_server_stops_writing_for_a_while_and_is_still_read(
    tmp_path: Path,
    stores: Stores,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("cluster.store.writer.RETRY_S", 0.5)
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
            wait_for(lambda: store.put("poor", KEYS[5], [payload(KEYS[5])]))
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
        assert store.look_up("one", KEYS, touch=True).result(5) == [None] * len(KEYS)
        assert store.is_up, "it still can be read"


def test_on_a_full_server_the_queue_is_given_up(
    tmp_path: Path, stores: Stores, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.store.writer.BATCH_VALUES", 1)
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
