"""The HTTP server beside gRPC, on the gateway's asyncio loop: its app, its port, its end."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable, Iterable
from functools import partial

import uvicorn
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.responses import JSONResponse

from cluster.config import GatewayConfig
from cluster.errors import ConfigError, PortTaken
from cluster.tenants.admission import Admission
from deployments.gateway.calls.request_log import RequestLog
from deployments.gateway.http.body import publish_bodies
from deployments.gateway.http.call_middleware import CallMiddleware
from deployments.gateway.http.connections import HEAD_S, BoundedConnection, Connections
from deployments.gateway.http.errors import handle_errors
from deployments.gateway.http.outer_middleware import OuterMiddleware, own_names
from deployments.process.open_files import HTTP_PART, raise_limit
from protos.briolette.v1.admin_pb2 import ClusterStatus

BACKLOG = 4096  # connections that may wait to be taken
SEND_BYTES = 128 << 10  # in the kernel for a client: with more, slow ones would look stalled
DEAD_AFTER_S = 30  # a client's machine that acknowledges nothing


class HttpServer:
    """Serves routers on one port. Runs on the asyncio loop that calls `start()`."""

    def __init__(self, app: FastAPI, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self._address = host, port
        self._tls = tls
        self._config = uvicorn.Config(
            app,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # bytes that are no HTTP are the client's affair
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=int(HEAD_S),
        )
        self._connections = Connections(int(raise_limit() * HTTP_PART))
        self._server: asyncio.Server | None = None

    def listen(self) -> socket.socket:
        """Take the port. Raises PortTaken."""
        return listening_socket(*self._address)

    async def start(self, listener: socket.socket) -> None:
        """Serve whoever connects."""
        self._server = await asyncio.get_running_loop().create_server(
            partial(BoundedConnection, self._config, self._connections),
            sock=listener,
            backlog=BACKLOG,
            ssl=self._tls,
            ssl_handshake_timeout=HEAD_S if self._tls else None,
        )

    async def stop(self, grace_s: float) -> None:
        """Take no more, let answers end for a while, stop."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._connections.connections):
            connection.shutdown()
        tasks = set(self._connections.tasks)
        if tasks and grace_s:
            await asyncio.wait(tasks, timeout=grace_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self._connections.connections):
            connection.transport.abort()


def make_app(
    config: GatewayConfig,
    *,
    admission: Admission,
    request_log: RequestLog,
    status: Callable[[], ClusterStatus],
    routers: Iterable[APIRouter],
    open_routers: Iterable[APIRouter] = (),
    bodies: Iterable[type[BaseModel]] = (),
) -> FastAPI:
    """Return what the HTTP port serves, with /healthz and /openapi.json.

    Args:
        config: limits, and the host for which calls are taken.
        admission: who is let in.
        request_log: is told of every call to `routers`.
        status: returns the cluster's status, for /healthz.
        routers: need a key; each has the whole path in its own prefix.
        open_routers: need none.
        bodies: models of the bodies that routes take by `json_body`.
    """
    # The pages that FastAPI offers load scripts from elsewhere.
    app = FastAPI(title="Briolette", docs_url=None, redoc_url=None)
    routers = list(routers)
    app.add_middleware(
        CallMiddleware,
        routes=[route for router in routers for route in router.routes],
        admission=admission,
        request_log=request_log,
        max_body_bytes=config.max_message_bytes,
    )
    names = own_names(config.host) if admission.is_open else None
    app.add_middleware(OuterMiddleware, own_names=names)  # the last one added is outermost
    handle_errors(app)
    for router in (health_router(status), *open_routers, *routers):
        app.include_router(router)
    publish_bodies(app, bodies)
    return app


def health_router(status: Callable[[], ClusterStatus]) -> APIRouter:
    """Return the router of /healthz, which answers 200 only while a token can be produced."""
    router = APIRouter()

    @router.get("/healthz", include_in_schema=False)
    async def healthz() -> JSONResponse:
        now = status()
        if now.ready:
            return JSONResponse({"status": "SERVING"})
        return JSONResponse({"status": "NOT_SERVING", "reason": now.reason}, 503)

    return router


def listening_socket(host: str, port: int) -> socket.socket:
    """Taken connections inherit what is set here. Raises PortTaken, ConfigError."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_AFTER_S)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_AFTER_S // 3)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER_S * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"Another process listens on {host}:{port}; choose another gateway.http_port."
            ) from None
        raise ConfigError(f"HTTP can't listen on {host}:{port}: {error.strerror}.") from None
    return listener
