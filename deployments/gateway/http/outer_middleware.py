"""The outermost layer around every HTTP request: its id, the host it asks for, the last resort."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import BrioletteError, PermissionDenied, Unavailable
from deployments.gateway.calls.client_call import new_request_id
from deployments.gateway.http.errors import error_body, to_response

log = logging.getLogger(__name__)


class OuterMiddleware:
    """Gives every request an id and refuses foreign hosts; answers what fails on the way in."""

    def __init__(self, app: ASGIApp, own_names: Collection[str] | None) -> None:
        """`own_names` are the hosts that may be asked for; None if calls need a key anyway."""
        self._app = app
        self._own_names = own_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = new_request_id()
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
        except BrioletteError as error:
            await to_response(error)(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server ends, and this task with it
            if not is_started:
                stopped = Unavailable("The gateway stops; ask again.")
                await to_response(stopped)(scope, receive, send_with_id)
        except Exception:  # border: an HTTP request
            log.exception("%s failed in the gateway. request_id=%s", scope["path"], request_id)
            if is_started:
                raise
            sentence = "The gateway failed on this request; its log says why."
            await JSONResponse(error_body(500, sentence), 500)(scope, receive, send_with_id)

    def _check_origin(self, headers: Headers) -> None:
        """Refuse foreign hosts where calls need no key.

        A web page from elsewhere must not reach an open gateway through its reader's browser, under
        the gateway's address or under a name that resolves to it (DNS rebinding).
        """
        if self._own_names is None:
            return
        for name, place in (("host", headers.get("host", "")), ("origin", headers.get("origin"))):
            if place is not None and host_of(place) not in self._own_names:
                raise PermissionDenied(
                    f"Without keys only this machine's own names are served, not {name} {place!r}."
                )


def own_names(host: str) -> set[str]:
    """Return the names under which a browser on this machine finds the gateway."""
    return {host.lower(), "localhost", "127.0.0.1", "::1"}


def host_of(place: str) -> str:
    """Return the host in a Host or Origin header, in lower case; empty if it names none."""
    try:
        return urlsplit(place if "//" in place else f"//{place}").hostname or ""
    except ValueError:
        return ""
