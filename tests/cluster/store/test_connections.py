"""How a KV store reaches its server: passwords, TCP, TLS, a slow link."""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path

import pytest
import redis
from prometheus_client import CollectorRegistry

from cluster.errors import ConfigError
from cluster.store.redis import RedisAddress
from tests.support.store.redis_proxy import Cut, make_certificate
from tests.support.store.redis_servers import redis_server
from tests.support.store.stores import KEYS, Stores, command, count, payload, put_all, read_all
from tests.support.waiting import wait_for


def test_passwords(tmp_path: Path, stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    secret = tmp_path / "password"
    with redis_server(tmp_path, "--requirepass", "right") as address:
        with caplog.at_level(logging.WARNING):
            secret.write_text("wrong\n")
            store = stores(RedisAddress(address.url, password_file=secret))
            wait_for(lambda: not store.is_up)
            assert read_all(store) == [None] * len(KEYS)
            secret.write_text("right\n")
            wait_for(lambda: store.is_up)
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
        admin = RedisAddress(f"unix://:old@{socket_path}")
        command(admin, "ACL", "SETUSER", "me", "on", "allkeys", "+@all", ">old")
        for url in (address.url, f"unix://me@{socket_path}"):
            secret.write_text("old\nand more\n")
            store = stores(RedisAddress(url, secret), connections=1)
            client = RedisAddress(url, secret).client()
            put_all(store, KEYS[:2])
            assert client.ping() and read_all(store, KEYS[:1]) == [payload(KEYS[0])]
            command(admin, "CONFIG", "SET", "requirepass", "new")
            admin = RedisAddress(f"unix://:new@{socket_path}")
            command(admin, "ACL", "SETUSER", "me", "resetpass", ">new")
            command(admin, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            secret.unlink()
            with pytest.raises(redis.AuthenticationError, match="can't be read"):
                client.ping()
            secret.write_text("new\n")
            assert client.ping() and read_all(store, KEYS[:1]) == [payload(KEYS[0])]
            put_all(store, KEYS[1:2])
            assert store.is_up
            command(admin, "CONFIG", "SET", "requirepass", "old")
            admin = RedisAddress(f"unix://:old@{socket_path}")
            command(admin, "ACL", "SETUSER", "me", "resetpass", ">old")


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


def test_over_tls(tmp_path: Path, stores: Stores) -> None:
    """The server that comes with us has no TLS: a proxy that ends it stands before."""
    certificate, context = make_certificate(tmp_path)
    with redis_server(tmp_path), Cut(tmp_path, after_bytes=1 << 40, tls=context) as proxy:
        store = stores(RedisAddress(proxy.address.url, ca_file=certificate))
        put_all(store)
        assert read_all(store) == [payload(key) for key in KEYS]
        distrusting = stores(RedisAddress(proxy.address.url))
        wait_for(lambda: not distrusting.is_up)
