"""How links between processes come to be: endpoints, listeners and connections, by the best way."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import ConfigError, LinkError, LinkRefused, LinkTimeout, PortTaken
from cluster.links import handshake
from cluster.links.link import Link, end_of, left_until
from cluster.links.pipes import SocketPipe
from cluster.links.shared_memory import (
    HAS_SHARED_MEMORY,
    NUM_SHARED_FDS,
    SharedMemoryPipe,
    create_shared_fds,
)

__all__ = ["Endpoint", "Link", "Listener", "connect"]

AUTO = handshake.TRANSPORTS  # in order of preference
HANDSHAKE_S = 5.0
TURN_AWAY_S = 0.2  # for telling a peer that this process may open no more files


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
        self._spare_fd: int | None = _open_spare()
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
        end = end_of(deadline_s)
        while True:
            sock = self.accept_socket(left_until(end))
            with contextlib.suppress(LinkError):
                return self.welcome(sock)

    def accept_socket(self, deadline_s: float | None = None) -> socket.socket:
        """The next connection, before any handshake; errors as in `accept`."""
        end = end_of(deadline_s)
        with self._lock:
            while not self._is_closed:
                left_s = left_until(end)
                self._poll.poll(None if left_s is None else left_s * 1000)
                for sock in self._sockets:
                    try:
                        return sock.accept()[0]
                    except OSError as error:  # nobody there, or gone again
                        if error.errno in (errno.EMFILE, errno.ENFILE):
                            self._turn_away(sock)
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
            if self._spare_fd is not None:
                os.close(self._spare_fd)
            self._sockets.clear()

    def _turn_away(self, listening: socket.socket) -> None:
        """This process may open no more files: give up the spare one for as long as it takes to
        tell the next peer so, who would wait in vain otherwise.
        """
        if self._spare_fd is not None:
            os.close(self._spare_fd)
        with contextlib.suppress(OSError, LinkError):
            peer = listening.accept()[0]
            with peer:
                handshake.answer(peer, self._secret, _refuse_for_files, TURN_AWAY_S)
        try:
            self._spare_fd = _open_spare()
        except OSError:  # another thread was faster
            self._spare_fd = None
            time.sleep(TURN_AWAY_S)  # who waits stays readable: don't spin

    def _share_memory(self, sock: socket.socket) -> SharedMemoryPipe:
        """Only now, for a peer that has proved itself: memory is made for nobody else."""
        fds: list[int] = []
        with contextlib.suppress(OSError):  # no memory, or no more files: the peer tries a socket
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


def _refuse_for_files(hello: bytes) -> bytes:
    raise LinkError("The process has as many files open as it may (ulimit -n).")


def _open_spare() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


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
