"""The border of an HTTP call: who may call, how much it may send, when it ends; counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import uuid
from collections.abc import Collection
from typing import Annotated, Any, cast
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import BrioletteError, InvalidRequest, Overloaded, PermissionDenied, Unavailable
from cluster.metrics import Metrics
from cluster.tenancy import Admission
from deployments.call import Call, key_in
from deployments.http_errors import error_body, to_response
from deployments.rpc import NOBODY

BODY_S = 60.0  # for the whole body of a request to arrive
LONGEST_TIMEOUT_S = 365 * 86400.0  # of x-request-timeout
REASONS = {"CANCELLED": "client", "DEADLINE_EXCEEDED": "deadline"}  # of what was given up

log = logging.getLogger(__name__)


class ClientGone(BrioletteError):
    """Nobody waits for the answer any more."""

    status = "CANCELLED"


class TooLarge(InvalidRequest):
    """The body is longer than gateway.max_message_bytes."""


class Calls:
    """Lets calls in, reads what they send, watches their clients and counts how they end."""

    def __init__(self, metrics: Metrics, admission: Admission, max_body_bytes: int) -> None:
        self._metrics = metrics
        self._admission = admission
        self._max_body_bytes = max_body_bytes

    async def answer(
        self, name: str, app: ASGIApp, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Run `app` on a call that was let in. Raises what keeps it out."""
        state: dict[str, Any] = scope["state"]
        headers = Headers(scope=scope)
        try:
            lease = self._admission.admit(key_in(headers.get))
        except BrioletteError as error:
            self._metrics.gateway_requests_total(NOBODY, name, error.status).inc()
            raise
        call = state["call"] = Call(lease, timeout_s(headers), state["request_id"])
        self._metrics.gateway_streams(call.tenant, name).inc()
        try:
            body = await read_body(receive, self._max_body_bytes)
            await while_connected(app, scope, body, receive, send)
        except ClientGone as error:
            state["status"] = error.status
        except BrioletteError as error:
            state["status"] = error.status
            raise
        except asyncio.CancelledError:  # the server ends
            state["status"] = Unavailable.status
            raise
        except Exception:
            state["status"] = "INTERNAL"
            raise
        finally:
            self._count(call.tenant, name, state)

    def _count(self, tenant: str, name: str, state: dict[str, Any]) -> None:
        status = Overloaded.status if state.get("stalled") else state.get("status", "OK")
        reason = "stalled" if state.get("stalled") else REASONS.get(status)
        if reason is not None:
            self._metrics.gateway_aborted_total(tenant, name, reason).inc()
        self._metrics.gateway_streams(tenant, name).dec()
        self._metrics.gateway_requests_total(tenant, name, status).inc()


class AdmittedRoute(APIRoute):
    """A route that is let in by key before its body is read, watched and counted.

    `APIRouter(route_class=AdmittedRoute)`, with the whole path in the router's own prefix.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        calls: Calls = scope["app"].state.calls
        await calls.answer(self.path, super().handle, scope, receive, send)


async def current_call(request: Request) -> Call:  # a plain def would run in a thread
    return cast(Call, request.state.call)


CurrentCall = Annotated[Call, Depends(current_call)]  # of a parameter of an AdmittedRoute


class Border:
    """Around every request, whoever sends it: its id, the host it asks for, the last resort."""

    def __init__(self, app: ASGIApp, own_names: Collection[str] | None) -> None:
        """`own_names` are the hosts that may be asked for; None where a key is needed anyway."""
        self._app = app
        self._own_names = own_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check_origin(Headers(scope=scope))
            await self._app(scope, receive, send_with_id)
        except PermissionDenied as error:
            await to_response(error)(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server ends, and this task with it
            if not is_started:
                stopped = Unavailable("The gateway stops; ask again.")
                await to_response(stopped)(scope, receive, send_with_id)
        except Exception:
            log.exception("%s %s failed in the gateway.", scope["method"], scope["path"])
            if is_started:
                raise
            sentence = "The gateway failed on this request; its log says why."
            await JSONResponse(error_body(500, sentence), 500)(scope, receive, send_with_id)

    def _check_origin(self, headers: Headers) -> None:
        """Without keys, whoever can connect may ask: so a web page from elsewhere must not reach us
        through its reader's browser, under our own address or under a name that it gave us.
        """
        if self._own_names is None:
            return
        for name, place in (("host", headers.get("host", "")), ("origin", headers.get("origin"))):
            if place is not None and host_of(place) not in self._own_names:
                raise PermissionDenied(
                    f"Without keys only this machine's own names are served, not {name} {place!r}."
                )


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
        with contextlib.suppress(asyncio.CancelledError):
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


def host_of(place: str) -> str:
    """Of a Host or Origin header, in small letters; empty where it names none."""
    try:
        return urlsplit(place if "//" in place else f"//{place}").hostname or ""
    except ValueError:
        return ""


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
