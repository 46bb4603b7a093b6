"""The gateway: gRPC with `briolette.v1`, health and reflection on one port, HTTP on another.

A plain asyncio server, so that a test can run it without Ray.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc
from grpc_reflection.v1alpha import reflection

from cluster.config import GatewayConfig
from cluster.errors import PortTaken
from cluster.links.connect import Endpoint
from cluster.metrics import Metrics
from cluster.tenants.admission import Admission, OpenAdmission
from cluster.tenants.sessions import Sessions
from cluster.tenants.usage import UsageBooks
from deployments.gateway.calls.chat_sessions import ChatSessions
from deployments.gateway.calls.inference import Inference
from deployments.gateway.calls.preprocessor import Preprocessor
from deployments.gateway.calls.remote_decoder import RemoteDecoder
from deployments.gateway.calls.request_log import RequestLog
from deployments.gateway.calls.tenant_threads import TenantThreads
from deployments.gateway.http.page_api import page_api_router, page_router
from deployments.gateway.http.server import HttpServer, make_app
from deployments.gateway.openai.routes import BODIES, openai_router
from deployments.gateway.services import admin, health, inference, sessions
from deployments.gateway.services.admin import Admin
from deployments.gateway.services.health import Health
from deployments.gateway.services.inference import inference_handler
from deployments.gateway.services.rpc import Methods
from deployments.gateway.services.sessions import SessionService
from deployments.gateway.services.usage import UsageService
from deployments.gateway.tls import server_context, server_credentials
from deployments.process.open_files import GRPC_PART, raise_limit
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.admin_pb2 import ClusterStatus, Part

MAX_STREAMS = 1000  # calls at a time on one connection; more wait in the client
IDLE_S = 60.0  # a connection without calls is closed; a client opens another one by itself
HANDSHAKE_S = 10.0  # a connection that hasn't said by then that it speaks HTTP/2 is closed
PING_S = 30.0  # of a client that says nothing during a call
PONG_S = 20.0  # without an answer its machine is gone
SETTLE_S = 1.0  # at the end, until what was cut short is counted

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayParts:
    """What a gateway is put together from.

    Attributes:
        tokenizer: the served model's.
        find_decoder: returns the decoder's endpoint or raises LinkError; runs in a thread.
        secret: proves to the decoder that the gateway belongs to the cluster.
        metrics: counts calls.
        metrics_port: where they are shown, for the status; 0 for nowhere.
        admission: who is let in; by default everybody, as one tenant.
        sessions: where sessions are kept; None without a store.
        usage_books: where usage is counted; by default in memory only.
        log_dir: folder of the request log; None for none.
        local_socket: where this machine's own commands connect without TLS.
        on_status: called with each new status, as clients see it.
    """

    tokenizer: Tokenizer
    find_decoder: Callable[[], Endpoint]
    secret: bytes
    metrics: Metrics
    metrics_port: int = 0
    admission: Admission = field(default_factory=OpenAdmission)
    sessions: Sessions | None = None
    usage_books: UsageBooks = field(default_factory=lambda: UsageBooks(None))
    log_dir: Path | None = None
    local_socket: Path | None = None
    on_status: Callable[[ClusterStatus], None] = lambda status: None


class Gateway:
    """Serves `briolette.v1`'s services, health and reflection, and OpenAI's dialect over HTTP.

    Runs on the asyncio loop that calls `start()`.
    """

    def __init__(
        self, config: GatewayConfig, parts: GatewayParts, *, bind_timeout_s: float = 0.0
    ) -> None:
        """Put the parts together.

        Args:
            config: addresses, TLS files, limits.
            parts: what the gateway is put together from.
            bind_timeout_s: how long to try for a port that another gateway still holds.

        Raises:
            ConfigError: TLS files can't be used.
        """
        self.port = config.port
        self.http_port = config.http_port
        self._config = config
        self._parts = parts
        self._bind_timeout_s = bind_timeout_s
        self._own_part = Part(pid=os.getpid(), device="cpu", metrics_port=parts.metrics_port)
        self._usage = UsageService(parts.usage_books)
        self._request_log = RequestLog(parts.metrics, parts.log_dir)
        self._decoder = RemoteDecoder(
            parts.find_decoder, parts.secret, self._on_status, self._usage.count
        )
        self._health = Health(inference.NAME)
        self._credentials = server_credentials(config)
        self._encoding = TenantThreads("encoding", num_threads=16, num_each=4, max_waiting=1024)
        self._sessions = ChatSessions(
            parts.sessions, self._decoder, parts.tokenizer, self._encoding
        )
        preprocessor = Preprocessor(self._decoder, parts.tokenizer, self._encoding)
        generation = Inference(self._decoder, preprocessor, self._sessions)
        self._admin = Admin(self._status, parts.admission.tenants, self._usage)
        session_service = SessionService(self._sessions, self._decoder)
        methods = Methods(parts.admission, self._request_log)
        self._server = self._make_server(
            inference_handler(generation, methods),
            session_service.handler(methods),
            self._admin.handler(methods),
        )
        self._http: HttpServer | None = None
        if config.http_port is not None:
            app = make_app(
                config,
                admission=parts.admission,
                request_log=self._request_log,
                status=self._status,
                routers=[
                    openai_router(generation),
                    page_api_router(self._admin, session_service, self._sessions),
                ],
                open_routers=[page_router()],
                bodies=BODIES,
            )
            self._http = HttpServer(app, config.host, config.http_port, server_context(config))

    async def start(self) -> None:
        """Bind and serve. Raises PortTaken."""
        await self._health.start()
        self.port = await bind(self._listen, self._bind_timeout_s)
        if self._http is not None:
            listener = await bind(self._http.listen, self._bind_timeout_s)
            self.http_port = listener.getsockname()[1]
            await self._http.start(listener)
        if self._parts.local_socket is not None:
            self._server.add_insecure_port(f"unix:{self._parts.local_socket}")
        await self._server.start()
        self._decoder.connect()

    @property
    def base_url(self) -> str | None:
        """The URL for OpenAI's clients; None without HTTP."""
        if self.http_port is None:
            return None
        scheme = "http" if self._config.tls_cert_file is None else "https"
        return f"{scheme}://{self._config.host}:{self.http_port}/v1"

    def problem(self) -> str | None:
        """Why a started gateway should be replaced; None while it is well."""
        return self._decoder.problem()

    async def stop(self, grace_s: float = 5.0) -> None:
        """Say NOT_SERVING, let streams end for a while, stop."""
        await self._health.end()
        ends = [self._server.stop(grace_s)]
        if self._http is not None:
            ends.append(self._http.stop(grace_s))
        await asyncio.gather(*ends)
        await self._decoder.settle(SETTLE_S)
        self._decoder.close()
        self._sessions.close()
        self._encoding.close()
        self._admin.close()
        await asyncio.to_thread(self._parts.admission.close)
        await asyncio.to_thread(self._usage.close)
        self._request_log.close()

    def _on_status(self) -> None:
        status = self._decoder.status
        self._health.show(status.ready)
        if status.model:
            self._parts.metrics.gateway_ready(status.model).set(status.ready)
        self._parts.on_status(self._status())

    def _status(self) -> ClusterStatus:
        """Return the decoder's status, with this gateway's own part."""
        status = ClusterStatus()
        status.CopyFrom(self._decoder.status)
        status.gateway.CopyFrom(self._own_part)
        return status

    def _make_server(self, *handlers: grpc.GenericRpcHandler) -> grpc.aio.Server:
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # a second gateway on this port fails, and says so
                ("grpc.max_receive_message_length", self._config.max_message_bytes),
                ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_S * 1000)),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
                ("grpc.max_connection_idle_ms", int(IDLE_S * 1000)),
                ("grpc.max_allowed_incoming_connections", int(raise_limit() * GRPC_PART)),
                ("grpc.keepalive_time_ms", int(PING_S * 1000)),
                ("grpc.keepalive_timeout_ms", int(PONG_S * 1000)),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ]
        )
        server.add_generic_rpc_handlers(handlers)
        self._health.add_to(server)
        names = (
            inference.NAME,
            sessions.NAME,
            admin.NAME,
            health.NAME,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, server)
        return server

    def _listen(self) -> int:
        address = f"{self._config.host}:{self._config.port}"
        try:
            if self._credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, self._credentials)
        except RuntimeError:
            raise PortTaken(
                f"Another process listens on {address}; choose another gateway.port."
            ) from None


async def bind(listen: Callable[[], T], timeout_s: float) -> T:
    """Return what `listen` takes, trying again while a gateway that is replaced may hold it.

    Raises PortTaken.
    """
    give_up_at = time.monotonic() + timeout_s
    while True:
        try:
            return listen()
        except PortTaken:
            if time.monotonic() > give_up_at:
                raise
        await asyncio.sleep(0.5)
