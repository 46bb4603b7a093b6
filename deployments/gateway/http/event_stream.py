"""Server-sent events: one for each piece, a sign of life where nothing comes, errors in between."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import BrioletteError
from deployments.gateway.http.errors import ErrorBody, error_body, to_body

HEARTBEAT_S = 15.0  # proxies give up what is silent for a minute

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would collect pieces
}

log = logging.getLogger(__name__)


def to_event(data: Mapping[str, object]) -> bytes:
    """Return an event without a name."""
    return b"data: %b\n\n" % json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


class EventStreamResponse(Response):
    """Sends server-sent events as they come; an error before the first is an ordinary answer."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._writing = asyncio.Lock()  # a sign of life may come while an event is sent
        self._is_begun = False
        self._is_silent = True  # since the last sign of life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        beats = asyncio.ensure_future(self._beat(send))
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await self._write(event, send)
        except BrioletteError as error:
            if not self._is_begun:
                raise
            scope["state"]["status"], scope["state"]["error"] = error.status, error
            await self._write(_error_event(to_body(error)), send)
        except Exception:  # border: a stream of events, which ends with one that says so
            if not self._is_begun:
                raise
            state = scope["state"]
            request_id, state["status"] = state["request_id"], "INTERNAL"
            log.exception("%s failed in the gateway. request_id=%s", scope["path"], request_id)
            sentence = "The gateway failed on this request; its log says why."
            await self._write(_error_event(error_body(500, sentence)), send)
        finally:
            beats.cancel()
            await asyncio.gather(beats, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _beat(self, send: Send) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if self._is_silent:
                await self._write(b": wait\n\n", send)
            self._is_silent = True

    async def _write(self, data: bytes, send: Send) -> None:
        async with self._writing:
            if not self._is_begun:
                self._is_begun = True
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
            self._is_silent = False
            await send({"type": "http.response.body", "body": data, "more_body": True})


def _error_event(body: ErrorBody) -> bytes:
    return b"event: error\n" + to_event(body)
