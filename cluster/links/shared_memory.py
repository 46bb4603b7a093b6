"""The pipe of a link through shared memory: two rings in a memfd, with doorbells to sleep on."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import platform
import select
import socket
import time
from collections.abc import Sequence

from cluster.errors import LinkError
from cluster.links.pipes import poll_on, to_ms

RING_BYTES = 1 << 20  # per direction; longer messages stream through it
CONTROL_BYTES = 4096  # one page before each ring: counters on cache lines of their own
HEAD, TAIL = 0, 8  # in 8-byte words: bytes ever written, bytes ever read
NUM_SHARED_FDS = 5  # the memory, then a data and a space doorbell for each side

# The counters are published with plain stores, which only x86 keeps in order.
HAS_SHARED_MEMORY = platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create")


class SharedMemoryPipe:
    """A pipe through two rings in one memfd; each side has a doorbell for data and one for space.

    The Unix socket that carried the descriptors stays open and silent: the kernel closes it when
    the other process dies, however it dies, and nothing has a name that could be left behind.

    Doorbells are eventfds, so a ring between a look and a wait isn't lost. A reader rings for space
    only when it crosses half a ring; a writer that waits found the ring full, so such a crossing
    lies ahead of it (no flag, hence no race about one).
    """

    kind = "shm"
    prefers_wait = False

    def __init__(self, sock: socket.socket, fds: Sequence[int], *, is_acceptor: bool) -> None:
        """Map the memory; takes over the socket and the descriptors, also when it raises.

        Args:
            sock: The Unix socket that carried the descriptors.
            fds: The descriptors that `create_shared_fds` made.
            is_acceptor: True on the side that made them.

        Raises:
            LinkError: If the memory can't be mapped.
        """
        memory_fd, *bells = fds
        mine, theirs = (bells[:2], bells[2:]) if is_acceptor else (bells[2:], bells[:2])
        self._sock, self._fds = sock, list(bells)
        self._data_bell, self._space_bell = mine
        self._peer_data_bell, self._peer_space_bell = theirs
        try:
            size = os.fstat(memory_fd).st_size
            self._memory = mmap.mmap(memory_fd, size)
        except (OSError, ValueError) as error:
            sock.close()
            for fd in bells:
                os.close(fd)
            raise LinkError(f"The shared memory can't be mapped: {error}.") from None
        finally:
            os.close(memory_fd)
        half = size // 2
        self._capacity = half - CONTROL_BYTES
        view = memoryview(self._memory)
        rings = [view[:half], view[half:]] if is_acceptor else [view[half:], view[:half]]
        (self._tx, self._tx_words), (self._rx, self._rx_words) = (
            (ring[CONTROL_BYTES:], ring[:CONTROL_BYTES].cast("Q")) for ring in rings
        )
        self._views = [view, *rings, self._tx, self._tx_words, self._rx, self._rx_words]
        self._written = self._read = 0
        self._is_at_end = False
        sock.setblocking(False)
        watched = {sock.fileno(): select.POLLIN}
        read, write = {self._data_bell: select.POLLIN}, {self._space_bell: select.POLLIN}
        self._polls = {
            (True, False): poll_on(watched | read),
            (False, True): poll_on(watched | write),
            (True, True): poll_on(watched | read | write),
        }

    def read_into(self, target: memoryview) -> int:
        available = self._rx_words[HEAD] - self._read
        if available == 0:
            if self._is_at_end:
                raise LinkError("The other side closed the link.")
            return 0
        if not 0 < available <= self._capacity:
            raise LinkError("The counters in the shared memory are out of range.")
        count = min(available, len(target))
        start = self._read % self._capacity
        first = min(count, self._capacity - start)
        target[:first] = self._rx[start : start + first]
        if first < count:
            target[first:count] = self._rx[: count - first]
        before, self._read = self._read, self._read + count
        self._rx_words[TAIL] = self._read
        half = self._capacity // 2
        if before // half != self._read // half:
            os.eventfd_write(self._peer_space_bell, 1)
        return count

    def write(self, parts: Sequence[memoryview]) -> int:
        space = self._capacity - (self._written - self._tx_words[TAIL])
        if not 0 <= space <= self._capacity:
            raise LinkError("The counters in the shared memory are out of range.")
        total = 0
        for part in parts:
            total += self._copy_in(part[: space - total], self._written + total)
            if total == space:
                break
        if total:
            self._written += total
            self._tx_words[HEAD] = self._written
            os.eventfd_write(self._peer_data_bell, 1)
        elif self._is_at_end:
            raise LinkError("The other side closed the link.")
        return total

    def wait(self, timeout_s: float | None, *, read: bool, write: bool) -> None:
        for fd, _ in self._polls[read, write].poll(to_ms(timeout_s)):
            if fd == self._sock.fileno():
                self._is_at_end = True  # nothing is ever sent on it
            else:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)

    def spin(self, limit_s: float) -> bool:
        words, read, end_at = self._rx_words, self._read, time.monotonic() + limit_s
        while words[HEAD] == read:  # the bell that follows isn't waited for: it wakes a later wait
            if time.monotonic() >= end_at:
                return False
        return True

    def shutdown(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        for view in reversed(self._views):
            view.release()
        self._memory.close()

    def _copy_in(self, part: memoryview, position: int) -> int:
        start = position % self._capacity
        first = min(len(part), self._capacity - start)
        self._tx[start : start + first] = part[:first]
        if first < len(part):
            self._tx[: len(part) - first] = part[first:]
        return len(part)


def create_shared_fds(ring_bytes: int = RING_BYTES) -> list[int]:
    """Create the descriptors of a pipe; the caller owns them.

    Returns:
        A memfd with two rings, sealed so that the other side can't shrink it, then the acceptor's
        data and space doorbells, then the connector's.

    Raises:
        OSError: If there is no memory, or the process may open no more files.
    """
    fds: list[int] = []
    try:
        fds.append(os.memfd_create("briolette-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.ftruncate(fds[0], 2 * (CONTROL_BYTES + ring_bytes))
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fds[0], fcntl.F_ADD_SEALS, seals)
        for _ in range(NUM_SHARED_FDS - 1):
            fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    return fds
