"""The gRPC gateway: parse, tokenize, stream answers, status codes, health, reflection.

A plain asyncio server (`Gateway`), so that a test can run it without Ray; `GatewayReplica` puts
it into a Serve replica.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from cluster.checkpoint import resolve_model
from cluster.config import Config, GatewayConfig
from cluster.errors import (
    ContextTooLong,
    InvalidRequest,
    LinkError,
    PortTaken,
    Unavailable,
    UnknownModel,
)
from cluster.links import Endpoint
from cluster.metrics import Metrics, start_metrics_server
from deployments.decoder_link import DecoderLink
from deployments.rpc import Context, Methods
from deployments.scrape_targets import ScrapeTargets
from deployments.start_report import reporting
from deployments.streams import Stream, Streams, merge
from engine.tokenizer import Tokenizer
from protos.briolette.v1 import admin_pb2, inference_pb2
from protos.briolette.v1.admin_pb2 import ClusterStatus, GetStatusRequest, Part
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_UNSPECIFIED,
    ChatRequest,
    CompleteRequest,
    Generation,
    ListModelsRequest,
    ListModelsResponse,
    Model,
    Sampling,
    TokenizeRequest,
    TokenizeResponse,
)
from protos.briolette.v1.stream_pb2 import Add, FromDecoder, ToDecoder

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
BIND_DEADLINE_S = 10.0  # a gateway that is being replaced may still hold the port

log = logging.getLogger(__name__)


class ChatTokenizer(Protocol):
    """What the gateway needs of engine.tokenizer.Tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def apply_chat_template(self, messages: list[dict[str, Any]]) -> list[int]: ...


