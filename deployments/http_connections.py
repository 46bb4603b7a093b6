"""HTTP connections that end: silent ones, endless headers, clients that don't read."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 10.0  # from the connection, or the answer before, to the end of a request's headers
STALL_S = 20.0  # a client that takes nothing for so long is not reading
MAX_HEAD_BYTES = 64 << 10


class BoundedConnection(HttpToolsProtocol):
    """Uvicorn's connection, which waits for ever and takes headers of any size, with limits."""

    _head_bytes: int | None = 0  # of the request that is arriving; None: its headers are here
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        _cancel(self._head_timer)
        _cancel(self._stall_timer)

    def data_received(self, data: bytes) -> None:
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        is_too_long = self._head_bytes is not None and self._head_bytes > MAX_HEAD_BYTES
        if is_too_long and not self.transport.is_closing():
            self.send_400_response("The headers are too long.")

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        _cancel(self._head_timer)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline:
            self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._stall_timer)

    def _expect_head(self) -> None:
        self._head_bytes = 0
        _cancel(self._head_timer)
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _watch_reader(self, num_left: int) -> None:
        """While writing is paused nothing is added: the client reads if less is left each time."""
        self._stall_timer = self.loop.call_later(STALL_S, self._check_reader, num_left)

    def _check_reader(self, num_left: int) -> None:
        num_still_left = self.transport.get_write_buffer_size()
        if num_still_left < num_left:
            self._watch_reader(num_still_left)
            return
        if self.scope is not None:
            self.scope["state"]["stalled"] = True
        self.transport.abort()  # close() would wait for the client to read


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
