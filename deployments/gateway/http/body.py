"""Bodies of JSON as what a route takes: off the asyncio loop where they are large."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ValidationError

from cluster.errors import InvalidField
from deployments.gateway.http.errors import to_invalid_field

LARGE_BYTES = 64 << 10  # takes longer than a switch of threads


class CheckedRequest(Request):
    """A request with a body that FastAPI need not parse and check."""

    def __init__(self, request: Request, data: bytes, checked: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._data = data
        self._checked = checked

    async def body(self) -> bytes:
        return self._data

    async def json(self) -> Any:
        return self._checked


async def checked(request: Request, model: type[BaseModel]) -> Request:
    """With its body as a `model`, where it says that it is JSON. Raises InvalidField."""
    data = await request.body()
    if not data or "json" not in request.headers.get("content-type", ""):
        return request
    if len(data) < LARGE_BYTES:
        return CheckedRequest(request, data, parse(model, data))
    return CheckedRequest(request, data, await asyncio.to_thread(parse, model, data))


def parse(model: type[BaseModel], data: bytes) -> BaseModel:
    """Raises InvalidField, with the first thing that is wrong."""
    try:
        return model.model_validate(json.loads(data))
    except json.JSONDecodeError as error:
        raise InvalidField(f"The body is not valid JSON: {error.msg}.", None) from None
    except UnicodeDecodeError:
        raise InvalidField("The body is not valid JSON: it isn't UTF-8.", None) from None
    except RecursionError:
        raise InvalidField("The body is nested too deeply.", None) from None
    except ValidationError as error:
        raise to_invalid_field(error.errors(include_url=False, include_input=False)[0]) from None
