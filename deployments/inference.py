"""The service `briolette.v1.Inference`: check a request, tokenize, stream the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, Protocol

import grpc

from cluster.errors import ContextTooLong, InvalidRequest, UnknownModel
from deployments.messages import to_sampling_params
from deployments.remote_decoder import RemoteDecoder
from deployments.rpc import Context, Methods
from deployments.streams import merge
from protos.briolette.v1 import inference_pb2
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_UNSPECIFIED,
    ChatRequest,
    CompleteRequest,
    Generation,
    ListModelsRequest,
    ListModelsResponse,
    Message,
    Model,
    Sampling,
    TokenizeRequest,
    TokenizeResponse,
)
from protos.briolette.v1.stream_pb2 import Add

NAME: str = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


class ChatTokenizer(Protocol):
    """What the service needs of engine.tokenizer.Tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def apply_chat_template(self, messages: list[dict[str, Any]]) -> list[int]: ...


class Inference:
    """The methods, on top of a decoder that may come and go."""

    def __init__(self, decoder: RemoteDecoder, tokenizer: ChatTokenizer) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer

    def handler(self, methods: Methods) -> grpc.GenericRpcHandler:
        """What a gRPC server calls."""
        streamed, unary = methods.streamed, methods.unary
        by_name = {
            "Chat": streamed("Chat", self._generate, ChatRequest),
            "ChatOnce": unary("ChatOnce", self._whole, ChatRequest),
            "Complete": streamed("Complete", self._generate, CompleteRequest),
            "CompleteOnce": unary("CompleteOnce", self._whole, CompleteRequest),
            "Tokenize": unary("Tokenize", self._tokenize, TokenizeRequest),
            "ListModels": unary("ListModels", self._list_models, ListModelsRequest),
        }
        return grpc.method_handlers_generic_handler(NAME, by_name)

    async def _generate(
        self, request: ChatRequest | CompleteRequest, context: Context
    ) -> AsyncGenerator[Generation, None]:
        """The pieces of one answer; leaving early aborts the request in the decoder."""
        started = time.monotonic()
        self._check_model(request.model)
        prompt_ids = await self._encode(request)
        self._check_length(prompt_ids)
        add = to_add(prompt_ids, request.sampling, context.time_remaining())
        ttft_s = None
        async with aclosing(self._decoder.generate(add)) as pieces:
            async for piece in pieces:
                elapsed_s = time.monotonic() - started
                if ttft_s is None:
                    ttft_s = elapsed_s
                    piece.request_id = add.request_id
                self._name_alternatives(piece)
                if piece.finish_reason != FINISH_REASON_UNSPECIFIED:
                    piece.timings.ttft_s = ttft_s
                    piece.timings.total_s = elapsed_s
                yield piece

    async def _whole(self, request: ChatRequest | CompleteRequest, context: Context) -> Generation:
        """One answer in one piece."""
        answer = Generation()
        async with aclosing(self._generate(request, context)) as pieces:
            async for piece in pieces:
                merge(answer, piece)
        return answer

    async def _tokenize(self, request: TokenizeRequest, _: Context) -> TokenizeResponse:
        self._check_model(request.model)
        if request.messages:
            return TokenizeResponse(token_ids=await self._encode_chat(request.messages))
        ids = await asyncio.to_thread(self._tokenizer.encode, request.text)
        return TokenizeResponse(token_ids=ids)

    async def _list_models(self, _: ListModelsRequest, __: Context) -> ListModelsResponse:
        status = self._decoder.status
        if not status.model:
            return ListModelsResponse()
        model = Model(
            id=status.model, context_tokens=status.context_tokens, vocab_size=status.vocab_size
        )
        return ListModelsResponse(models=[model])

    async def _encode(self, request: ChatRequest | CompleteRequest) -> list[int]:
        if isinstance(request, ChatRequest):
            return await self._encode_chat(request.messages)
        if request.WhichOneof("prompt") == "token_ids":
            return list(request.token_ids.ids)
        if not request.text:
            raise InvalidRequest("The prompt is empty.")
        return await asyncio.to_thread(self._tokenizer.encode, request.text)

    async def _encode_chat(self, messages: Iterable[Message]) -> list[int]:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return await asyncio.to_thread(self._tokenizer.apply_chat_template, turns)

    def _check_model(self, model: str) -> None:
        served = self._decoder.status.model
        if model and served and model != served:
            raise UnknownModel(f"No model {model!r} here; this cluster serves {served}.")

    def _check_length(self, prompt_ids: list[int]) -> None:
        """Here already: in the decoder, a huge prompt would hold up everybody's step."""
        limit = self._decoder.status.context_tokens
        if limit and len(prompt_ids) >= limit:
            raise ContextTooLong(
                f"The prompt has {len(prompt_ids)} tokens; the context holds {limit}, "
                "and the answer needs at least one."
            )

    def _name_alternatives(self, piece: Generation) -> None:
        for token in piece.logprobs:
            for alternative in token.alternatives:
                alternative.text = self._tokenizer.decode([alternative.token_id])


def to_add(prompt_ids: list[int], sampling: Sampling, timeout_s: float | None) -> Add:
    """The request for the decoder; `timeout_s` is what is left of the client's deadline.

    Raises InvalidRequest for a sampling value out of range: in the decoder, to look through a huge
    list would hold up everybody's step.
    """
    to_sampling_params(sampling)
    return Add(prompt_ids=prompt_ids, sampling=sampling, tenant="default", timeout_s=timeout_s)
