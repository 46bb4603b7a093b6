"""The HTTP server alone, on a port, with answers that a test writes down."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from cluster.config import GatewayConfig
from cluster.errors import BrioletteError
from cluster.metrics import Metrics
from cluster.tenants.admission import Admission, OpenAdmission
from deployments.gateway.calls.answers import Prepared
from deployments.gateway.calls.call import Call
from deployments.gateway.calls.request_log import RequestLog
from deployments.gateway.http.server import HttpServer, make_app
from deployments.gateway.openai.routes import openai_router
from protos.briolette.v1.admin_pb2 import ClusterStatus
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_STOP,
    ChatRequest,
    CompleteRequest,
    Generation,
    ListModelsRequest,
    ListModelsResponse,
    Model,
    Usage,
)
from protos.briolette.v1.stream_pb2 import Add

END = Generation(
    finish_reason=FINISH_REASON_STOP, usage=Usage(prompt_tokens=7, output_tokens=3, cached_tokens=4)
)


class ScriptedAnswers:
    """In place of `Answers`: every request is answered by the script, and kept."""

    model = "scripted"

    def __init__(self) -> None:
        self.script: Sequence[Generation | BrioletteError | float] = [END]  # a float is a pause
        self.requests: list[ChatRequest | CompleteRequest] = []
        self.adds: list[Add] = []  # one for each answer
        self.calls: list[Call] = []
        self.num_running = 0

    async def generate(
        self, request: ChatRequest | CompleteRequest, call: Call
    ) -> AsyncGenerator[Generation, None]:
        async with aclosing(self.answer(await self.prepare(request, call), call)) as pieces:
            async for piece in pieces:
                yield piece

    async def prepare(self, request: ChatRequest | CompleteRequest, _: Call) -> Prepared:
        self.requests.append(request)
        return Prepared(Add(sampling=request.sampling), [])

    async def answer(self, prepared: Prepared, call: Call) -> AsyncGenerator[Generation, None]:
        self.adds.append(prepared.add)
        self.calls.append(call)
        self.num_running += 1
        try:
            for step in self.script:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            self.num_running -= 1

    async def list_models(self, _: ListModelsRequest, __: Call) -> ListModelsResponse:
        return ListModelsResponse(models=[Model(id=self.model, context_tokens=512)])

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


@contextmanager
def running_server(
    answers: Any,
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
        admission,
        RequestLog(metrics, None),
        lambda: status,
        [openai_router(answers)],
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
