"""Answers to requests, whoever brought them: check, tokenize, stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from cluster.errors import ContextTooLong, InvalidRequest, UnknownModel
from deployments.gateway.calls.call import Call
from deployments.gateway.calls.charging import charged
from deployments.gateway.calls.chat_request import to_options, to_sampling, to_turns
from deployments.gateway.calls.conversations import Conversations
from deployments.gateway.calls.remote_decoder import RemoteDecoder
from deployments.gateway.calls.streams import merge
from deployments.gateway.calls.tenant_threads import TenantThreads
from deployments.messages import to_sampling_params
from engine.text.grammars import Grammars
from engine.text.tokenizer import Tokenizer
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
from protos.briolette.v1.stream_pb2 import Add, Output


class Prepared(NamedTuple):
    """A request that was checked and encoded."""

    add: Add  # without the prompt
    prompt_ids: Sequence[int]


class Answers:
    """What gRPC and HTTP offer, on top of a decoder that may come and go."""

    def __init__(
        self,
        decoder: RemoteDecoder,
        tokenizer: Tokenizer,
        conversations: Conversations,
        encoding: TenantThreads,
    ) -> None:
        """The tokenizer runs in the threads of `encoding`."""
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._grammars = Grammars(tokenizer)
        self._conversations = conversations
        self._encoding = encoding

    @property
    def model(self) -> str:
        """The id of the model that is served; empty while it isn't known."""
        return self._decoder.status.model

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text; nothing for control tokens."""
        return self._tokenizer.token_bytes(token_id)

    async def generate(
        self, request: ChatRequest | CompleteRequest, call: Call
    ) -> AsyncGenerator[Generation, None]:
        """The pieces of one answer; leaving early aborts the request in the decoder."""
        self._check_model(request.model, call)
        with call.lease:
            if isinstance(request, ChatRequest) and request.session:
                outputs = self._turn(request, call)
            else:
                outputs = self._charged(await self.prepare(request, call), call)
            async with aclosing(outputs):
                async for output in outputs:
                    yield output.generation

    async def prepare(self, request: ChatRequest | CompleteRequest, call: Call) -> Prepared:
        """What the decoder is told for an answer to it; several answers may share the prompt."""
        self._check_model(request.model, call)
        return await self._prepare(await self._encode(request, call), request, call)

    async def answer(self, prepared: Prepared, call: Call) -> AsyncGenerator[Generation, None]:
        """The pieces of an answer to what was prepared; the caller has charged for it."""
        async with aclosing(self._answer(prepared, call)) as outputs:
            async for output in outputs:
                yield output.generation

    async def _prepare(
        self,
        prompt_ids: Sequence[int],
        request: ChatRequest | CompleteRequest,
        call: Call,
        session: str = "",
    ) -> Prepared:
        self._check_length(prompt_ids)
        add = Add(
            sampling=await self._sampling(request, call),
            chat=isinstance(request, ChatRequest),
            tenant=call.tenant,
            weight=call.lease.tenant.weight,
            priority=request.priority,
            session=session,
            kv_bytes=call.lease.tenant.kv_bytes or 0,
        )
        self._check_model(request.model, call)  # which wasn't known at first, perhaps
        return Prepared(add, prompt_ids)

    async def _charged(self, prepared: Prepared, call: Call) -> AsyncGenerator[Output, None]:
        with charged(call, len(prepared.prompt_ids)) as owe:
            async with aclosing(self._answer(prepared, call)) as outputs:
                async for output in outputs:
                    owe(output.generation)
                    yield output

    async def _answer(self, prepared: Prepared, call: Call) -> AsyncGenerator[Output, None]:
        add, prompt_ids = prepared
        add.request_id = call.request_id
        if (left_s := call.time_remaining_s) is not None:
            add.timeout_s = left_s
        call.answered.begin(self._decoder.status.model, 0 if add.same_prompt else len(prompt_ids))
        ttft_s = None
        async with aclosing(self._decoder.generate(add, prompt_ids)) as outputs:
            async for output in outputs:
                piece, elapsed_s = output.generation, time.monotonic() - call.started
                if ttft_s is None:
                    ttft_s = elapsed_s
                    piece.request_id = add.request_id
                self._name_alternatives(piece)
                if piece.finish_reason != FINISH_REASON_UNSPECIFIED:
                    piece.timings.ttft_s = ttft_s
                    piece.timings.total_s = elapsed_s
                call.answered.add(piece, ttft_s, add.same_prompt)
                yield output

    async def _turn(self, request: ChatRequest, call: Call) -> AsyncGenerator[Output, None]:
        """An answer in a session. Its last piece comes once the turn is kept and the session free
        for the next one.
        """
        tenant, conversations = call.tenant, self._conversations
        answer = Generation()
        async with conversations.hold(tenant, request.session):
            before = await conversations.load_or_begin(tenant, request.session)
            options = to_options(request)
            self._check_size(message.content for message in request.messages)
            prompt_ids = await conversations.prompt(before, request.messages, options)
            prepared = await self._prepare(prompt_ids, request, call, request.session)
            async with aclosing(self._charged(prepared, call)) as outputs:
                async for output in outputs:
                    merge(answer, output.generation)
                    if output.generation.finish_reason == FINISH_REASON_UNSPECIFIED:
                        yield output
            keys = output.block_keys
            await conversations.keep(before, request.messages, options, prompt_ids, answer, keys)
        yield output

    async def whole(self, request: ChatRequest | CompleteRequest, call: Call) -> Generation:
        """One answer in one piece."""
        answer = Generation()
        async with aclosing(self.generate(request, call)) as pieces:
            async for piece in pieces:
                merge(answer, piece)
        return answer

    async def tokenize(self, request: TokenizeRequest, call: Call) -> TokenizeResponse:
        self._check_model(request.model, call)
        with call.lease:
            if request.messages:
                ids = await self._encode_chat(request.messages, call)
            else:
                ids = await self._encode_text(request.text, call)
        return TokenizeResponse(token_ids=ids)

    async def list_models(self, _: ListModelsRequest, call: Call) -> ListModelsResponse:
        status = self._decoder.status
        if not status.model or not call.lease.tenant.may_use(status.model):
            return ListModelsResponse()
        model = Model(
            id=status.model, context_tokens=status.context_tokens, vocab_size=status.vocab_size
        )
        return ListModelsResponse(models=[model])

    async def _encode(self, request: ChatRequest | CompleteRequest, call: Call) -> Sequence[int]:
        if isinstance(request, ChatRequest):
            return await self._encode_chat(request.messages, call, **to_options(request))
        if request.WhichOneof("prompt") == "token_ids":
            return request.token_ids.ids
        if not request.text:
            raise InvalidRequest("The prompt is empty.")
        return await self._encode_text(request.text, call)

    async def _encode_text(self, text: str, call: Call) -> list[int]:
        self._check_size([text])
        return await self._encoding.run(
            call.tenant, lambda: self._tokenizer.encode(text, tenant=call.tenant)
        )

    async def _encode_chat(
        self, messages: Iterable[Message], call: Call, **options: Any
    ) -> list[int]:
        def encode() -> list[int]:
            turns = to_turns(messages)
            self._check_size(turn["content"] for turn in turns)
            return self._tokenizer.apply_chat_template(turns, tenant=call.tenant, **options)

        return await self._encoding.run(call.tenant, encode)

    async def _sampling(self, request: ChatRequest | CompleteRequest, call: Call) -> Sampling:
        """What is wrong with it is told here: a huge list, or a grammar, would hold up a step."""
        sampling = request.sampling
        if isinstance(request, ChatRequest):
            sampling = await self._encoding.run(
                call.tenant, to_sampling, request, self._tokenizer.dialect
            )
        try:
            grammar = to_sampling_params(sampling).grammar
            if grammar is not None:
                await self._encoding.run(call.tenant, self._grammars.compile, grammar)
        except InvalidRequest as error:
            if request.sampling.lark == sampling.lark:
                raise
            raise InvalidRequest(f"These tools can't be required. {error}") from None
        return sampling

    def _check_model(self, model: str, call: Call) -> None:
        served = self._decoder.status.model
        if model and served and model != served:
            raise UnknownModel(f"No model {model!r} here; this cluster serves {served}.")
        if served:
            call.lease.tenant.check_model(served)

    def _check_size(self, texts: Iterable[str]) -> None:
        """Before they are encoded, which takes seconds for a text of megabytes."""
        limit = self._decoder.status.context_tokens
        num_bytes = sum(len(text.encode()) for text in texts)
        if limit and num_bytes > limit * self._tokenizer.longest_token_bytes:
            raise ContextTooLong(
                f"The prompt has {num_bytes:,} bytes; the context holds {limit:,} tokens, which "
                "can't be so many."
            )

    def _check_length(self, prompt_ids: Sequence[int]) -> None:
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
