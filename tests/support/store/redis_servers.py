"""Real Redis servers for tests: the binary that the product starts, with any options."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import redis

from cluster.store.redis import REDIS_ERRORS, RedisAddress
from cluster.store.redis_server import server_binary


@contextlib.contextmanager
def redis_server(directory: Path, *options: str) -> Iterator[RedisAddress]:
    """A bare server on a Unix socket, killed at the end; it keeps nothing on disk."""
    path = directory / "redis.sock"
    command = [str(server_binary()), "--port", "0", "--unixsocket", str(path), "--save", ""]
    process = subprocess.Popen([*command, *options], cwd=directory, stdout=subprocess.DEVNULL)
    try:
        address = RedisAddress(f"unix://{path}", timeout_s=1.0)
        wait_for_answer(address)
        yield address
    finally:
        process.kill()
        process.wait()


def wait_for_answer(address: RedisAddress) -> None:
    """Until the server answers, even if only to refuse."""
    end = time.monotonic() + 5
    while True:
        try:
            address.connect().command("PING")
            return
        except redis.AuthenticationError:
            return
        except REDIS_ERRORS:
            assert time.monotonic() < end, "the test's Redis server doesn't start"
            time.sleep(0.01)
