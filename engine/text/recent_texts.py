"""An LRU cache of the token ids of long texts: clients send a chat whole again with each turn."""

from __future__ import annotations

import sys
import threading
from array import array
from collections import OrderedDict

MIN_CHARS = 256  # encoding a shorter text is as quick as a lookup
MAX_BYTES = 64 << 20  # texts and ids together; 32K tokens take some 300 KB


class RecentTexts:
    """Token ids by tenant and text. Threads may share it.

    Each tenant finds only its own texts: the time that encoding takes would otherwise tell whether
    another tenant has sent a text.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0  # of the texts and ids that are kept
        self._ids: OrderedDict[tuple[str, str], array[int]] = (
            OrderedDict()
        )  # least recently used first
        self._lock = threading.Lock()

    def find(self, tenant: str, text: str) -> list[int] | None:
        """Return the ids of a text, as a list of the caller's own; None if they aren't kept."""
        with self._lock:
            ids = self._ids.get((tenant, text))
            if ids is not None:
                self._ids.move_to_end((tenant, text))
        return None if ids is None else ids.tolist()

    def add(self, tenant: str, text: str, ids: list[int]) -> None:
        """Keep the ids of a long text; evicts the least recently used texts beyond the limit."""
        if len(text) < MIN_CHARS:
            return
        packed = array("I", ids)
        with self._lock:
            if (tenant, text) in self._ids:
                return
            self._ids[tenant, text] = packed
            self.num_bytes += _size(text, packed)
            while self.num_bytes > self._max_bytes:
                (_, oldest), its_ids = self._ids.popitem(last=False)
                self.num_bytes -= _size(oldest, its_ids)


def _size(text: str, ids: array[int]) -> int:
    return sys.getsizeof(text) + sys.getsizeof(ids)
