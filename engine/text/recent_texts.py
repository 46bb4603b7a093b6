"""Token ids of the long texts that were encoded last: a chat is sent whole again for each turn."""

from __future__ import annotations

import sys
import threading
from array import array
from collections import OrderedDict

MIN_CHARS = 256  # shorter ones are encoded as quickly as they are found
MAX_BYTES = 64 << 20  # of texts and ids; 32K tokens are some 300 KB


class RecentTexts:
    """Any thread may call. Each tenant finds its own texts only: how quickly one is encoded would
    tell whether somebody else has sent it.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._ids: OrderedDict[tuple[str, str], array[int]] = OrderedDict()  # the last used last
        self._lock = threading.Lock()

    def find(self, tenant: str, text: str) -> list[int] | None:
        """The ids of a text, if they are still known."""
        with self._lock:
            ids = self._ids.get((tenant, text))
            if ids is not None:
                self._ids.move_to_end((tenant, text))
        return None if ids is None else ids.tolist()

    def add(self, tenant: str, text: str, ids: list[int]) -> None:
        """Remember a long text, in place of those that nobody has sent for the longest time."""
        if len(text) < MIN_CHARS:
            return
        packed = array("I", ids)
        with self._lock:
            if (tenant, text) in self._ids:
                return
            self._ids[tenant, text] = packed
            self._num_bytes += _size(text, packed)
            while self._num_bytes > self._max_bytes:
                (_, oldest), its_ids = self._ids.popitem(last=False)
                self._num_bytes -= _size(oldest, its_ids)


def _size(text: str, ids: array[int]) -> int:
    return sys.getsizeof(text) + sys.getsizeof(ids)
