"""Generation for both dialects: here a call is checked, charged and streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from deployments.gateway.calls.chat_sessions import ChatSessions, SessionTurn
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.calls.output_collector import OutputCollector, merge
from deployments.gateway.calls.preprocessor import GenerateRequest, Preprocessor
from deployments.gateway.calls.remote_decoder import DecoderRequest, RemoteDecoder
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_UNSPECIFIED,
    ChatRequest,
    CompleteRequest,
    Generation,
    ListModelsRequest,
    ListModelsResponse,
    Model,
    TokenizeRequest,
    TokenizeResponse,
)
from protos.briolette.v1.stream_pb2 import Add

SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that no two answers to a request have one seed


@dataclass(slots=True)
class GenerationStream:
    """Iterates over (index of the answer, piece) of a call's answers, in the order they come."""

    call: ClientCall
    running: dict[str, tuple[int, Add]]  # answers that have not finished, by their request ids
    collector: OutputCollector
    observers: Sequence[Callable[[Generation], None]]  # called with every piece
    turn: SessionTurn | None  # kept before its last piece comes

    def __aiter__(self) -> GenerationStream:
        return self

    async def __anext__(self) -> tuple[int, Generation]:
        if not self.running:
            raise StopAsyncIteration
        output = await self.call.in_time(self.collector.take())
        (index, add), piece = self.running[output.request_id], output.generation
        self.call.record(add, piece)
        for observe in self.observers:
            observe(piece)
        if piece.finish_reason != FINISH_REASON_UNSPECIFIED:
            del self.running[output.request_id]
            if self.turn is not None:
                await self.turn.keep(output.block_keys)
        return index, piece


class Inference:
    """What gRPC and HTTP offer, on top of a decoder that may come and go."""

    def __init__(
        self, decoder: RemoteDecoder, preprocessor: Preprocessor, sessions: ChatSessions
    ) -> None:
        self._decoder = decoder
        self._preprocessor = preprocessor
        self._sessions = sessions

    @property
    def model(self) -> str:
        """The id of the model that is served; empty while it isn't known."""
        return self._decoder.status.model

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text; nothing for control tokens."""
        return self._preprocessor.tokenizer.token_bytes(token_id)

    @asynccontextmanager
    async def generate(
        self, requests: Sequence[GenerateRequest], call: ClientCall, num_choices: int = 1
    ) -> AsyncIterator[GenerationStream]:
        """Start the answers to a call, and abort those that have not finished when the block ends.

        All are checked and charged before the first one starts, so that a refused call costs
        nothing. The first error of any of them ends all.

        Args:
            requests: one for each prompt; a turn of a session is one alone.
            num_choices: answers to each request; answer `i` is to request `i // num_choices`.
        """
        session = requests[0].session if isinstance(requests[0], ChatRequest) else ""
        with call.lease, self._sessions.turn(call.tenant, session) as turn:
            prepared = await call.in_time(self._prepare(requests, call, turn))
            num_prompt_tokens = sum(len(prompt_ids) for _, prompt_ids in prepared)
            with call.charged(num_prompt_tokens) as charge:
                call.begin(self.model, num_prompt_tokens)
                answers = to_choices(prepared, call, num_choices)
                running = {add.request_id: (i, add) for i, (add, _) in enumerate(answers)}
                observers = [charge, self._name_alternatives, *([] if turn is None else [turn.add])]
                with self._decoder.generate(answers) as collector:
                    yield GenerationStream(call, running, collector, observers, turn)

    async def generate_once(self, request: GenerateRequest, call: ClientCall) -> Generation:
        """Return one answer in one piece."""
        answer = Generation()
        async with self.generate([request], call) as stream:
            async for _, piece in stream:
                merge(answer, piece)
        return answer

    async def tokenize(self, request: TokenizeRequest, call: ClientCall) -> TokenizeResponse:
        """Return the token ids of a text, or of messages as the chat template writes them."""
        text, messages = request.text, request.messages
        prompt = ChatRequest(messages=messages) if messages else CompleteRequest(text=text)
        with call.lease:
            self._preprocessor.check_model(request.model, call)
            return TokenizeResponse(token_ids=await self._preprocessor.encode(prompt, call))

    async def list_models(self, _: ListModelsRequest, call: ClientCall) -> ListModelsResponse:
        """Return the served model, if it is known and the tenant may use it."""
        status = self._decoder.status
        if not status.model or not call.lease.tenant.may_use(status.model):
            return ListModelsResponse()
        model = Model(
            id=status.model, context_tokens=status.context_tokens, vocab_size=status.vocab_size
        )
        return ListModelsResponse(models=[model])

    async def _prepare(
        self, requests: Sequence[GenerateRequest], call: ClientCall, turn: SessionTurn | None
    ) -> list[DecoderRequest]:
        prepare = self._preprocessor.prepare
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(prepare(request, call, turn)) for request in requests]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _name_alternatives(self, piece: Generation) -> None:
        for token in piece.logprobs:
            for alternative in token.alternatives:
                alternative.text = self._preprocessor.tokenizer.decode([alternative.token_id])


def to_choices(
    prepared: Sequence[DecoderRequest], call: ClientCall, num_choices: int
) -> list[DecoderRequest]:
    """Return a request for each of a call's answers.

    The choices of a prompt have seeds of their own; the first one has the request's.
    """
    num_answers, timeout_s = len(prepared) * num_choices, call.time_remaining_s
    answers = []
    for index in range(num_answers):
        (original, prompt_ids), choice = prepared[index // num_choices], index % num_choices
        add = Add()
        add.CopyFrom(original)
        add.request_id = call.request_id if num_answers == 1 else f"{call.request_id}-{index}"
        add.same_call, add.same_prompt = index > 0, choice > 0
        if timeout_s is not None:
            add.timeout_s = timeout_s
        if add.sampling.HasField("seed"):
            add.sampling.seed = (add.sampling.seed + choice * SEED_STEP) % 2**63
        answers.append(DecoderRequest(add, prompt_ids))
    return answers
