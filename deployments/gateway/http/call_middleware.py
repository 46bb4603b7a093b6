"""The border of an HTTP call: admitted by key, bounded in what it sends, watched, counted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, cast

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import (
    BrioletteError,
    ClientGone,
    InvalidRequest,
    StalledClient,
    TooLarge,
    Unavailable,
)
from cluster.tenants.admission import Admission
from deployments.gateway.calls.client_call import ClientCall, key_in
from deployments.gateway.calls.request_log import RequestLog

BODY_S = 60.0  # for the whole body of a request to arrive
LONGEST_TIMEOUT_S = 365 * 86400.0  # of x-request-timeout


class CallMiddleware:
    """Admits calls before their bodies are read, watches their clients and counts how they end.

    Plain ASGI. Routes that need no key pass through it untouched.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Iterable[BaseRoute],
        admission: Admission,
        request_log: RequestLog,
        max_body_bytes: int,
    ) -> None:
        """Wrap `app`; `routes` are those that need a key."""
        self._app = app
        self._routes: Sequence[Any] = list(routes)
        self._admission = admission
        self._request_log = request_log
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        matching = [r for r in self._routes if r.matches(scope)[0] is not Match.NONE]
        if matching:
            await self._answer(matching[0].path, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _answer(self, method: str, scope: Scope, receive: Receive, send: Send) -> None:
        state: dict[str, Any] = scope["state"]
        headers = Headers(scope=scope)
        request_id: str = state["request_id"]
        lease = self._request_log.admit(self._admission, key_in(headers.get), method, request_id)
        call = state["call"] = ClientCall(lease, request_id=request_id)
        self._request_log.began(call, method)
        try:
            call.timeout_s = timeout_s(headers)
            body = await read_body(receive, self._max_body_bytes)
            await while_connected(self._app, scope, body, receive, send)
        except ClientGone as error:
            state["status"] = error.status
        except BrioletteError as error:
            state["status"], state["error"] = error.status, error
            raise
        except asyncio.CancelledError:  # the server ends
            state["status"] = Unavailable.status
            raise
        except Exception:  # border: a call, which is counted; OuterMiddleware answers
            state["status"] = "INTERNAL"
            raise
        finally:
            if state.get("stalled"):  # its connection was cut
                stalled = StalledClient("The client stopped reading.")
                state["status"], state["error"] = stalled.status, stalled
            status, problem = state.get("status", "OK"), state.get("error")
            self._request_log.ended(call, method, status, problem)


async def current_call(request: Request) -> ClientCall:  # a plain def would run in a thread
    """Return the call that CallMiddleware has admitted."""
    return cast(ClientCall, request.state.call)


CurrentCall = Annotated[ClientCall, Depends(current_call)]  # of a route that needs a key


async def while_connected(
    app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send
) -> None:
    """Run the app until it has answered or its client is gone. Raises ClientGone."""
    answer = asyncio.ensure_future(_run(app, scope, body, send))
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientGone("The client is gone.")
        answer.result()
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _run(app: ASGIApp, scope: Scope, body: bytes, send: Send) -> None:
    is_taken = False

    async def receive() -> Message:
        nonlocal is_taken
        if is_taken:
            await asyncio.get_running_loop().create_future()  # the end is watched for already
        is_taken = True
        return {"type": "http.request", "body": body, "more_body": False}

    await app(scope, receive, send)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """Return the whole body. Raises TooLarge, ClientGone, and InvalidRequest after BODY_S."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            is_whole = False
            while not is_whole:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone("The client is gone.")
                body += message.get("body", b"")
                is_whole = not message.get("more_body", False)
                if len(body) > max_bytes:
                    raise TooLarge(
                        f"The body is longer than {max_bytes:,} bytes (gateway.max_message_bytes)."
                    )
    except TimeoutError:
        raise InvalidRequest(f"The body didn't arrive within {BODY_S:g} s.") from None
    return bytes(body)


def timeout_s(headers: Headers) -> float | None:
    """Return the seconds in x-request-timeout; None without it. Raises InvalidRequest."""
    text = headers.get("x-request-timeout")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_TIMEOUT_S:
        raise InvalidRequest(f"x-request-timeout must be a number of seconds, not {text!r}.")
    return seconds
