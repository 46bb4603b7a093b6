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
    """A pipe of bytes both ways. One thread may read while another writes.

    Attributes:
        kind: The transport: "shm", "unix" or "tcp".
        prefers_wait: True if a read that finds nothing costs more than a wait.
    """

    kind: str
    prefers_wait: bool

    def read_into(self, target: memoryview) -> int:
        """Read what has come, without blocking; return the number of bytes. Raises LinkError once
        the other side is gone.
        """

    def write(self, parts: Sequence[memoryview]) -> int:
        """Write what there is room for, without blocking; return the number of bytes. Raises
        LinkError once the other side is gone.
        """

    def wait(self, timeout_s: float | None, *, read: bool, write: bool) -> None:
        """Sleep until something may be read or written; it may wake for nothing."""

    def spin(self, limit_s: float) -> bool:
        """Poll without sleeping, at most so long; return whether something can be read."""

    def shutdown(self) -> None:
        """Wake both sides, which then find the pipe closed. Any thread may call."""

    def close(self) -> None:
        """Free everything. May be called twice."""


class SocketPipe:
    """A pipe over a connected stream socket, Unix or TCP."""

    prefers_wait = True

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket."""
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
        poll, end_at = self._polls[select.POLLIN].poll, time.monotonic() + limit_s
        while not poll(0):
            if time.monotonic() >= end_at:
                return False
        return True

    def shutdown(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


def poll_on(fd_to_mask: dict[int, int]) -> select.poll:
    """Return a poll object for these descriptors, each with its event mask."""
    poll = select.poll()
    for fd, mask in fd_to_mask.items():
        poll.register(fd, mask)
    return poll


def to_ms(timeout_s: float | None) -> int | None:
    """Return a timeout in milliseconds, as `poll` takes it, rounded up: never too short."""
    return None if timeout_s is None else max(0, math.ceil(timeout_s * 1000))
