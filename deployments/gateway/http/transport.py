"""A transport that sends what is written within one turn of the event loop at once."""

from __future__ import annotations

import asyncio
from typing import Any

MAX_HELD_BYTES = 64 << 10  # more goes out at once, so that a slow client is felt at once


class GatheringTransport:
    """In front of another transport. Uvicorn writes an answer's head, body and end one by one, and
    each write is a system call that wakes the client.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._held: list[bytes] = []
        self._num_held = 0

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held.append(data)
        self._num_held += len(data)
        if self._num_held > MAX_HELD_BYTES:
            self.flush()

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        """Send what is held."""
        if self._held:
            held, self._held, self._num_held = self._held, [], 0
            self._transport.write(b"".join(held))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
