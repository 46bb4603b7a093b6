"""The HTTP server alone, on a port, in front of a scripted backend."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from cluster.config import GatewayConfig
from cluster.metrics import Metrics
from cluster.tenants.admission import Admission, OpenAdmission
from deployments.gateway.calls.request_log import RequestLog
from deployments.gateway.http.server import HttpServer, make_app
from deployments.gateway.openai.routes import BODIES, openai_router
from protos.briolette.v1.admin_pb2 import ClusterStatus
from tests.support.gateway.scripted_backend import ScriptedBackend


@contextmanager
def running_server(
    backend: ScriptedBackend,
    admission: Admission | None = None,
    registry: CollectorRegistry | None = None,
    grace_s: float = 0.0,
) -> Iterator[str]:
    """Its address, as http://127.0.0.1:port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    config, metrics = GatewayConfig(), Metrics(registry or CollectorRegistry())
    admission, status = admission or OpenAdmission(), ClusterStatus(ready=True)
    app = make_app(
        config,
        admission=admission,
        request_log=RequestLog(metrics, None),
        status=lambda: status,
        routers=[openai_router(backend.inference())],
        bodies=BODIES,
    )
    server = HttpServer(app, "127.0.0.1", 0, None)
    listener = server.listen()
    asyncio.run_coroutine_threadsafe(server.start(listener), loop).result(10)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(grace_s), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
