"""Requests on their way to the decoder: checked, tokenized, their formats tried."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from cluster.errors import ContextTooLong, InvalidRequest, UnknownModel
from deployments.gateway.calls.chat_request import to_chat_messages, to_options, to_sampling
from deployments.gateway.calls.chat_sessions import SessionTurn
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.calls.remote_decoder import DecoderRequest, RemoteDecoder
from deployments.gateway.calls.tenant_threads import TenantThreads
from deployments.messages import to_sampling_params
from engine.text.grammars import Grammars
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.inference_pb2 import ChatRequest, CompleteRequest, Sampling
from protos.briolette.v1.stream_pb2 import Add

GenerateRequest: TypeAlias = ChatRequest | CompleteRequest


class Preprocessor:
    """Makes requests ready for the decoder; what is wrong with one is found here."""

    def __init__(
        self, decoder: RemoteDecoder, tokenizer: Tokenizer, encoding: TenantThreads
    ) -> None:
        """`encoding` are the threads that the tokenizer runs in."""
        self.tokenizer = tokenizer
        self._decoder = decoder
        self._grammars = Grammars(tokenizer)
        self._encoding = encoding

    async def prepare(
        self, request: GenerateRequest, call: ClientCall, turn: SessionTurn | None
    ) -> DecoderRequest:
        """Check and tokenize a request, which is a `turn` of a session or None.

        Raises InvalidRequest, ContextTooLong, UnknownModel, PermissionDenied, Overloaded, and what
        `SessionTurn.encode` raises.
        """
        self.check_model(request.model, call)
        if isinstance(request, CompleteRequest) and not (request.text or request.token_ids.ids):
            raise InvalidRequest("The prompt is empty.")
        prompt_ids = await self.encode(request, call, turn)
        limit = self._decoder.status.context_tokens
        if limit and len(prompt_ids) >= limit:  # in the decoder it would hold up a step
            raise ContextTooLong(
                f"The prompt has {len(prompt_ids)} tokens; the context holds {limit}, "
                "and the answer needs at least one."
            )
        add = Add(
            sampling=await self._sampling(request, call),
            chat=isinstance(request, ChatRequest),
            tenant=call.tenant,
            weight=call.lease.tenant.weight,
            priority=request.priority,
            session="" if turn is None else turn.name,
            kv_bytes=call.lease.tenant.kv_bytes or 0,
        )
        self.check_model(request.model, call)  # it may have become known meanwhile
        return DecoderRequest(add, prompt_ids)

    def check_model(self, model: str, call: ClientCall) -> None:
        """Raise UnknownModel or PermissionDenied, as far as the served model is known."""
        served = self._decoder.status.model
        if model and served and model != served:
            raise UnknownModel(f"No model {model!r} here; this cluster serves {served}.")
        if served:
            call.lease.tenant.check_model(served)

    async def encode(
        self, request: GenerateRequest, call: ClientCall, turn: SessionTurn | None = None
    ) -> Sequence[int]:
        """Return the token ids of a prompt."""
        if isinstance(request, CompleteRequest) and request.WhichOneof("prompt") == "token_ids":
            return request.token_ids.ids
        if isinstance(request, ChatRequest) and turn is not None:
            self._check_size(message.content for message in request.messages)
            return await turn.encode(request)
        return await self._encoding.run(call.tenant, self._encode, request, call.tenant)

    def _encode(self, request: GenerateRequest, tenant: str) -> list[int]:
        if isinstance(request, ChatRequest):
            messages, options = to_chat_messages(request.messages), to_options(request)
            self._check_size(message["content"] for message in messages)
            return self.tokenizer.apply_chat_template(messages, tenant=tenant, **options)
        self._check_size([request.text])
        return self.tokenizer.encode(request.text, tenant=tenant)

    async def _sampling(self, request: GenerateRequest, call: ClientCall) -> Sampling:
        """Return the sampling parameters, checked here: a long list or a grammar takes a while."""
        sampling = request.sampling
        if isinstance(request, ChatRequest):
            sampling = await self._encoding.run(
                call.tenant, to_sampling, request, self.tokenizer.dialect
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

    def _check_size(self, texts: Iterable[str]) -> None:
        """Refuse what can't fit before it is tokenized, which takes seconds for megabytes."""
        limit = self._decoder.status.context_tokens
        num_bytes = sum(len(text.encode()) for text in texts)
        if limit and num_bytes > limit * self.tokenizer.longest_token_bytes:
            raise ContextTooLong(
                f"The prompt has {num_bytes:,} bytes; the context holds {limit:,} tokens, which "
                "can't be so many."
            )
