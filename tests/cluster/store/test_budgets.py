"""A KV store's lifetimes and budgets; no tenant reaches another's values."""

from __future__ import annotations

import os
import time

import pytest
from prometheus_client import CollectorRegistry

from cluster.store.redis import RedisAddress
from cluster.store.scripts import tenant_prefix, value_name
from tests.support.store.stores import (
    KEYS,
    SIZE,
    VALUE_BYTES,
    Stores,
    booked,
    count,
    payload,
    put_all,
    read_all,
)
from tests.support.waiting import wait_for


def test_unused_values_expire_and_leave_nothing(address: RedisAddress, stores: Stores) -> None:
    store = stores(address, ttl_s=1.0)
    put_all(store)
    client = address.client()
    assert client.dbsize() > 0
    wait_for(lambda: client.dbsize() == 0)


def test_use_prolongs_a_life(address: RedisAddress, stores: Stores) -> None:
    store = stores(address, ttl_s=1.0)
    put_all(store, KEYS[:2])
    end = time.monotonic() + 1.3
    while time.monotonic() < end:
        store.look_up("t", KEYS[:1], touch=True).result(5)
        store.look_up("t", KEYS[1:2]).result(5)
        time.sleep(0.1)
    assert store.look_up("t", KEYS[:2]).result(5) == [SIZE, None]


def test_the_budget_takes_the_oldest_used_of_its_tenant(
    address: RedisAddress, stores: Stores
) -> None:
    store = stores(address, tenant_bytes=3 * VALUE_BYTES)
    put_all(store, KEYS[:3])
    put_all(store, KEYS[:3], tenant="other")
    time.sleep(0.005)  # the order of uses is kept by the millisecond
    store.look_up("t", KEYS[:1], touch=True).result(5)
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
