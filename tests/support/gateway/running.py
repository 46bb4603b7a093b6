"""Run a gateway on free ports for a test, and ask whether it serves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from cluster.config import GatewayConfig
from cluster.errors import LinkError
from cluster.links.connect import Endpoint
from cluster.metrics import Metrics
from cluster.tenants.admission import Admission, OpenAdmission
from cluster.tenants.sessions import Sessions
from cluster.tenants.usage import UsageBooks
from deployments.gateway.gateway import Gateway, GatewayParts
from engine.text.tokenizer import Tokenizer
from tests.support.gateway.fake_decoder import SECRET


@contextmanager
def running_gateway(
    tokenizer: Tokenizer,
    find: Callable[[], Endpoint],
    kept: Sessions | None = None,
    registry: CollectorRegistry | None = None,
    admission: Admission | None = None,
    local_socket: Path | None = None,
    log_dir: Path | None = None,
    usage: UsageBooks | None = None,
    **config: Any,
) -> Iterator[Gateway]:
    """A gateway on a free port, on an asyncio loop in a thread."""
    metrics = Metrics(registry or CollectorRegistry())
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> Gateway:
        settings = GatewayConfig(**{"port": 0, "http_port": 0, **config})
        parts = GatewayParts(
            tokenizer=tokenizer,
            find_decoder=find,
            secret=SECRET,
            metrics=metrics,
            admission=admission or OpenAdmission(),
            sessions=kept,
            log_dir=log_dir,
            local_socket=local_socket,
            usage_books=usage or UsageBooks(None),
        )
        gateway = Gateway(settings, parts)
        await gateway.start()
        return gateway

    try:
        gateway = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        try:
            yield gateway
        finally:
            asyncio.run_coroutine_threadsafe(gateway.stop(0.0), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def serving(gateway: Gateway) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def no_decoder() -> Endpoint:
    raise LinkError("There is no decoder.")
