"""What waits to be written to Redis: a queue of so many bytes at most."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

BATCH_BYTES = 16 << 20
BATCH_VALUES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One value on its way."""

    tenant: str
    key: bytes
    parts: Sequence[memoryview]
    num_bytes: int  # of the payload


@dataclass(frozen=True, slots=True)
class Removal:
    """Keys whose values are to go, those that were put before too."""

    tenant: str
    keys: Sequence[bytes]
    num_bytes: int = 0


Entry: TypeAlias = Value | Removal


class WriteQueue:
    """Entries in the order of their puts, in which they are settled too. Any thread may call; one
    takes.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._entries: deque[Entry] = deque()
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

    def put(self, entry: Entry) -> bool:
        """Queue a value or, always, a removal; False where there is no room for it."""
        with self._changed:
            has_room = self.has_room(entry.num_bytes)
            if has_room:
                self._entries.append(entry)
                self._num_bytes += entry.num_bytes
                self._num_put += 1
                self._changed.notify_all()
            return has_room

    def take(self, timeout_s: float) -> Removal | list[Value]:
        """What is next: a removal, or a few values; none where nothing comes in time, or at the
        end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._entries or self._is_closed, timeout_s)
            if self._is_closed:
                return []
            batch: list[Value] = []
            num_bytes = 0
            while self._entries and len(batch) < BATCH_VALUES and num_bytes < BATCH_BYTES:
                entry = self._entries.popleft()
                if isinstance(entry, Removal):
                    if not batch:
                        return entry
                    self._entries.appendleft(entry)
                    break
                batch.append(entry)
                num_bytes += entry.num_bytes
            return batch

    def put_back(self, removal: Removal) -> None:
        """What was taken is next once more, and isn't settled yet."""
        with self._changed:
            self._entries.appendleft(removal)
            self._num_settled -= 1

    def settled(self, entries: Sequence[Entry]) -> None:
        """They were taken, and are done or given up."""
        with self._changed:
            self._num_bytes -= sum(entry.num_bytes for entry in entries)
            self._num_settled += len(entries)
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
