"""The gateway: gRPC with `briolette.v1`, health and reflection on one port, HTTP on another.

A plain asyncio server, so that a test can run it without Ray.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
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
from deployments.gateway.calls.answers import Answers
from deployments.gateway.calls.conversations import Conversations
from deployments.gateway.calls.remote_decoder import RemoteDecoder
from deployments.gateway.calls.request_log import RequestLog
from deployments.gateway.calls.tenant_threads import TenantThreads
from deployments.gateway.http.page_api import page_api_router, page_router
from deployments.gateway.http.server import HttpServer, make_app
from deployments.gateway.openai.routes import openai_router
from deployments.gateway.services import admin, health, inference, sessions
from deployments.gateway.services.admin import Admin
from deployments.gateway.services.health import Health
from deployments.gateway.services.inference import Inference
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


class Gateway:
    """Serves `briolette.v1`'s services, health and reflection, and OpenAI's dialect over HTTP.

    Runs on the asyncio loop that calls `start()`.
    """

    def __init__(
        self,
        config: GatewayConfig,
        tokenizer: Tokenizer,
        find_decoder: Callable[[], Endpoint],
        secret: bytes,
        metrics: Metrics,
        metrics_port: int = 0,
        bind_deadline_s: float = 0.0,
        on_status: Callable[[ClusterStatus], None] = lambda status: None,
        kept: Sessions | None = None,
        admission: Admission | None = None,
        local_socket: Path | None = None,
        usage: UsageBooks | None = None,
        log_dir: Path | None = None,
    ) -> None:
        """`metrics_port` is where they are shown, for the status; 0 for nowhere.

        `on_status` is told what clients are, whenever that is new. `kept` are the sessions, where
        there is a store. Without an `admission` everybody is one tenant. `local_socket` is where
        this machine's own commands connect without TLS. Without `usage` it is counted in memory
        only; `log_dir` is for the log of requests. Raises ConfigError for TLS files that can't be
        used.
        """
        self.port = config.port
        self.http_port = config.http_port
        self._config = config
        self._part = Part(pid=os.getpid(), device="cpu", metrics_port=metrics_port)
        self._bind_deadline_s = bind_deadline_s
        self._tell_status = on_status
        self._metrics = metrics
        self._usage = UsageService(usage or UsageBooks(None))
        self._requests = RequestLog(metrics, log_dir)
        self._decoder = RemoteDecoder(find_decoder, secret, self._on_status, self._usage.count)
        self._health = Health(inference.NAME)
        self._local_socket = local_socket
        self._credentials = server_credentials(config)
        self._admission = admission or OpenAdmission()
        self._encoding = TenantThreads("encoding", num_threads=16, num_each=4, max_waiting=1024)
        self._conversations = Conversations(kept, self._decoder, tokenizer, self._encoding)
        answers = Answers(self._decoder, tokenizer, self._conversations, self._encoding)
        self._admin = Admin(self._status, self._admission.tenants, self._usage)
        session_service = SessionService(self._conversations, self._decoder)
        self._server = self._make_server(
            Methods(self._admission, self._requests),
            Inference(answers),
            session_service,
            self._admin,
        )
        self._http: HttpServer | None = None
        if config.http_port is not None:
            routers = [
                openai_router(answers),
                page_router(),
                page_api_router(self._admin, session_service, self._conversations),
            ]
            app = make_app(config, self._admission, self._requests, self._status, routers)
            self._http = HttpServer(app, config.host, config.http_port, server_context(config))

    async def start(self) -> None:
        """Bind and serve. Raises PortTaken."""
        await self._health.start()
        self.port = await bind(self._listen, self._bind_deadline_s)
        if self._http is not None:
            listener = await bind(self._http.listen, self._bind_deadline_s)
            self.http_port = listener.getsockname()[1]
            await self._http.start(listener)
        if self._local_socket is not None:
            self._server.add_insecure_port(f"unix:{self._local_socket}")
        await self._server.start()
        self._decoder.connect()

    @property
    def base_url(self) -> str | None:
        """Of HTTP, as OpenAI's clients want it; None where there is none."""
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
        self._conversations.close()
        self._encoding.close()
        self._admin.close()
        await asyncio.to_thread(self._admission.close)
        await asyncio.to_thread(self._usage.close)
        self._requests.close()

    def _on_status(self) -> None:
        status = self._decoder.status
        self._health.show(status.ready)
        if status.model:
            self._metrics.gateway_ready(status.model).set(status.ready)
        self._tell_status(self._status())

    def _status(self) -> ClusterStatus:
        """The decoder's, and where this gateway runs."""
        status = ClusterStatus()
        status.CopyFrom(self._decoder.status)
        status.gateway.CopyFrom(self._part)
        return status

    def _make_server(
        self, methods: Methods, *services: Inference | SessionService | Admin
    ) -> grpc.aio.Server:
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
        server.add_generic_rpc_handlers([service.handler(methods) for service in services])
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


async def bind(listen: Callable[[], T], deadline_s: float) -> T:
    """What `listen` takes, in the end: a gateway that is being replaced may still hold it.

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
