"""Sessions against a real server: kept, listed, pinned, refused, and really gone once deleted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from cluster.config import StoreConfig
from cluster.errors import InvalidRequest, SessionInUse, StoreFull, Unavailable, UnknownSession
from cluster.metrics import Metrics
from cluster.store.kv_store import KVStore
from cluster.store.redis import RedisAddress
from cluster.tenants.sessions import Sessions
from tests.support.store.redis_servers import redis_server

SIZE = 10_000
BUDGET = 100_000
MESSAGES = [{"role": "user", "content": "Grüße"}]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[RedisAddress]:
    with redis_server(tmp_path) as found:
        yield found


@pytest.fixture
def sessions(address: RedisAddress) -> Iterator[Sessions]:
    made = Sessions(address, ttl_s=0.5, budget_of=lambda tenant: BUDGET)
    yield made
    made.close()


@pytest.fixture
def store(address: RedisAddress) -> Iterator[KVStore]:
    config = StoreConfig.model_construct(ttl_s=0.5, tenant_bytes=BUDGET)
    with KVStore(address, b"f", "m", Metrics(CollectorRegistry()), config) as made:
        yield made


def put(store: KVStore, *keys: bytes, tenant: str = "t") -> None:
    for key in keys:
        assert store.put(tenant, key, [bytes(SIZE)])
    assert store.flush(5)


def save(
    sessions: Sessions,
    name: str,
    *keys: bytes,
    content: object = None,
    tenant: str = "t",
    version: str = "",
    traces: tuple[bytes, ...] = (),
) -> list[bytes]:
    facts = {"fingerprint": "abc", "version": version}
    return sessions.save(tenant, name, content, keys, num_tokens=7, traces=traces, **facts)


def there(store: KVStore, *keys: bytes, tenant: str = "t") -> list[bool]:
    return [size is not None for size in store.look_up(tenant, keys).result(5)]


def test_a_session_comes_back_as_it_was(store: KVStore, sessions: Sessions) -> None:
    put(store, b"a", b"b")
    assert save(sessions, "trip", b"a", b"b", b"a", b"later", content=MESSAGES) == [b"later"]
    session = sessions.load("t", "trip")
    assert session.content == MESSAGES and session.block_keys == (b"a", b"b", b"later")
    assert (session.fingerprint, session.num_tokens) == ("abc", 7)
    assert abs(session.created - time.time()) < 5 and session.last_used == session.created


def test_the_list_has_sizes_and_ages(store: KVStore, sessions: Sessions) -> None:
    put(store, b"a", b"b")
    save(sessions, "one", b"a", b"b")
    time.sleep(0.01)
    save(sessions, "two", b"b", content="x" * 1000)
    one, two = reversed(sessions.list("t"))
    assert (one.name, two.name) == ("one", "two")
    assert 2 * SIZE < one.num_bytes < 2 * SIZE + 2000 and two.num_bytes > SIZE + 1000
    time.sleep(0.01)
    sessions.load("t", "one")
    assert [session.name for session in sessions.list("t")] == ["one", "two"]
    assert sessions.list("t")[0].created == one.created
    assert sessions.list("other") == []


def test_pinned_values_neither_expire_nor_give_way(store: KVStore, sessions: Sessions) -> None:
    put(store, b"a")
    assert save(sessions, "s", b"a", b"late") == [b"late"]
    put(store, b"late")
    put(store, *(b"x%d" % i for i in range(30)))  # three budgets full
    assert there(store, b"a", b"late", b"x0", b"x29") == [True, True, False, True]
    time.sleep(0.6)
    assert there(store, b"a", b"late", b"x29") == [True, True, False]
    assert sessions.load("t", "s").block_keys == (b"a", b"late")


def test_saving_again_lets_go_of_what_is_not_needed(store: KVStore, sessions: Sessions) -> None:
    put(store, b"a", b"b", b"c")
    save(sessions, "s", b"a", b"b")
    first = sessions.load("t", "s")
    time.sleep(0.01)
    save(sessions, "s", b"b", b"c", content="more", version=first.version)
    assert sessions.load("t", "s").created == first.created
    time.sleep(0.6)
    assert there(store, b"a") == [False], "an ordinary value again"
    assert there(store, b"b", b"c") == [True, True]


def test_deleting_leaves_nothing(address: RedisAddress, store: KVStore, sessions: Sessions) -> None:
    client = address.client()
    put(store, b"theirs", tenant="other")
    before = set(client.keys("*"))
    put(store, b"a", b"b", b"c")
    save(sessions, "one", b"a", b"b", b"never put", content=MESSAGES)
    save(sessions, "two", b"b", b"c", content=MESSAGES)
    sessions.delete("t", "one")
    assert there(store, b"a", b"b", b"c") == [False, True, True]
    assert [session.name for session in sessions.list("t")] == ["two"]
    assert not [key for key in client.keys("*") if b"one" in key or b"never" in key]
    sessions.delete("t", "two")
    assert set(client.keys("*")) - before == set()


def test_of_two_who_go_on_from_one_version_the_second_is_refused(sessions: Sessions) -> None:
    save(sessions, "s", b"a", content="one")
    with pytest.raises(SessionInUse, match="'s' was changed"):
        save(sessions, "s", b"b", content="another new one")
    version = sessions.load("t", "s").version
    save(sessions, "s", b"b", content="one, two", version=version)
    with pytest.raises(SessionInUse):
        save(sessions, "s", b"c", content="one, three", version=version)
    kept = sessions.load("t", "s")
    assert kept.content == "one, two" and kept.block_keys == (b"b",) and kept.version != version
    sessions.delete("t", "s")
    with pytest.raises(SessionInUse):
        save(sessions, "s", b"b", content="one, two, four", version=kept.version)
    assert sessions.list("t") == []


def test_what_a_session_left_on_its_way_goes_with_it(
    address: RedisAddress, store: KVStore, sessions: Sessions
) -> None:
    put(store, b"a", b"window 1", b"window 2", b"trace", b"not its own")
    save(sessions, "s", b"a", b"window 1", traces=(b"trace", b"never put"))
    save(sessions, "s", b"a", b"window 2", version=sessions.load("t", "s").version)
    save(sessions, "other", b"window 1")
    removed = sessions.delete("t", "s")
    assert {b"a", b"window 2", b"trace"} <= set(removed) and b"window 1" not in removed
    expected = [False, True, False, False, True]
    assert there(store, b"a", b"window 1", b"window 2", b"trace", b"not its own") == expected
    assert address.client().keys("*:s") == []


def test_one_session_is_shown_with_what_it_lacks(store: KVStore, sessions: Sessions) -> None:
    put(store, b"a")
    save(sessions, "s", b"a", b"gone", content=MESSAGES)
    info = sessions.info("t", "s")
    assert [info] == sessions.list("t")
    assert (info.num_missing, info.num_tokens) == (1, 7) and SIZE < info.num_bytes < 2 * SIZE


def test_an_unknown_name_is_answered_with_a_near_one(sessions: Sessions) -> None:
    save(sessions, "holiday")
    for call in (sessions.load, sessions.info, sessions.delete):
        with pytest.raises(UnknownSession, match="no session 'hollyday'; did you mean 'holiday'"):
            call("t", "hollyday")
    with pytest.raises(UnknownSession, match=r"no session 'xyz'\.$"):
        sessions.load("t", "xyz")


def test_a_session_that_does_not_fit_changes_nothing(
    address: RedisAddress, store: KVStore, sessions: Sessions
) -> None:
    keys = [b"k%d" % i for i in range(8)]
    put(store, *keys)
    save(sessions, "s", *keys[:4])
    with pytest.raises(StoreFull, match="budget is 100,000"):
        save(sessions, "big", *keys, content="x" * 50_000)
    with pytest.raises(StoreFull):
        version = sessions.load("t", "s").version
        save(sessions, "s", *keys, content="x" * 50_000, version=version)
    assert [session.name for session in sessions.list("t")] == ["s"]
    assert sessions.load("t", "s").block_keys == tuple(keys[:4])
    time.sleep(0.6)
    assert there(store, *keys) == [True] * 4 + [False] * 4
    sessions.delete("t", "s")
    assert address.client().keys("*") == []


def test_what_each_tenant_uses_is_known(store: KVStore, sessions: Sessions) -> None:
    put(store, b"a", b"b")
    put(store, b"a", tenant="u")
    used = sessions.used_bytes(["t", "u", "nobody"])
    assert used["t"] == 2 * used["u"] > 0 == used["nobody"]


def test_tenants_do_not_see_each_other(store: KVStore, sessions: Sessions) -> None:
    put(store, b"a")
    put(store, b"a", tenant="u")
    save(sessions, "s", b"a")
    for call in (sessions.load, sessions.delete):
        with pytest.raises(UnknownSession, match="'s'"):
            call("u", "s")
    save(sessions, "s", b"a", tenant="u")
    sessions.delete("u", "s")
    assert sessions.load("t", "s").block_keys == (b"a",) and there(store, b"a") == [True]


@pytest.mark.parametrize("name", ["", "x" * 201, "two\nlines", "\x00"])
def test_impossible_names(sessions: Sessions, name: str) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        save(sessions, name)


def test_a_full_server_refuses_with_a_sentence_and_still_deletes(
    address: RedisAddress, store: KVStore, sessions: Sessions
) -> None:
    put(store, b"a")
    save(sessions, "s", b"a", content=MESSAGES)
    client = address.client()
    client.config_set("maxmemory", 1)
    with pytest.raises(StoreFull, match="Redis is full"):
        save(sessions, "more", b"a")
    assert sessions.load("t", "s").content == MESSAGES
    sessions.delete("t", "s")
    assert client.keys("*") == []


def test_without_redis_there_is_a_sentence(tmp_path: Path) -> None:
    sessions = Sessions(RedisAddress(f"unix://{tmp_path}/none"), 1.0, lambda tenant: BUDGET)
    with pytest.raises(Unavailable, match="doesn't answer"):
        sessions.list("t")
    with pytest.raises(Unavailable, match="doesn't answer"):
        sessions.used_bytes(["t"])
