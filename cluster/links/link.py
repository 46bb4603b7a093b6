"""A link: whole messages both ways over a pipe, with deadlines."""

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

_HEADER = struct.Struct("<II")  # a mark, then the length in bytes
_MARK = 0x4B4E4C42


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
        self._spinner = Spinner()
        self._is_closed = False
        self._inbox: deque[memoryview] = deque()
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._num_scratch = 0  # bytes in scratch: less than a header between two reads
        self._body: memoryview | None = None  # of a message that is still coming
        self._num_body = 0

    def send(self, parts: Sequence[Buffer], deadline_s: float | None = None) -> None:
        """Send one message, the parts one after the other, without joining them first.

        A send that waits for room keeps receiving, so two peers that both send never wait for each
        other. `deadline_s` is for a standstill: bytes that move, out or in, push it out. Raises
        LinkError when the other side is gone or takes nothing, or the message is too long.
        """
        views = [memoryview(part).cast("B") for part in parts]
        size = sum(map(len, views))
        if size > self._max_message_bytes:
            raise LinkError(f"A message of {size} bytes; {self._max_message_bytes} is most.")
        views.insert(0, memoryview(_HEADER.pack(_MARK, size)))
        with self._send_lock:
            self._check_open()
            try:
                self._write(views, deadline_s)
            except LinkTimeout as error:  # half a message is out
                self._break()
                raise LinkError("The other side took no message within the deadline.") from error

    def recv(self, deadline_s: float | None = None) -> memoryview:
        """The next message, in memory of its own. `deadline_s` is for silence: bytes of a message
        that is still coming push it out. Raises LinkTimeout when nothing came for so long,
        LinkError when the other side is gone or sends something else.
        """
        if not self._recv_lock.acquire(timeout=-1 if deadline_s is None else deadline_s):
            raise LinkTimeout("No message within the deadline.")
        try:
            self._check_open()
            while not self._inbox:
                if self._pipe.prefers_wait or not self._pump():
                    self._await(deadline_s)
            return self._inbox.popleft()
        finally:
            self._recv_lock.release()

    def close(self) -> None:
        """Close for both sides and free everything. Threads inside send or recv get LinkError."""
        self._break()  # wakes them, so that the locks come free
        with self._send_lock, self._recv_lock:
            self._pipe.close()

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

    def _write(self, views: list[memoryview], deadline_s: float | None) -> None:
        end = end_of(deadline_s)
        while True:
            num_moved = self._pipe.write(views)
            views = _advance(views, num_moved)
            if not views:
                return
            num_moved += self._wait_for_room(left_until(end))
            if num_moved:
                end = end_of(deadline_s)

    def _wait_for_room(self, left_s: float | None) -> int:
        """Returns the number of bytes that came in meanwhile."""
        if left_s == 0:
            raise LinkTimeout("No room within the deadline.")
        count = 0
        if len(self._inbox) < MAX_INBOX and self._recv_lock.acquire(blocking=False):
            try:
                count = self._pump()
                if not count:
                    self._pipe.wait(left_s, read=True, write=True)
            finally:
                self._recv_lock.release()
        else:  # another thread receives, or nobody does
            self._pipe.wait(left_s, read=False, write=True)
        self._check_open()
        return count

    def _await(self, deadline_s: float | None) -> None:
        """Take in the next bytes, once they come. Holds the receive lock."""
        began_s = time.monotonic()
        limit_s, end = self._spinner.limit_s(began_s), end_of(deadline_s)
        if not (limit_s and self._pipe.spin(limit_s) and self._pump()):
            while True:
                left_s = left_until(end)
                self._pipe.wait(left_s, read=True, write=False)
                if self._pump():
                    break
                if left_s == 0:
                    raise LinkTimeout("No message within the deadline.")
        self._spinner.learn(time.monotonic() - began_s)

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


def _advance(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of `views` after their first `count` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


def end_of(deadline_s: float | None) -> float | None:
    """The moment, on time.monotonic's clock, that lies `deadline_s` from now."""
    return None if deadline_s is None else time.monotonic() + deadline_s


def left_until(end: float | None) -> float | None:
    """The seconds that are left until a moment, 0 when it is over."""
    return None if end is None else max(0.0, end - time.monotonic())
