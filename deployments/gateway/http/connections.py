"""HTTP connections that end: silent ones, endless headers, clients that don't read."""

from __future__ import annotations

import asyncio

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from deployments.gateway.http.transport import GatheringTransport

HEAD_S = 10.0  # from the connection, or the answer before, to the end of a request's headers
STALL_S = 20.0  # a client that takes nothing for so long is not reading
MAX_HEAD_BYTES = 64 << 10


class Connections(ServerState):
    """All that are open, and those of them that have no request right now, the oldest first."""

    def __init__(self, max_open: int) -> None:
        super().__init__()
        self._max_open = max_open
        self._silent: dict[BoundedConnection, None] = {}

    def make_room(self) -> None:
        """For one that was just taken: above the limit the one that was silent longest goes, which
        is that one itself where all others are being answered.
        """
        if len(self.connections) > self._max_open:
            oldest = next(iter(self._silent))
            self.remove_silent(oldest)
            oldest.transport.abort()

    def add_silent(self, connection: BoundedConnection) -> None:
        self._silent[connection] = None

    def remove_silent(self, connection: BoundedConnection) -> None:
        self._silent.pop(connection, None)


class BoundedConnection(HttpToolsProtocol):
    """Uvicorn's connection, with an end to what it waits for and to what it keeps."""

    def __init__(self, config: Config, connections: Connections) -> None:
        super().__init__(config, connections, app_state={})
        self._all = connections
        self._head_bytes: int | None = 0  # of the request that arrives; None: its headers are here
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(GatheringTransport(transport))  # type: ignore[arg-type]
        self._expect_head()
        self._all.make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head_is_here()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        is_too_long = self._head_bytes is not None and self._head_bytes > MAX_HEAD_BYTES
        if is_too_long and not self.transport.is_closing():
            self.send_400_response("The headers are too long.")

    def on_headers_complete(self) -> None:
        self._head_is_here()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._head_bytes = 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # else a request that came with this one is next
            self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def _expect_head(self) -> None:
        self._head_is_here()
        self._head_bytes = 0
        self._all.add_silent(self)
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _head_is_here(self) -> None:
        self._head_bytes = None
        self._all.remove_silent(self)
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _watch_reader(self, num_left: int) -> None:
        """Nothing is added while writing is paused: of a client that reads, less is left later."""
        self._stall_timer = self.loop.call_later(STALL_S, self._check_reader, num_left)

    def _check_reader(self, num_left: int) -> None:
        num_left_now = self.transport.get_write_buffer_size()
        if num_left_now < num_left:
            self._watch_reader(num_left_now)
            return
        if self.scope is not None:
            self.scope["state"]["stalled"] = True
        self.transport.abort()  # close() would wait for the client to read
