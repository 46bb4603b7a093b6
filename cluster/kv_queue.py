"""What waits to be written to Redis: a queue of so many bytes at most."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BATCH_BYTES = 16 << 20
BATCH_VALUES = 64


@dataclass(frozen=True, slots=True)
class Value:
    """One value on its way."""

    tenant: str
    key: bytes
    parts: Sequence[memoryview]
    num_bytes: int  # of the payload


class WriteQueue:
    """Values in the order of their puts, in which they are settled too. Any thread may call; one
    takes.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._values: deque[Value] = deque()
        self._num_bytes = 0
        self._num_put = self._num_settled = 0
        self._is_closed = False

    @property
    def num_bytes(self) -> int:
        """Of what waits and of what was taken and isn't settled."""
        return self._num_bytes

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def has_room(self, num_bytes: int) -> bool:
        return self._num_bytes + num_bytes <= self._max_bytes

    def put(self, value: Value) -> bool:
        """Queue a value; False where there is no room for it."""
        with self._changed:
            has_room = self.has_room(value.num_bytes)
            if has_room:
                self._values.append(value)
                self._num_bytes += value.num_bytes
                self._num_put += 1
                self._changed.notify_all()
            return has_room

    def take(self, timeout_s: float) -> list[Value]:
        """The next few values; none where none comes in time, or at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._values or self._is_closed, timeout_s)
            if self._is_closed:
                return []
            batch: list[Value] = []
            num_bytes = 0
            while self._values and len(batch) < BATCH_VALUES and num_bytes < BATCH_BYTES:
                num_bytes += self._values[0].num_bytes
                batch.append(self._values.popleft())
            return batch

    def take_if(self, is_unwanted: Callable[[Value], bool]) -> list[Value]:
        """Some of the values that wait."""
        with self._changed:
            taken = [value for value in self._values if is_unwanted(value)]
            self._values = deque(value for value in self._values if not is_unwanted(value))
            return taken

    def settled(self, values: Sequence[Value]) -> None:
        """They were taken, and are written or given up."""
        with self._changed:
            self._num_bytes -= sum(value.num_bytes for value in values)
            self._num_settled += len(values)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was put before is settled; whether that came in time."""
        with self._changed:
            num_put = self._num_put
            return self._changed.wait_for(lambda: self._num_settled >= num_put, timeout_s)

    def rest(self, timeout_s: float) -> None:
        """Wait for so long, or until the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, timeout_s)

    def close(self) -> None:
        """Nothing is taken any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
