"""The server of our own: private, started again when killed, gone with its owner, data kept."""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.errors import ConfigError, Unavailable
from cluster.store.redis_server import RedisServer
from tests.support.waiting import wait_for

MAX_BYTES = 64 << 20


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_it_is_private_and_bounded(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "deep" / "data", MAX_BYTES) as server:
        assert stat.S_IMODE((tmp_path / "deep" / "data").stat().st_mode) == 0o700
        client, pid = server.address.client(), server.pid
        config = client.config_get("*")
        assert config["maxmemory"] == str(MAX_BYTES) and config["maxmemory-policy"] == "noeviction"
        assert config["save"] == "" and config["appendfsync"] == "everysec"
        assert pid is not None
        kinds = {found.family for found in psutil.Process(pid).net_connections("all")}
        assert kinds <= {socket.AF_UNIX}, "no address of a network"
    assert not is_running(pid)


def test_data_outlive_an_orderly_end(tmp_path: Path) -> None:
    for i in range(3):
        with RedisServer(tmp_path, MAX_BYTES) as server:
            client = server.address.client()
            wait_for(client.ping)
            assert client.dbsize() == i
            client.set(f"key-{i}", "x")


def test_a_killed_server_is_started_again_with_its_data(tmp_path: Path) -> None:
    with RedisServer(tmp_path, MAX_BYTES) as server:
        server.address.client().set("key", "value")
        killed = server.pid
        assert killed is not None
        (tmp_path / "temp-rewriteaof-1.aof").write_text("half")
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: server.pid not in (None, killed) and server.answers())
        assert server.address.client().get("key") == b"value"
        assert not list(tmp_path.glob("temp-*")), "what the killed one left"


def test_where_it_can_not_be_started_again_at_once_that_is_tried_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(tmp_path, MAX_BYTES) as server, caplog.at_level(logging.WARNING):
        start, killed = subprocess.Popen, server.pid
        failures = [OSError("no processes left"), OSError("no files left")]

        def start_later(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
            if failures:
                raise failures.pop()
            return start(*args, **options)

        monkeypatch.setattr("cluster.store.redis_server.subprocess.Popen", start_later)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: server.pid not in (None, killed) and server.answers())
    assert not failures and "couldn't be started (no processes left)" in caplog.text


def test_where_it_can_not_be_started_at_all_the_owner_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.store.redis_server.sys.executable", str(tmp_path / "nothing"))
    with pytest.raises(Unavailable, match=r"couldn't be started .*nothing"):
        RedisServer(tmp_path, MAX_BYTES)


OWNER = """
import sys, time
from pathlib import Path
from cluster.store.redis_server import RedisServer
server = RedisServer(Path(sys.argv[1]), 64 << 20)
server.address.client().set("key", "value")
print(server.pid, flush=True)
time.sleep(60)
"""


def test_kill_of_the_owner_ends_it_and_data_come_back(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    with RedisServer(tmp_path, MAX_BYTES) as server:  # at once: it waits for the old one's lock
        client = server.address.client()
        wait_for(client.ping)
        assert client.get("key") == b"value"
        assert server.pid != pid and not is_running(pid)


def test_it_outlives_the_thread_that_made_it(tmp_path: Path) -> None:
    made: list[RedisServer] = []
    thread = threading.Thread(target=lambda: made.append(RedisServer(tmp_path, MAX_BYTES)))
    thread.start()
    thread.join()
    with made[0] as server:
        pid = server.pid
        time.sleep(0.1)
        assert server.address.client().ping() and server.pid == pid


def test_two_servers_never_share_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.store.redis_server.LOCK_TIMEOUT_S", 0.2)
    with RedisServer(tmp_path, MAX_BYTES) as server:
        with pytest.raises(Unavailable, match="Another Redis server uses this directory"):
            RedisServer(tmp_path, MAX_BYTES)
        assert server.address.client().ping()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "redis.sock"))
    stale.close()
    with RedisServer(tmp_path, MAX_BYTES) as server:
        assert server.address.client().ping()


def test_a_torn_tail_of_the_file_is_dropped(tmp_path: Path) -> None:
    with RedisServer(tmp_path, MAX_BYTES) as server:
        server.address.client().set("key", "value")
    with open(tmp_path / "appendonly.aof", "ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$4\r\nhalf\r\n$100\r\nonly a part")
    with RedisServer(tmp_path, MAX_BYTES) as server:
        client = server.address.client()
        wait_for(client.ping)
        assert client.keys("*") == [b"key"]


def test_a_directory_that_can_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"store\.data_dir .* can't be written to"):
        RedisServer(tmp_path / "file" / "data", MAX_BYTES)
    with pytest.raises(ConfigError, match="shorter"):
        RedisServer(tmp_path / ("x" * 100), MAX_BYTES)


def test_a_server_that_can_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_bytes(b"this is no append-only file, and never was")
    with pytest.raises(Unavailable, match=r"didn't start: .*redis\.log has more"):
        RedisServer(tmp_path, MAX_BYTES)