class Gateway:
    """Serves `briolette.v1.Inference`, `briolette.v1.Admin`, health and reflection on one port.

    Runs on the asyncio loop that calls `start()`.
    """

    def __init__(
        self,
        config: GatewayConfig,
        tokenizer: ChatTokenizer,
        find_decoder: Callable[[], Endpoint],
        secret: bytes,
        metrics: Metrics,
        metrics_port: int = 0,
        bind_deadline_s: float = 0.0,
        on_status: Callable[[ClusterStatus], None] | None = None,
    ) -> None:
        """`metrics_port` is where they are shown, for the status; 0 for nowhere.

        `on_status` is told what clients are, whenever the decoder has told its own.
        """
        self.port = config.port
        self._metrics_port = metrics_port
        self._bind_deadline_s = bind_deadline_s
        self._on_status = on_status
        self._config = config
        self._tokenizer = tokenizer
        self._find_decoder = find_decoder
        self._secret = secret
        self._streams = Streams(self._abort)
        self._status = ClusterStatus(reason="The decoder is still loading the model.")
        self._tasks: set[asyncio.Future[None]] = set()  # asyncio itself keeps no reference
        self._health = health.aio.HealthServicer()
        self._methods = Methods(metrics)
        self._server = self._make_server()

    async def start(self) -> None:
        """Bind and serve. Raises PortTaken."""
        await self._set_health()
        self.port = await bind(self._listen, self._bind_deadline_s)
        await self._server.start()
        self._link = DecoderLink(
            asyncio.get_running_loop(),
            self._secret,
            self._find_decoder,
            self._on_message,
            self._on_lost,
            self._on_silent,
        )

    def problem(self) -> str | None:
        """Why a started gateway should be replaced; None while it is well."""
        return None if self._link.is_alive else "The link to the decoder has no thread any more."

    async def stop(self, grace_s: float = 5.0) -> None:
        """Say NOT_SERVING, let streams end for a while, stop."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        self._link.close()

    # The unary methods

    async def _tokenize(self, request: TokenizeRequest, _: Context) -> TokenizeResponse:
        self._check_model(request.model)
        if request.messages:
            return TokenizeResponse(token_ids=await self._encode_chat(request.messages))
        ids = await asyncio.to_thread(self._tokenizer.encode, request.text)
        return TokenizeResponse(token_ids=ids)

    async def _list_models(self, _: ListModelsRequest, __: Context) -> ListModelsResponse:
        status = self._status
        if not status.model:
            return ListModelsResponse()
        model = Model(
            id=status.model, context_tokens=status.context_tokens, vocab_size=status.vocab_size
        )
        return ListModelsResponse(models=[model])

    async def _get_status(self, _: GetStatusRequest, __: Context) -> ClusterStatus:
        return self._whole_status()

    def _whole_status(self) -> ClusterStatus:
        status = ClusterStatus()
        status.CopyFrom(self._status)
        status.gateway.CopyFrom(
            Part(pid=os.getpid(), device="cpu", metrics_port=self._metrics_port)
        )
        return status

    # A request's way

    async def _generate(
        self, request: ChatRequest | CompleteRequest, context: Context
    ) -> AsyncGenerator[Generation, None]:
        """The pieces of one answer; leaving early aborts the request in the decoder."""
        started = time.monotonic()
        self._check_model(request.model)
        if isinstance(request, ChatRequest):
            prompt_ids = await self._encode_chat(request.messages)
        else:
            prompt_ids = await self._encode_prompt(request)
        if not self._status.ready:
            raise Unavailable(self._status.reason)
        self._check_length(prompt_ids)
        stream = self._streams.open()
        try:
            add = self._add(stream, prompt_ids, request.sampling, context)
            self._link.send(ToDecoder(adds=[add]))
            ttft_s = None
            while True:
                piece = await stream.take()
                now = time.monotonic()
                if ttft_s is None:
                    ttft_s = now - started
                    piece.request_id = stream.request_id
                self._name_alternatives(piece)
                if piece.finish_reason != FINISH_REASON_UNSPECIFIED:
                    piece.timings.ttft_s = ttft_s
                    piece.timings.total_s = now - started
                    yield piece
                    return
                yield piece
        finally:
            self._streams.close(stream)
            if not stream.is_finished:
                self._abort(stream.request_id)

    def _abort(self, request_id: str) -> None:
        self._link.send(ToDecoder(aborts=[request_id]))

    async def _whole(self, request: ChatRequest | CompleteRequest, context: Context) -> Generation:
        """One answer in one piece."""
        answer = Generation()
        async with aclosing(self._generate(request, context)) as pieces:
            async for piece in pieces:
                merge(answer, piece)
        return answer

    def _add(
        self, stream: Stream, prompt_ids: list[int], sampling: Sampling, context: Context
    ) -> Add:
        add = Add(
            request_id=stream.request_id, prompt_ids=prompt_ids, sampling=sampling, tenant="default"
        )
        if (remaining_s := context.time_remaining()) is not None:
            add.timeout_s = remaining_s
        return add

    async def _encode_prompt(self, request: CompleteRequest) -> list[int]:
        if request.WhichOneof("prompt") == "token_ids":
            return list(request.token_ids.ids)
        if not request.text:
            raise InvalidRequest("The prompt is empty.")
        return await asyncio.to_thread(self._tokenizer.encode, request.text)

    async def _encode_chat(self, messages: Iterable[inference_pb2.Message]) -> list[int]:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return await asyncio.to_thread(self._tokenizer.apply_chat_template, turns)

    def _check_model(self, model: str) -> None:
        if model and self._status.model and model != self._status.model:
            raise UnknownModel(
                f"No model {model!r} here; this cluster serves {self._status.model}."
            )

    def _check_length(self, prompt_ids: list[int]) -> None:
        """Here already: in the decoder, a huge prompt would hold up everybody's step."""
        if len(prompt_ids) >= self._status.context_tokens:
            raise ContextTooLong(
                f"The prompt has {len(prompt_ids)} tokens; the context holds "
                f"{self._status.context_tokens}, and the answer needs at least one."
            )

    def _name_alternatives(self, piece: Generation) -> None:
        for token in piece.logprobs:
            for alternative in token.alternatives:
                alternative.text = self._tokenizer.decode([alternative.token_id])

    # What the decoder says; all of it on the asyncio loop

    def _on_message(self, message: FromDecoder) -> None:
        for output in message.outputs:
            self._streams.push(output)
        if message.HasField("status"):
            self._set_status(message.status)
            if self._on_status is not None:
                self._on_status(self._whole_status())

    def _on_lost(self, reason: str) -> None:
        log.warning("No link to the decoder: %s", reason)
        self._streams.fail_all("The decoder that worked on this answer is gone; ask again.")
        self._set_unready("The decoder is not reachable right now.")

    def _on_silent(self) -> None:
        """Streams stay open: it may go on."""
        self._set_unready("The decoder does not answer right now.")

    def _set_unready(self, reason: str) -> None:
        status = ClusterStatus()
        status.CopyFrom(self._status)
        status.ready = False
        status.reason = reason
        self._set_status(status)

    def _set_status(self, status: ClusterStatus) -> None:
        has_changed = status.ready != self._status.ready
        self._status = status
        if has_changed:
            task = asyncio.ensure_future(self._set_health())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _set_health(self) -> None:
        state = health_pb2.HealthCheckResponse.ServingStatus
        for service in ("", INFERENCE):
            await self._health.set(
                service, state.SERVING if self._status.ready else state.NOT_SERVING
            )

    # The server

    def _make_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # a second gateway on this port fails, and says so
                ("grpc.max_receive_message_length", self._config.max_message_bytes),
                ("grpc.keepalive_time_ms", 30_000),  # notices a client whose machine is gone
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ]
        )
        server.add_generic_rpc_handlers(self._handlers())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (INFERENCE, ADMIN, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        streamed, unary = self._methods.streamed, self._methods.unary
        inference = {
            "Chat": streamed("Chat", self._generate, ChatRequest),
            "ChatOnce": unary("ChatOnce", self._whole, ChatRequest),
            "Complete": streamed("Complete", self._generate, CompleteRequest),
            "CompleteOnce": unary("CompleteOnce", self._whole, CompleteRequest),
            "Tokenize": unary("Tokenize", self._tokenize, TokenizeRequest),
            "ListModels": unary("ListModels", self._list_models, ListModelsRequest),
        }
        admin = {"GetStatus": unary("GetStatus", self._get_status, GetStatusRequest)}
        return [
            grpc.method_handlers_generic_handler(INFERENCE, inference),
            grpc.method_handlers_generic_handler(ADMIN, admin),
        ]

    def _listen(self) -> int:
        address = f"{self._config.host}:{self._config.port}"
        try:
            return self._server.add_insecure_port(address)
        except RuntimeError:
            raise PortTaken(
                f"Another process listens on {address}; choose another gateway.port."
            ) from None


# The replica


class GatewayReplica:
    """A gateway in a Serve replica, on the replica's own asyncio loop."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Mapping[str, Any], secret: bytes, decoder: Any
    ) -> None:
        config = Config.from_dict(settings)
        with reporting(config.state_dir, "gateway") as reporter:
            model_dir = resolve_model(config.model_source)
            tokenizer = await asyncio.to_thread(Tokenizer.load, model_dir)
            registry = CollectorRegistry()
            gateway = Gateway(
                config.gateway,
                tokenizer,
                lambda: find_decoder(decoder),
                secret,
                Metrics(registry),
                await bind(lambda: serve_metrics(config.gateway, registry), BIND_DEADLINE_S),
                BIND_DEADLINE_S,
                ScrapeTargets(config.state_dir, config.gateway.host).update,
            )
            await gateway.start()
            self._gateway = gateway
            reporter.listening(f"{config.gateway.host}:{gateway.port}")

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if (problem := self._gateway.problem()) is not None:
            raise Unavailable(problem)

    async def __del__(self) -> None:
        if hasattr(self, "_gateway"):
            await self._gateway.stop()


def serve_metrics(config: GatewayConfig, registry: CollectorRegistry) -> int:
    """The port of /metrics; 0 where the configuration wants none."""
    if config.metrics_port is None:
        return 0
    return start_metrics_server(config.host, config.metrics_port, registry).port


async def bind(listen: Callable[[], int], deadline_s: float) -> int:
    """The port that `listen` takes, in the end: a gateway that is being replaced may still hold it.

    Raises PortTaken.
    """
    give_up_at = time.monotonic() + deadline_s
    while True:
        try:
            return listen()
        except PortTaken:
            if time.monotonic() > give_up_at:
                raise
        await asyncio.sleep(0.5)


def find_decoder(decoder: Any) -> Endpoint:
    """Ask Serve where the decoder is; `decoder` is its DeploymentHandle."""
    try:
        answers = decoder.broadcast("endpoint").results(timeout_s=2.0, return_exceptions=True)
    except Exception as error:  # Ray's own: no replica yet, a dead one, the controller is away
        raise LinkError(f"Serve knows no decoder ({type(error).__name__}).") from None
    for answer in answers:
        if isinstance(answer, dict):
            return Endpoint.from_dict(answer)
    raise LinkError("The decoder doesn't answer.")
