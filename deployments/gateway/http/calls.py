"""The border of an HTTP call: who may call, how much it may send, when it ends; counted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, cast

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.responses import Response
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
from deployments.gateway.http.body import checked

BODY_S = 60.0  # for the whole body of a request to arrive
LONGEST_TIMEOUT_S = 365 * 86400.0  # of x-request-timeout


class Calls:
    """Lets calls in, reads what they send, watches their clients and counts how they end."""

    def __init__(
        self,
        admission: Admission,
        requests: RequestLog,
        max_body_bytes: int,
    ) -> None:
        self._admission = admission
        self._requests = requests
        self._max_body_bytes = max_body_bytes

    async def answer(
        self, name: str, app: ASGIApp, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Run `app` on a call that was let in. Raises what keeps it out."""
        state: dict[str, Any] = scope["state"]
        headers = Headers(scope=scope)
        request_id: str = state["request_id"]
        lease = self._requests.let_in(self._admission, key_in(headers.get), name, request_id)
        call = state["call"] = ClientCall(lease, request_id=request_id)
        self._requests.began(call, name)
        try:
            call.timeout_s = timeout_s(headers)
            body = await read_body(receive, self._max_body_bytes)
            await while_connected(app, scope, body, receive, send)
        except ClientGone as error:
            state["status"] = error.status
        except BrioletteError as error:
            state["status"], state["error"] = error.status, error
            raise
        except asyncio.CancelledError:  # the server ends
            state["status"] = Unavailable.status
            raise
        except Exception:
            state["status"] = "INTERNAL"
            raise
        finally:
            if state.get("stalled"):  # its connection was cut
                stalled = StalledClient("The client stopped reading.")
                state["status"], state["error"] = stalled.status, stalled
            self._requests.ended(call, name, state.get("status", "OK"), state.get("error"))


class AdmittedRoute(APIRoute):
    """A route that is let in by key before its body is read, watched and counted.

    `APIRouter(route_class=AdmittedRoute)`, with the whole path in the router's own prefix.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        calls: Calls = scope["app"].state.calls
        await calls.answer(self.path, super().handle, scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler, body = super().get_route_handler(), self.body_field
        if body is None:
            return handler
        model = cast(type[BaseModel], body.field_info.annotation)

        async def handle(request: Request) -> Response:
            return await handler(await checked(request, model))

        return handle


async def current_call(request: Request) -> ClientCall:  # a plain def would run in a thread
    return cast(ClientCall, request.state.call)


CurrentCall = Annotated[ClientCall, Depends(current_call)]  # of a parameter of an AdmittedRoute


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
    """Raises TooLarge, ClientGone, InvalidRequest where it doesn't come."""
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
    """What x-request-timeout gives the call. Raises InvalidRequest."""
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
