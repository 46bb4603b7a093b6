"""Connections to Redis or Valkey, with replies read straight into the caller's memory."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.errors import ConfigError, Unavailable
from cluster.store.value import Buffer

# Whatever a server can cause that is full, slow, gone or refuses a command.
REDIS_ERRORS: tuple[type[Exception], ...] = (redis.RedisError, OSError)

# What a network must carry within the timeout: so much is sent at once, and the kernel buffers no
# more than that, where it would buffer megabytes.
PIECE_BYTES = 128 << 10
SCRATCH_BYTES = 4096  # holds the longest line of a reply


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """The address of a Redis server and the way to authenticate.

    Attributes:
        url: redis://, rediss:// (TLS) or unix://; may contain a password.
        password_file: A file with the password on its first line, which `ps` doesn't show; read at
            each connect.
        ca_file: The CA of the server's certificate, if the system doesn't know it.
        timeout_s: Seconds without a byte after which a call fails.
    """

    url: str
    password_file: Path | None = None
    ca_file: Path | None = None
    timeout_s: float = 2.0

    def unavailable(self, error: Exception) -> Unavailable:
        """Return the error to raise for one of REDIS_ERRORS."""
        return Unavailable(f"Redis at {self} doesn't answer: {error}")

    def __str__(self) -> str:
        """Return the URL without user name and password, for logs."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def check(self) -> None:
        """Raise ConfigError if the address can't be used, whether or not a server is there."""
        self._pool()
        if self.password_file is not None:
            _first_line(self.password_file)

    def client(self) -> redis.Redis:
        """Return a client for calls that may block; each raises one of REDIS_ERRORS. Raises
        ConfigError if the address can't be used.
        """
        return redis.Redis(connection_pool=self._pool())

    def connect(self) -> BulkConnection:
        """Return an open, authenticated connection. Raises one of REDIS_ERRORS."""
        connection: Any = self._pool().make_connection()
        connection.connect()
        return BulkConnection(connection)

    def _pool(self) -> redis.ConnectionPool:
        options: dict[str, Any] = {
            "protocol": 2,  # in RESP3 a server may speak unasked, between two replies
            "socket_timeout": self.timeout_s,
            "socket_connect_timeout": self.timeout_s,
            "retry": Retry(NoBackoff(), 0),
        }
        if self.ca_file is not None:
            options["ssl_ca_certs"] = str(self.ca_file)
        try:
            pool = redis.ConnectionPool.from_url(self.url, **options)
        except ValueError as error:
            raise ConfigError(f"store.url can't be used: {error}.") from None
        if self.password_file is not None:
            user = pool.connection_kwargs.pop("username", None)
            pool.connection_kwargs.pop("password", None)
            pool.connection_kwargs["credential_provider"] = _Password(self.password_file, user)
        return pool


