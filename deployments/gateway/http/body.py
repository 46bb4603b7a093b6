"""Bodies of JSON as what a route takes: parsed off the asyncio loop where they are large."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema

from cluster.errors import InvalidField
from deployments.gateway.http.errors import to_invalid_field

LARGE_BYTES = 64 << 10  # parsing takes longer than a switch of threads
SCHEMAS = "#/components/schemas/{model}"

B = TypeVar("B", bound=BaseModel)


def json_body(model: type[B]) -> Callable[[Request], Awaitable[B]]:
    """Return a dependency that brings the body as a `model`. It raises InvalidField."""

    async def read(request: Request) -> B:
        if "json" not in request.headers.get("content-type", ""):
            raise InvalidField("The body must be JSON, with content-type: application/json.")
        data = await request.body()
        if len(data) < LARGE_BYTES:
            return parse(model, data)
        return await asyncio.to_thread(parse, model, data)

    return read


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return what a route with a `json_body` adds to its entry in /openapi.json."""
    schema = {"schema": {"$ref": SCHEMAS.format(model=model.__name__)}}
    return {"requestBody": {"required": True, "content": {"application/json": schema}}}


def publish_bodies(app: FastAPI, models: Iterable[type[BaseModel]]) -> None:
    """Add the schemas that `body_schema` refers to to /openapi.json."""
    _, made = models_json_schema([(m, "validation") for m in models], ref_template=SCHEMAS)
    app.openapi().setdefault("components", {}).setdefault("schemas", {}).update(made["$defs"])


def parse(model: type[B], data: bytes) -> B:
    """Parse a body. Raises InvalidField with the first thing that is wrong."""
    if not data:
        raise InvalidField("The body is empty.")
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
