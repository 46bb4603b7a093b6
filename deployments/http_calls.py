"""The border of an HTTP call: who may call, how much it may send, when it ends; counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import uuid
from collections.abc import Collection
from typing import Annotated, Any, cast

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import BrioletteError, InvalidRequest, PermissionDenied
from cluster.metrics import Metrics
from cluster.tenancy import Admission, OpenAdmission
from deployments.call import Call
from deployments.http_errors import error_body, to_response

BODY_S = 60.0  # for the whole body of a request to arrive
LONGEST_TIMEOUT_S = 365 * 86400.0  # of x-request-timeout

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
        lease = self._admission.admit(bearer_key(headers))
        call = state["call"] = Call(lease, timeout_s(headers), state["request_id"])
        self._metrics.gateway_streams(call.tenant, name).inc()
        try:
            body = await read_body(receive, self._max_body_bytes)
            await while_connected(app, scope, body, receive, send)
        except BrioletteError as error:
            state["status"] = error.status
            raise
        except Exception:
            state["status"] = "INTERNAL"
            raise
        finally:
            self._count(call.tenant, name, state)

    def _count(self, tenant: str, name: str, state: dict[str, Any]) -> None:
        status = state.get("status", "OK")
        if status in ("CANCELLED", "DEADLINE_EXCEEDED"):
            reason = "deadline" if status == "DEADLINE_EXCEEDED" else "client"
            reason = "stalled" if state.get("stalled") else reason
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


def current_call(request: Request) -> Call:
    return cast(Call, request.state.call)


CurrentCall = Annotated[Call, Depends(current_call)]  # of a parameter of an AdmittedRoute


class Border:
    """Around every request, whoever sends it: its id, the host it asks for, the last resort."""

    def __init__(self, app: ASGIApp, admission: Admission, hosts: Collection[str]) -> None:
        self._app = app
        self._admission = admission
        self._hosts = frozenset(hosts)

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
        except ClientGone:
            pass
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
        if not isinstance(self._admission, OpenAdmission):
            return
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host):
            raise PermissionDenied(
                f"There are no keys, so only this machine's own names are served, not {host!r}."
            )
        if origin is not None and not self._is_ours(origin.partition("://")[2]):
            raise PermissionDenied(f"There are no keys, so no page of {origin} is served.")

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        return name.lower() in self._hosts


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


def bearer_key(headers: Headers) -> str | None:
    """The key that a call shows."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


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
