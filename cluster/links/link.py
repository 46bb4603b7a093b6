"""A link between two processes: whole messages both ways over a pipe, with timeouts."""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from cluster.errors import LinkError, LinkTimeout
from cluster.links.pipes import Pipe
from cluster.links.spin import Spinner

Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_MESSAGE_BYTES = 256 << 20
SCRATCH_BYTES = 128 * 1024
MAX_INBOX = 64  # messages taken in while a send waits for room

HEADER = struct.Struct("<II")  # MARK, then the message's length in bytes
MARK = 0x4B4E4C42


class Link:
    """A link that carries whole messages both ways. One thread may send while another receives.

    After any LinkError but LinkTimeout the link is broken: close it. A `timeout_s` of None waits
    for ever.

    Attributes:
        kind: The transport: "shm", "unix" or "tcp".
        hello: What the other side said in the handshake.
        pipe: The bytes below the messages.
    """

    def __init__(self, pipe: Pipe, hello: bytes, max_message_bytes: int = MAX_MESSAGE_BYTES):
        self.kind = pipe.kind
        self.hello = hello
        self.pipe = pipe
        self._max_message_bytes = max_message_bytes
        self._send_lock, self._recv_lock = threading.Lock(), threading.Lock()
        self._spinner = Spinner()
        self._is_closed = False
        self._inbox: deque[memoryview] = deque()
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._num_scratch = 0  # bytes in scratch: less than a header between two reads
        self._body: memoryview | None = None  # a message of which a part has come
        self._num_body = 0

    def send(self, parts: Sequence[Buffer], timeout_s: float | None = None) -> None:
        """Send one message without copying its parts together.

        A send that waits for room keeps receiving, so two peers that both send never wait for each
        other.

        Args:
            parts: The message's bytes, one part after the other.
            timeout_s: Seconds without any byte moving, out or in, after which the link is broken.

        Raises:
            LinkError: If the other side is gone or takes nothing, or the message is too long.
        """
        views = [memoryview(part).cast("B") for part in parts]
        size = sum(map(len, views))
        if size > self._max_message_bytes:
            raise LinkError(
                f"Message of {size} bytes exceeds the limit of {self._max_message_bytes}."
            )
        views.insert(0, memoryview(HEADER.pack(MARK, size)))
        with self._send_lock:
            self._check_open()
            try:
                self._write(views, timeout_s)
            except LinkTimeout as error:  # half a message is out
                self._break()
                raise LinkError("The other side took no message within the timeout.") from error

    def recv(self, timeout_s: float | None = None) -> memoryview:
        """Receive the next message, in memory of its own.

        Args:
            timeout_s: Seconds without any byte of the message arriving.

        Raises:
            LinkTimeout: If nothing came for so long; a later call may still receive it.
            LinkError: If the other side is gone or sends anything but messages.
        """
        if not self._recv_lock.acquire(timeout=-1 if timeout_s is None else timeout_s):
            raise LinkTimeout("No message within the timeout.")
        try:
            self._check_open()
            while not self._inbox:
                if self.pipe.prefers_wait or not self._pump():
                    self._await(timeout_s)
            return self._inbox.popleft()
        finally:
            self._recv_lock.release()

    def close(self) -> None:
        """Close the link for both sides and free its memory. Threads inside `send` or `recv` get
        LinkError.
        """
        self._break()  # wakes them, so that the locks come free
        with self._send_lock, self._recv_lock:
            self.pipe.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _break(self) -> None:
        self._is_closed = True
        self.pipe.shutdown()

    def _check_open(self) -> None:
        if self._is_closed:
            raise LinkError("The link is closed.")

    def _write(self, views: list[memoryview], timeout_s: float | None) -> None:
        end_at = end_of(timeout_s)
        while True:
            num_moved = self.pipe.write(views)
            views = _advance(views, num_moved)
            if not views:
                return
            num_moved += self._wait_for_room(left_until(end_at))
            if num_moved:
                end_at = end_of(timeout_s)

    def _wait_for_room(self, left_s: float | None) -> int:
        """Wait until more can be sent; return the number of bytes received meanwhile."""
        if left_s == 0:
            raise LinkTimeout("No room within the timeout.")
        count = 0
        if len(self._inbox) < MAX_INBOX and self._recv_lock.acquire(blocking=False):
            try:
                count = self._pump()
                if not count:
                    self.pipe.wait(left_s, read=True, write=True)
            finally:
                self._recv_lock.release()
        else:  # another thread receives, or the inbox is full
            self.pipe.wait(left_s, read=False, write=True)
        self._check_open()
        return count

    def _await(self, timeout_s: float | None) -> None:
        """Wait for bytes and read them; the caller holds the receive lock."""
        began_at = time.monotonic()
        spin_s, end_at = self._spinner.limit_s(began_at), end_of(timeout_s)
        if not (spin_s and self.pipe.spin(spin_s) and self._pump()):
            while True:
                left_s = left_until(end_at)
                self.pipe.wait(left_s, read=True, write=False)
                if self._pump():
                    break
                if left_s == 0:
                    raise LinkTimeout("No message within the timeout.")
        self._spinner.learn(time.monotonic() - began_at)

    def _pump(self) -> int:
        """Read once what has come; return its number of bytes. The receive lock is held."""
        if self._body is None:
            count = self.pipe.read_into(self._scratch[self._num_scratch :])
            self._num_scratch += count
            self._split_scratch()
        else:  # the rest of a long message goes straight where it belongs
            count = self.pipe.read_into(self._body[self._num_body :])
            self._num_body += count
            self._finish_body()
        return count

    def _split_scratch(self) -> None:
        start, stop = 0, self._num_scratch
        while self._body is None and stop - start >= HEADER.size:
            mark, size = HEADER.unpack_from(self._scratch, start)
            if mark != MARK or size > self._max_message_bytes:
                self._break()
                raise LinkError("The other side sent bytes that are not a message.")
            start += HEADER.size
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


def _advance(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return what is left of `views` after their first `count` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


def end_of(timeout_s: float | None) -> float | None:
    """Return the moment on time.monotonic's clock that lies `timeout_s` from now; None for None."""
    return None if timeout_s is None else time.monotonic() + timeout_s


def left_until(end_at: float | None) -> float | None:
    """Return the seconds left until a moment, 0 if it has passed; None for None."""
    return None if end_at is None else max(0.0, end_at - time.monotonic())
