"""The web page: its files, which need no key, and the JSON that it asks for, which does."""

from __future__ import annotations

import hashlib
import mimetypes
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header
from google.protobuf.message import Message
from starlette.exceptions import HTTPException
from starlette.responses import Response

from deployments.gateway.calls.chat_sessions import ChatSessions
from deployments.gateway.http.call_middleware import CurrentCall
from deployments.gateway.services.admin import Admin
from deployments.gateway.services.sessions import SessionService
from protos.briolette.v1.admin_pb2 import GetStatusRequest
from protos.briolette.v1.sessions_pb2 import (
    DeleteSessionRequest,
    ListSessionsRequest,
    ParkSessionRequest,
)

PAGE_DIR = Path(__file__).parents[1] / "page"
HEADERS = {
    "cache-control": "no-cache",  # asked again each time, sent again where it has changed
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_router() -> APIRouter:
    """/ and the files under /page."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: path.read_bytes() for path in PAGE_DIR.iterdir() if path.is_file()}

    @router.get("/")
    async def index(if_none_match: Annotated[str | None, Header()] = None) -> Response:
        return await file("index.html", if_none_match)

    @router.get("/page/{name}")
    async def file(name: str, if_none_match: Annotated[str | None, Header()] = None) -> Response:
        content = files.get(name)
        if content is None:
            raise HTTPException(404, "Not Found")
        headers = {**HEADERS, "etag": f'"{hashlib.blake2b(content, digest_size=16).hexdigest()}"'}
        if if_none_match == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=mimetypes.guess_type(name)[0])

    return router


def page_api_router(
    admin: Admin, sessions: SessionService, chat_sessions: ChatSessions
) -> APIRouter:
    """The routes under /api."""
    router = APIRouter(prefix="/api", include_in_schema=False)

    @router.get("/status")
    async def get_status(call: CurrentCall) -> dict[str, Any]:
        status = await admin.get_status(GetStatusRequest(), call)
        return {**to_json(status), "tenant": call.tenant}

    @router.get("/sessions")
    async def list_sessions(call: CurrentCall) -> dict[str, Any]:
        answer = await sessions.list_all(ListSessionsRequest(), call)
        status = await admin.get_status(GetStatusRequest(), call)
        tenants = [load.tenant for load in status.tenants]
        used_bytes = chat_sessions.sessions.used_bytes
        stored_bytes = await chat_sessions.ask(call.tenant, used_bytes, tenants)
        return {**to_json(answer), "stored_bytes": stored_bytes}

    @router.put("/sessions/parked")
    async def park_session(name: str, call: CurrentCall) -> dict[str, Any]:
        return to_json(await sessions.park(ParkSessionRequest(name=name), call))

    @router.delete("/sessions")
    async def delete_session(name: str, call: CurrentCall) -> dict[str, Any]:
        return to_json(await sessions.delete(DeleteSessionRequest(name=name), call))

    return router


def to_json(message: Message) -> dict[str, Any]:
    """All fields by name, absent messages with their defaults, optional values that are not set as
    None. Large numbers stay numbers, where protobuf's own JSON has texts.
    """
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def _value(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None:
        return [to_json(item) for item in value] if field.is_repeated else to_json(value)
    if field.is_repeated:
        return list(value)
    return value if not field.has_presence or message.HasField(field.name) else None
