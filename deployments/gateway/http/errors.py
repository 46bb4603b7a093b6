"""Errors over HTTP, in OpenAI's form: a status code and {"error": {message, type, param, code}}."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from typing_extensions import TypedDict

from cluster.errors import BrioletteError, ContextTooLong, InvalidField, UnknownModel

HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}  # of a gRPC status; any other is 500

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}  # of a status code; else invalid_request_error below 500 and server_error from there on

CODES: dict[type[BrioletteError], str] = {
    ContextTooLong: "context_length_exceeded",
    UnknownModel: "model_not_found",
}  # those that OpenAI's clients know
STATUS_CODES = {"UNAUTHENTICATED": "invalid_api_key", "RESOURCE_EXHAUSTED": "rate_limit_exceeded"}

RETRY_AFTER_S = 1.0  # where the error itself doesn't say


class ErrorDetail(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer that is no success."""

    error: ErrorDetail


def handle_errors(app: FastAPI) -> None:
    """Let the app answer with our form whatever goes wrong in it."""

    async def on_ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, BrioletteError)
        request.state.status, request.state.error = error.status, error
        return to_response(error)

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await on_ours(request, to_invalid_field(error.errors()[0]))

    async def on_half_character(request: Request, _: Exception) -> JSONResponse:
        return await on_ours(request, InvalidField("A string contains an unpaired surrogate."))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        request.state.status = "INVALID_ARGUMENT"
        body = error_body(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
        return JSONResponse(body, error.status_code, error.headers)

    app.add_exception_handler(BrioletteError, on_ours)
    app.add_exception_handler(UnicodeEncodeError, on_half_character)  # JSON's "\\ud800"
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)


def to_response(error: BrioletteError) -> JSONResponse:
    """An error as an answer, with Retry-After where waiting helps."""
    status_code = HTTP_STATUS.get(error.status, 500)
    headers = {}
    if status_code in (429, 503):
        wait_s = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers["retry-after"] = str(max(1, math.ceil(wait_s)))
    if status_code == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(to_body(error), status_code, headers)


def to_body(error: BrioletteError) -> ErrorBody:
    """An error as the body of an answer, or as an event of a stream."""
    code = CODES.get(type(error), STATUS_CODES.get(error.status))
    param = error.param if isinstance(error, InvalidField) else None
    return error_body(HTTP_STATUS.get(error.status, 500), error.sentence, param, code)


def error_body(
    status_code: int, message: str, param: str | None = None, code: str | None = None
) -> ErrorBody:
    usual = "invalid_request_error" if status_code < 500 else "server_error"
    kind = TYPES.get(status_code, usual)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def to_invalid_field(error: Mapping[str, Any]) -> InvalidField:
    """What pydantic says of a field, as a sentence."""
    place = [str(part) for part in error["loc"] if part != "body"]
    message = f"{error['msg'].removeprefix('Value error, ').rstrip('.')}."
    param = ".".join(place) or None
    return InvalidField(f"{param}: {message}" if param else f"The body: {message}", param)
