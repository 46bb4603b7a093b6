"""Non-blocking byte pipes under a link: what every pipe does, and the one over a stream socket."""

from __future__ import annotations

import contextlib
import math
import select
import socket
import time
from collections.abc import Sequence
from typing import Protocol

from cluster.errors import LinkError


class Pipe(Protocol):
    """Bytes both ways. One thread may read while another writes; never two of a kind.

    `read_into` and `write` never block; they return the bytes moved, 0 when nothing can move now,
    and raise LinkError once the other side is gone. `wait` returns when something may move, `spin`
    tells without sleeping whether something can be read within the time. `close` may come twice.
    """

    kind: str
    prefers_wait: bool  # a read that finds nothing is dearer than asking first

    def read_into(self, target: memoryview) -> int: ...
    def write(self, parts: Sequence[memoryview]) -> int: ...
    def wait(self, timeout_s: float | None, *, read: bool, write: bool) -> None: ...
    def spin(self, limit_s: float) -> bool: ...
    def shutdown(self) -> None: ...  # wakes both sides; any thread may call it
    def close(self) -> None: ...


class SocketPipe:
    """A connected stream socket, Unix or TCP."""

    prefers_wait = True

    def __init__(self, sock: socket.socket) -> None:
        """Takes the socket over."""
        self.kind = "unix" if sock.family == socket.AF_UNIX else "tcp"
        sock.setblocking(False)
        self._sock = sock
        self._polls = {
            mask: poll_on({sock.fileno(): mask})
            for mask in (select.POLLIN, select.POLLOUT, select.POLLIN | select.POLLOUT)
        }

    def read_into(self, target: memoryview) -> int:
        try:
            count = self._sock.recv_into(target)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LinkError(f"The link broke: {error}.") from None
        if count == 0:
            raise LinkError("The other side closed the link.")
        return count

    def write(self, parts: Sequence[memoryview]) -> int:
        try:
            return self._sock.sendmsg(parts[:512])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LinkError(f"The link broke: {error}.") from None

    def wait(self, timeout_s: float | None, *, read: bool, write: bool) -> None:
        mask = (select.POLLIN if read else 0) | (select.POLLOUT if write else 0)
        self._polls[mask].poll(to_ms(timeout_s))

    def spin(self, limit_s: float) -> bool:
        poll, end_s = self._polls[select.POLLIN].poll, time.monotonic() + limit_s
        while not poll(0):
            if time.monotonic() >= end_s:
                return False
        return True

    def shutdown(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


def poll_on(fd_to_mask: dict[int, int]) -> select.poll:
    """A poll of these descriptors."""
    poll = select.poll()
    for fd, mask in fd_to_mask.items():
        poll.register(fd, mask)
    return poll


def to_ms(timeout_s: float | None) -> int | None:
    """As `poll` wants it, rounded up, so that it doesn't return too early."""
    return None if timeout_s is None else max(0, math.ceil(timeout_s * 1000))
