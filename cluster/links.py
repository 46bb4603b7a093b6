"""Blocking links between processes: whole messages over shared memory, a Unix socket or TCP."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from cluster import handshake
from cluster.errors import ConfigError, LinkError, PortTaken
from cluster.handshake import LinkRefused
from cluster.pipes import (
    HAS_SHARED_MEMORY,
    NUM_SHARED_FDS,
    Pipe,
    SharedMemoryPipe,
    SocketPipe,
    create_shared_fds,
)

__all__ = ["Endpoint", "Link", "LinkRefused", "LinkTimeout", "Listener", "connect"]

Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_MESSAGE_BYTES = 256 << 20
AUTO = handshake.TRANSPORTS  # in order of preference
HANDSHAKE_S = 5.0
SCRATCH_BYTES = 128 * 1024
NO_FILES_S = 0.05  # until the next try when this process may open no more files
MAX_INBOX = 64  # messages taken in while a send waits for room

_HEADER = struct.Struct("<II")  # a mark, then the length in bytes
_MARK = 0x4B4E4C42


class LinkTimeout(LinkError):
    """Nothing came within the deadline; the link itself is still good."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a listener can be reached; whether `unix_name` can is found out by trying."""

    host: str
    port: int
    unix_name: str | None = None  # in Linux's abstract namespace: it ends with its process

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the control plane."""
        return asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Endpoint:
        """The inverse of `to_dict`."""
        unix_name = fields.get("unix_name")
        return Endpoint(str(fields["host"]), int(fields["port"]), unix_name)


class Link:
    """Whole messages both ways. One thread may send while another receives.

    `kind` is "shm", "unix" or "tcp"; `hello` is what the other side said in the handshake.
    Deadlines are seconds from now, None waits for ever. After any LinkError but LinkTimeout the
    link is of no more use: close it.
    """

    def __init__(self, pipe: Pipe, hello: bytes, max_message_bytes: int = MAX_MESSAGE_BYTES):
        self.kind = pipe.kind
        self.hello = hello
        self._pipe = pipe
        self._max_message_bytes = max_message_bytes
        self._send_lock, self._recv_lock = threading.Lock(), threading.Lock()
        self._is_closed = False
        self._inbox: deque[memoryview] = deque()
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._num_scratch = 0  # bytes in scratch: less than a header between two reads
        self._body: memoryview | None = None  # of a message that is still coming
        self._num_body = 0

    def send(self, parts: Sequence[Buffer], deadline_s: float | None = None) -> None:
        """Send one message, the parts one after the other, without joining them first.

        A send that waits for room keeps receiving, so two peers that both send never wait for each
        other. Raises LinkError when the other side is gone or too slow, or the message too long.
        """
        views = [memoryview(part).cast("B") for part in parts]
        size = sum(map(len, views))
        if size > self._max_message_bytes:
            raise LinkError(f"A message of {size} bytes; {self._max_message_bytes} is most.")
        views.insert(0, memoryview(_HEADER.pack(_MARK, size)))
        end = _end_of(deadline_s)
        with self._send_lock:
            self._check_open()
            try:
                num_left = _HEADER.size + size
                while True:
                    count = self._pipe.write(views)
                    num_left -= count
                    if num_left == 0:
                        break
                    views = _advance(views, count)
                    self._wait_for_room(_left(end))
            except LinkTimeout as error:  # half a message is out
                self._break()
                raise LinkError("The other side took no message within the deadline.") from error

    def recv(self, deadline_s: float | None = None) -> memoryview:
        """The next message, in memory of its own. `deadline_s` is for silence: bytes of a message
        that is still coming push it out. Raises LinkTimeout when nothing came for so long,
        LinkError when the other side is gone or sends something else.
        """
        end = _end_of(deadline_s)
        if not self._recv_lock.acquire(timeout=-1 if end is None else max(0.0, _left(end) or 0)):
            raise LinkTimeout("No message within the deadline.")
        try:
            self._check_open()
            may_wait = not self._pipe.prefers_wait
            while not self._inbox:
                if may_wait and self._pump():
                    end = _end_of(deadline_s)
                    continue
                left_s = _left(end)
                self._pipe.wait(left_s, read=True, write=False)
                may_wait = True
                if left_s == 0:
                    if not self._pump():
                        raise LinkTimeout("No message within the deadline.")
                    end = _end_of(deadline_s)
            return self._inbox.popleft()
        finally:
            self._recv_lock.release()

    def close(self) -> None:
        """Close for both sides and free everything. Threads inside send or recv get LinkError."""
        self._break()  # wakes them, so that the locks come free
        with self._send_lock, self._recv_lock:
            self._pipe.close()
            self._pipe = _CLOSED

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _break(self) -> None:
        self._is_closed = True
        self._pipe.shutdown()

    def _check_open(self) -> None:
        if self._is_closed:
            raise LinkError("The link is closed.")

    def _wait_for_room(self, left_s: float | None) -> None:
        if left_s == 0:
            raise LinkTimeout("No room within the deadline.")
        if len(self._inbox) < MAX_INBOX and self._recv_lock.acquire(blocking=False):
            try:
                if not self._pump():
                    self._pipe.wait(left_s, read=True, write=True)
            finally:
                self._recv_lock.release()
        else:  # another thread receives, or nobody does
            self._pipe.wait(left_s, read=False, write=True)
        self._check_open()

    def _pump(self) -> int:
        """Take in what has come, once; returns the number of bytes. Holds the receive lock."""
        if self._body is None:
            count = self._pipe.read_into(self._scratch[self._num_scratch :])
            self._num_scratch += count
            self._split_scratch()
        else:  # the rest of a long message goes straight where it belongs
            count = self._pipe.read_into(self._body[self._num_body :])
            self._num_body += count
            self._finish_body()
        return count

    def _split_scratch(self) -> None:
        start, stop = 0, self._num_scratch
        while self._body is None and stop - start >= _HEADER.size:
            mark, size = _HEADER.unpack_from(self._scratch, start)
            if mark != _MARK or size > self._max_message_bytes:
                self._break()
                raise LinkError("The other side sent something that is no message.")
            start += _HEADER.size
            self._body = np.empty(size, dtype=np.uint8).data  # not zeroed
            self._num_body = min(size, stop - start)
            self._body[: self._num_body] = self._scratch[start : start + self._num_body]
            start += self._num_body
            self._finish_body()
        self._num_scratch = stop - start
        if self._num_scratch:  # the beginning of a header
            self._scratch[: self._num_scratch] = self._scratch[start:stop]

    def _finish_body(self) -> None:
        if self._body is not None and self._num_body == len(self._body):
            self._inbox.append(self._body)
            self._body = None


class Listener:
    """Accepts links on a TCP port and, for this machine, on a Unix socket.

    `verify(hello)` returns the welcome for a peer, or raises LinkError with the reason to refuse
    it. Raises PortTaken when another process listens on the port, ConfigError for an address that
    this machine doesn't have.
    """

    def __init__(
        self,
        secret: bytes,
        verify: Callable[[bytes], bytes],
        host: str = "127.0.0.1",
        port: int = 0,
        transports: Sequence[str] = AUTO,
    ) -> None:
        self._secret, self._verify = secret, verify
        self._transports = transports
        self._sockets = [_listen_tcp(host, port)]
        unix_name = None
        if "shm" in transports or "unix" in transports:
            unix_name = f"briolette-{os.urandom(16).hex()}"
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.bind("\0" + unix_name)
            self._sockets.append(sock)
        for sock in self._sockets:
            sock.listen(64)
            sock.setblocking(False)
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        for fd in (self._bell, *(sock.fileno() for sock in self._sockets)):
            self._poll.register(fd, select.POLLIN)
        self._is_closed = False
        self._lock = threading.Lock()
        self.endpoint = Endpoint(host, self._sockets[0].getsockname()[1], unix_name)

    def accept(self, deadline_s: float | None = None) -> Link:
        """The next link whose handshake succeeds. A server that must not wait for a slow stranger
        calls `accept_socket`, and `welcome` in a thread. Raises LinkTimeout, or LinkError once the
        listener is closed.
        """
        end = _end_of(deadline_s)
        while True:
            sock = self.accept_socket(_left(end))
            with contextlib.suppress(LinkError):
                return self.welcome(sock)

    def accept_socket(self, deadline_s: float | None = None) -> socket.socket:
        """The next connection, before any handshake; errors as in `accept`."""
        end = _end_of(deadline_s)
        with self._lock:
            while not self._is_closed:
                left_s = _left(end)
                self._poll.poll(None if left_s is None else left_s * 1000)
                for sock in self._sockets:
                    try:
                        return sock.accept()[0]
                    except OSError as error:  # nobody there, or gone again
                        if error.errno in (errno.EMFILE, errno.ENFILE):
                            time.sleep(NO_FILES_S)  # who waits stays readable: don't spin
                if left_s == 0:
                    raise LinkTimeout("No link within the deadline.")
        raise LinkError("The listener is closed.")

    def welcome(self, sock: socket.socket, deadline_s: float = HANDSHAKE_S) -> Link:
        """Shake hands on a connection; takes the socket over. Raises LinkError when refused."""
        is_unix = sock.family == socket.AF_UNIX
        try:
            transport, hello = handshake.answer(sock, self._secret, self._verify, deadline_s)
            if (transport == "tcp") == is_unix or transport not in self._transports:
                raise LinkError(f"The peer asked for {transport} in the wrong place.")
            if transport == "shm":
                return Link(self._share_memory(sock), hello)
            _set_options(sock)
            return Link(SocketPipe(sock), hello)
        except (LinkError, OSError) as error:
            sock.close()
            raise error if isinstance(error, LinkError) else LinkError(str(error)) from None

    def close(self) -> None:
        """Stop listening; a thread in `accept` gets LinkError. Links live on."""
        if self._is_closed:
            return
        self._is_closed = True
        os.eventfd_write(self._bell, 1)
        with self._lock:
            for sock in self._sockets:
                sock.close()
            os.close(self._bell)
            self._sockets.clear()

    def _share_memory(self, sock: socket.socket) -> SharedMemoryPipe:
        """Only now, for a peer that has proved itself: memory is made for nobody else."""
        fds = create_shared_fds() if HAS_SHARED_MEMORY else []
        try:
            socket.send_fds(sock, [b"S" if fds else b"N"], fds)
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        if not fds:
            raise LinkError("This machine has no shared memory for links.")
        return SharedMemoryPipe(sock, fds, is_acceptor=True)


def connect(
    endpoint: Endpoint,
    secret: bytes,
    hello: bytes,
    deadline_s: float = HANDSHAKE_S,
    transports: Sequence[str] = AUTO,
) -> Link:
    """Link to a listener by the first transport whose handshake succeeds; `link.hello` is the
    listener's welcome.

    `deadline_s` is for all attempts together. Raises LinkRefused with the other side's reason, or
    LinkError with what went wrong on each transport.
    """
    end = time.monotonic() + deadline_s
    problems: list[str] = []
    for transport in transports:
        if transport != "tcp" and endpoint.unix_name is None:
            continue
        if transport == "shm" and not HAS_SHARED_MEMORY:
            continue
        try:
            return _connect_by(transport, endpoint, secret, hello, end)
        except LinkRefused:
            raise
        except (LinkError, OSError) as error:
            problems.append(f"{transport}: {error}")
    raise LinkError(f"No link to {endpoint.host}:{endpoint.port} ({'; '.join(problems)}).")


def _connect_by(
    transport: str, endpoint: Endpoint, secret: bytes, hello: bytes, end: float
) -> Link:
    left_s = max(0.001, end - time.monotonic())
    if transport == "tcp":
        sock = socket.create_connection((endpoint.host, endpoint.port), timeout=left_s)
    else:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if transport != "tcp":
            sock.settimeout(left_s)
            sock.connect(f"\0{endpoint.unix_name}")
        left_s = max(0.001, end - time.monotonic())
        welcome = handshake.offer(sock, transport, secret, hello, left_s)
        if transport == "shm":
            fds = _receive_fds(sock)
            return Link(SharedMemoryPipe(sock, fds, is_acceptor=False), welcome)
        _set_options(sock)
        return Link(SocketPipe(sock), welcome)
    except BaseException:
        sock.close()
        raise


def _receive_fds(sock: socket.socket) -> list[int]:
    flags = socket.MSG_CMSG_CLOEXEC
    _, fds, _, _ = socket.recv_fds(sock, 1, NUM_SHARED_FDS, flags)
    if len(fds) != NUM_SHARED_FDS:
        for fd in fds:
            os.close(fd)
        raise LinkError("the other side shares no memory")
    return list(fds)


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"Can't listen on {host!r}: {error}.") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(64)
    except OSError as error:
        sock.close()
        raise PortTaken(f"Can't listen on {host}:{port}: {error.strerror}.") from None
    return sock


def _set_options(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that lost its power
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _advance(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of `views` after their first `count` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


def _end_of(deadline_s: float | None) -> float | None:
    return None if deadline_s is None else time.monotonic() + deadline_s


def _left(end: float | None) -> float | None:
    return None if end is None else max(0.0, end - time.monotonic())


class _ClosedPipe:
    """Stands in for the pipe of a closed link, so that a second close does nothing."""

    kind = "closed"
    prefers_wait = False

    def read_into(self, target: memoryview) -> int:
        raise LinkError("The link is closed.")

    def write(self, parts: Sequence[memoryview]) -> int:
        raise LinkError("The link is closed.")

    def wait(self, timeout_s: float | None, *, read: bool, write: bool) -> None: ...

    def shutdown(self) -> None: ...

    def close(self) -> None: ...


_CLOSED = _ClosedPipe()
