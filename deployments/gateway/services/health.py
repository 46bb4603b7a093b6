"""Standard gRPC health that tells the truth: SERVING only while a token can be produced."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

NAME: str = health.SERVICE_NAME
STATES = health_pb2.HealthCheckResponse.ServingStatus


class Health:
    """The state of the whole server (the empty name) and of one service."""

    def __init__(self, service: str) -> None:
        self._names = ("", service)
        self._servicer = health.aio.HealthServicer()
        self._is_serving = False
        self._tasks: set[asyncio.Future[None]] = set()  # asyncio itself keeps no reference

    def add_to(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """NOT_SERVING, before anybody can ask."""
        await self._tell()

    def show(self, is_serving: bool) -> None:
        """Tell who asks and who watches. Called on the server's asyncio loop."""
        if is_serving != self._is_serving:
            self._is_serving = is_serving
            task = asyncio.ensure_future(self._tell())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        """NOT_SERVING from now on, whatever is shown."""
        await self._servicer.enter_graceful_shutdown()

    async def _tell(self) -> None:
        for name in self._names:
            await self._servicer.set(
                name, STATES.SERVING if self._is_serving else STATES.NOT_SERVING
            )
