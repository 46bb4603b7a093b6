"""OpenAI's HTTP dialect, on the same admission and the same answers as gRPC."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, Response

from cluster.errors import UnknownModel
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.calls.inference import GenerationStream, Inference
from deployments.gateway.calls.output_collector import merge
from deployments.gateway.calls.preprocessor import GenerateRequest
from deployments.gateway.http.body import body_schema, json_body
from deployments.gateway.http.call_middleware import CurrentCall
from deployments.gateway.http.errors import ErrorBody
from deployments.gateway.http.event_stream import EventStreamResponse, to_event
from deployments.gateway.openai.answers import ChatAnswer, CompletionAnswer, to_usage
from deployments.gateway.openai.objects import ChatCompletion, Completion, ModelCard, ModelList
from deployments.gateway.openai.requests import to_chat_request, to_complete_requests
from deployments.gateway.openai.schema import ChatBody, CompletionBody, SamplingFields
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_UNSPECIFIED,
    Generation,
    ListModelsRequest,
)

BODIES = (ChatBody, CompletionBody)
ChatJson = Annotated[ChatBody, Depends(json_body(ChatBody))]
CompletionJson = Annotated[CompletionBody, Depends(json_body(CompletionBody))]
DONE = b"data: [DONE]\n\n"
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, in chunks, each the data of an event.",
        "content": {"text/event-stream": {"schema": EVENT}},
    }
}


def openai_router(inference: Inference) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter(prefix="/v1", responses={"default": {"model": ErrorBody}})
    started = int(time.time())

    @router.post(
        "/chat/completions",
        response_model=ChatCompletion,
        responses=STREAM,
        openapi_extra=body_schema(ChatBody),
    )
    async def chat(body: ChatJson, call: CurrentCall) -> Response:
        return await respond(ChatAnswer, [to_chat_request(body)], body, call)

    @router.post(
        "/completions",
        response_model=Completion,
        responses=STREAM,
        openapi_extra=body_schema(CompletionBody),
    )
    async def complete(body: CompletionJson, call: CurrentCall) -> Response:
        return await respond(CompletionAnswer, to_complete_requests(body), body, call)

    async def respond(
        form: type[ChatAnswer] | type[CompletionAnswer],
        requests: Sequence[GenerateRequest],
        body: SamplingFields,
        call: ClientCall,
    ) -> Response:
        answer = form(call.request_id, body.model or inference.model, inference.token_bytes)
        stream = inference.generate(requests, call, body.n)
        num_answers = len(requests) * body.n
        if not body.stream:
            return await whole(answer, stream, num_answers, body.n)
        wants_usage = body.stream_options.include_usage
        return EventStreamResponse(events(answer, stream, num_answers, body.n, wants_usage))

    @router.get("/models")
    async def list_models(call: CurrentCall) -> ModelList:
        served = await inference.list_models(ListModelsRequest(), call)
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


async def whole(
    answer: ChatAnswer | CompletionAnswer,
    generate: AbstractAsyncContextManager[GenerationStream],
    num_answers: int,
    num_choices: int,
) -> Response:
    """All answers in one body."""
    generations = [Generation() for _ in range(num_answers)]
    async with generate as stream:
        async for index, piece in stream:
            merge(generations[index], piece)
    return JSONResponse(answer.whole(generations, to_usage(generations, num_choices)))


async def events(
    answer: ChatAnswer | CompletionAnswer,
    generate: AbstractAsyncContextManager[GenerationStream],
    num_answers: int,
    num_choices: int,
    wants_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """Yield the answer as events of a stream."""
    lasts = [Generation() for _ in range(num_answers)]
    async with generate as stream:
        async for index, piece in stream:
            lasts[index] = piece
            if not has_news(piece):
                continue
            chunk = answer.chunk(index, piece)
            if wants_usage:
                chunk["usage"] = None
            yield to_event(chunk)
    if wants_usage:
        yield to_event(answer.last(to_usage(lasts, num_choices)))
    yield DONE


def has_news(piece: Generation) -> bool:
    """False for a token that shows nothing yet: half a character, a step of a tool call."""
    shown = piece.text or piece.thought or piece.tool_calls or piece.logprobs
    return bool(shown) or piece.finish_reason != FINISH_REASON_UNSPECIFIED
