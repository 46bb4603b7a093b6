"""OpenAI's HTTP dialect, on the same answers as gRPC."""

from __future__ import annotations

import time

from fastapi import APIRouter
from typing_extensions import TypedDict

from cluster.errors import UnknownModel
from deployments.answers import Answers
from deployments.http_calls import AdmittedRoute, CurrentCall
from deployments.http_errors import ErrorBody
from protos.briolette.v1.inference_pb2 import ListModelsRequest


class ModelCard(TypedDict):
    """A model that is served."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    """All models that are served."""

    object: str
    data: list[ModelCard]


def openai_router(answers: Answers) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter(
        prefix="/v1", route_class=AdmittedRoute, responses={"default": {"model": ErrorBody}}
    )
    started = int(time.time())

    @router.get("/models")
    async def list_models(call: CurrentCall) -> ModelList:
        served = await answers.list_models(ListModelsRequest(), call)
        cards: list[ModelCard] = [
            {
                "id": model.id,
                "object": "model",
                "created": started,
                "owned_by": "briolette",
                "max_model_len": model.context_tokens,
            }
            for model in served.models
        ]
        return {"object": "list", "data": cards}

    @router.get("/models/{model_id:path}")
    async def get_model(model_id: str, call: CurrentCall) -> ModelCard:
        for card in (await list_models(call))["data"]:
            if card["id"] == model_id:
                return card
        raise UnknownModel(f"No model {model_id!r} here.")

    return router
