"""Connecting processes: endpoints, listeners, and links by the fastest transport that works."""

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
HANDSHAKE_TIMEOUT_S = 5.0
TURN_AWAY_S = 0.2  # for telling a peer that this process may open no more files


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The addresses of a listener; only a process on its machine can reach `unix_name`."""

    host: str
    port: int
    unix_name: str | None = None  # in Linux's abstract namespace: it ends with its process

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, to be sent to other processes."""
        return asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Endpoint:
        """Return the endpoint that `to_dict` made these values of."""
        unix_name = fields.get("unix_name")
        return Endpoint(str(fields["host"]), int(fields["port"]), unix_name)


class Listener:
    """Accepts links on a TCP port and, from this machine, on a Unix socket."""

    def __init__(
        self,
        secret: bytes,
        verify: Callable[[bytes], bytes],
        host: str = "127.0.0.1",
        port: int = 0,
        transports: Sequence[str] = AUTO,
    ) -> None:
        """Bind and listen.

        Args:
            secret: The cluster's secret, which peers must know.
            verify: Returns the welcome for a peer's hello, or raises LinkError with the reason to
                refuse it.
            host: The address to listen on.
            port: The TCP port; 0 takes a free one.
            transports: The transports that peers may ask for.

        Raises:
            PortTaken: If another process listens on the port.
            ConfigError: If this machine doesn't have the address.
        """
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

    def accept(self, timeout_s: float | None = None) -> Link:
        """Return the next link whose handshake succeeds.

        A server that must not wait for a slow peer calls `accept_socket`, and `welcome` in a
        thread.

        Raises:
            LinkTimeout: If there was none within `timeout_s`.
            LinkError: If the listener is closed.
        """
        end_at = end_of(timeout_s)
        while True:
            sock = self.accept_socket(left_until(end_at))
            with contextlib.suppress(LinkError):
                return self.welcome(sock)

    def accept_socket(self, timeout_s: float | None = None) -> socket.socket:
        """Return the next connection, before any handshake. Raises as `accept` does."""
        end_at = end_of(timeout_s)
        with self._lock:
            while not self._is_closed:
                left_s = left_until(end_at)
                self._poll.poll(None if left_s is None else left_s * 1000)
                for sock in self._sockets:
                    try:
                        return sock.accept()[0]
                    except OSError as error:  # no peer, or it is gone again
                        if error.errno in (errno.EMFILE, errno.ENFILE):
                            self._turn_away(sock)
                if left_s == 0:
                    raise LinkTimeout("No link within the timeout.")
        raise LinkError("The listener is closed.")

    def welcome(self, sock: socket.socket, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> Link:
        """Shake hands on a connection and return its link; takes over the socket.

        Raises:
            LinkError: If the handshake fails or the peer is refused.
        """
        is_unix = sock.family == socket.AF_UNIX
        try:
            transport, hello = handshake.answer(sock, self._secret, self._verify, timeout_s)
            if (transport == "tcp") == is_unix or transport not in self._transports:
                raise LinkError(f"The peer asked for {transport}, which this socket doesn't offer.")
            if transport == "shm":
                return Link(self._share_memory(sock), hello)
            _set_options(sock)
            return Link(SocketPipe(sock), hello)
        except (LinkError, OSError) as error:
            sock.close()
            raise error if isinstance(error, LinkError) else LinkError(str(error)) from None

    def close(self) -> None:
        """Stop listening; a thread in `accept` gets LinkError. Accepted links stay open."""
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
        """Tell the next peer that this process may open no more files, with the spare one: it would
        wait in vain otherwise.
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
            time.sleep(TURN_AWAY_S)  # the waiting peer keeps the socket readable: don't spin

    def _share_memory(self, sock: socket.socket) -> SharedMemoryPipe:
        """Share new memory with a peer; only after its handshake, so that strangers cost none."""
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
    timeout_s: float = HANDSHAKE_TIMEOUT_S,
    transports: Sequence[str] = AUTO,
) -> Link:
    """Connect to a listener by the first transport whose handshake succeeds.

    Args:
        endpoint: The listener's addresses.
        secret: The cluster's secret.
        hello: What the listener is told.
        timeout_s: Seconds for all attempts together.
        transports: The transports to try, in this order.

    Returns:
        The link; its `hello` is the listener's welcome.

    Raises:
        LinkRefused: If the listener refuses, with its reason.
        LinkError: If no transport works, with what went wrong on each.
    """
    end_at = time.monotonic() + timeout_s
    problems: list[str] = []
    for transport in transports:
        if transport != "tcp" and endpoint.unix_name is None:
            continue
        if transport == "shm" and not HAS_SHARED_MEMORY:
            continue
        try:
            return _connect_by(transport, endpoint, secret, hello, end_at)
        except LinkRefused:
            raise
        except (LinkError, OSError) as error:
            problems.append(f"{transport}: {error}")
    raise LinkError(f"No link to {endpoint.host}:{endpoint.port} ({'; '.join(problems)}).")


def _connect_by(
    transport: str, endpoint: Endpoint, secret: bytes, hello: bytes, end_at: float
) -> Link:
    left_s = max(0.001, end_at - time.monotonic())
    if transport == "tcp":
        sock = socket.create_connection((endpoint.host, endpoint.port), timeout=left_s)
    else:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if transport != "tcp":
            sock.settimeout(left_s)
            sock.connect(f"\0{endpoint.unix_name}")
        left_s = max(0.001, end_at - time.monotonic())
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
        raise LinkError("the other side has no shared memory for links")
    return list(fds)


def _refuse_for_files(hello: bytes) -> bytes:
    raise LinkError("The process has reached its limit of open files (ulimit -n).")


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