class BulkConnection:
    """A connection for bulk replies, for one thread. After any of REDIS_ERRORS but ResponseError,
    close it.

    redis-py connects, authenticates and parses small replies; big ones are read here, since its
    parser copies them twice. `command` and `reply` must not be called while a bulk reply is open.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._socket: socket.socket = connection._get_socket()
        if self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, PIECE_BYTES)
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._ahead = self._scratch[:0]  # bytes that came with what was read last

    def command(self, *words: Any) -> Any:
        """Send one command and wait for its reply. Raises redis.ResponseError for an error."""
        self._connection.send_command(*words)
        return self.reply()

    def send(self, chunks: Iterable[Buffer]) -> None:
        """Send packed commands without copying them. In pieces, so that the timeout is for silence:
        a slow network could never carry a long value within it.
        """
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._socket.send(rest[:PIECE_BYTES]) :]

    def reply(self) -> Any:
        """Return the next reply. Raises redis.ResponseError if it is an error."""
        return self._connection.read_response()

    def command_or_error(self, *words: Any) -> Any:
        """Send one command and return its reply, or its ResponseError."""
        self._connection.send_command(*words)
        return self.reply_or_error()

    def reply_or_error(self) -> Any:
        """Return the next reply, or its ResponseError."""
        try:
            return self.reply()
        except redis.ResponseError as error:
            return error

    def is_stale(self) -> bool:
        """Return whether the server closed the connection since the last reply."""
        try:
            return bool(self._connection.can_read())
        except REDIS_ERRORS:
            return True

    def open_bulk(self) -> int | None:
        """Begin reading a bulk reply; return its length in bytes, None if there is no such key."""
        line = self._read_line()
        if line[:1] == b"-":
            raise redis.ResponseError(line[1:].decode(errors="replace"))
        if line == b"$-1":
            return None
        if line[:1] != b"$" or not line[1:].isdigit():
            raise redis.InvalidResponse(f"{line[:20]!r} instead of a bulk reply")
        return int(line[1:])

    def read_into(self, view: memoryview, on_bytes: Callable[[memoryview], None]) -> None:
        """Fill a view with the next bytes; `on_bytes` is called with each piece as it arrives."""
        position = 0
        while position < len(view):
            if self._ahead:
                count = min(len(self._ahead), len(view) - position)
                view[position : position + count] = self._ahead[:count]
                self._ahead = self._ahead[count:]
            else:
                count = self._receive(view[position:])
            on_bytes(view[position : position + count])
            position += count

    def read(self, num_bytes: int) -> bytes:
        """Read the next few bytes."""
        taken = bytearray(num_bytes)
        self.read_into(memoryview(taken), lambda _: None)
        return bytes(taken)

    def skip(self, num_bytes: int) -> None:
        """Discard the next bytes of a bulk reply."""
        waste = memoryview(bytearray(min(num_bytes, 1 << 16)))
        while num_bytes > 0:
            count = min(num_bytes, len(waste))
            self.read_into(waste[:count], lambda _: None)
            num_bytes -= count

    def end_bulk(self) -> None:
        """Read the line end after a bulk reply."""
        if self.read(2) != b"\r\n":
            raise redis.InvalidResponse("a bulk reply doesn't end where it should")

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def _read_line(self) -> bytes:
        line = b""
        while not line.endswith(b"\r\n"):
            if not self._ahead:
                self._ahead = self._scratch[: self._receive(self._scratch)]
            end = bytes(self._ahead).find(b"\n") + 1 or len(self._ahead)
            line += bytes(self._ahead[:end])
            self._ahead = self._ahead[end:]
            if len(line) > SCRATCH_BYTES:
                raise redis.InvalidResponse("a line is too long")
        return line[:-2]

    def _receive(self, view: memoryview) -> int:
        count = self._socket.recv_into(view)
        if count == 0:
            raise redis.ConnectionError("the server closed the connection")
        return count


def reason_of(error: Exception) -> tuple[str, Exception | None]:
    """Return why a call failed and, if Redis wasn't the reason, the bug, for `Breaker.failed`."""
    if isinstance(error, REDIS_ERRORS):
        return str(error), None
    return f"{type(error).__name__}: {error}", error


def packed(words: Sequence[Buffer]) -> bytes:
    """Pack a command of short words."""
    head = b"*%d\r\n" % len(words)
    return head + b"".join(b"$%d\r\n%s\r\n" % (len(word), bytes(word)) for word in words)


@dataclass(frozen=True, slots=True)
class _Password(redis.CredentialProvider):
    """Credentials from a file that is read at each connect: it may change meanwhile."""

    path: Path
    user: str | None

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = _first_line(self.path)
        except ConfigError as error:  # redis-py hangs up after errors of its own only
            raise redis.AuthenticationError(str(error)) from None
        return (password,) if self.user is None else (self.user, password)


def _first_line(path: Path) -> str:
    try:
        return path.read_text().partition("\n")[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"store.password_file {path} can't be read: {reason}.") from None
