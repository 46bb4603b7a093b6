"""A decoder and its preprocessor by script: what a test writes down is what every request gets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.errors import BrioletteError
from deployments.gateway.calls.chat_sessions import ChatSessions
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.calls.inference import Inference
from deployments.gateway.calls.remote_decoder import DecoderRequest
from deployments.gateway.calls.tenant_threads import TenantThreads
from protos.briolette.v1.admin_pb2 import ClusterStatus
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_STOP,
    ChatRequest,
    CompleteRequest,
    Generation,
    Usage,
)
from protos.briolette.v1.stream_pb2 import Add, Output

END = Generation(
    finish_reason=FINISH_REASON_STOP, usage=Usage(prompt_tokens=7, output_tokens=3, cached_tokens=4)
)
Script = Sequence[Generation | BrioletteError | float]  # a float is a pause


class ScriptedBackend:
    """In place of `RemoteDecoder`, `Preprocessor` and tokenizer: keeps what it is asked."""

    def __init__(self, script: Script = (END,)) -> None:
        self.script = script  # of every answer, which also ends where the script ends
        self.status = ClusterStatus(ready=True, model="scripted", context_tokens=512)
        self.requests: list[ChatRequest | CompleteRequest] = []
        self.adds: list[Add] = []  # one for each answer
        self.num_running = 0

    def inference(self) -> Inference:
        """Return what the dialects offer, with this behind it."""
        this: Any = self
        threads = TenantThreads("encoding", num_threads=1, num_each=1, max_waiting=1)
        return Inference(this, this, ChatSessions(None, this, this, threads))

    async def prepare(
        self, request: ChatRequest | CompleteRequest, _call: ClientCall, _turn: object
    ) -> DecoderRequest:
        self.requests.append(request)
        return DecoderRequest(Add(sampling=request.sampling), [])

    @contextmanager
    def generate(self, requests: Sequence[DecoderRequest]) -> Iterator[ScriptedOutputs]:
        adds = [add for add, _ in requests]
        self.adds += adds
        self.num_running += len(adds)
        try:
            yield ScriptedOutputs({add.request_id: iter(self.script) for add in adds})
        finally:
            self.num_running -= len(adds)

    @property
    def tokenizer(self) -> ScriptedBackend:
        return self

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode()


class ScriptedOutputs:
    """In place of an `OutputCollector`: a step of each answer's script in turn."""

    def __init__(self, running: dict[str, Iterator[Generation | BrioletteError | float]]) -> None:
        self._running = running

    async def take(self) -> Output:
        while True:
            request_id = next(iter(self._running))
            steps = self._running.pop(request_id)
            step = next(steps, END)
            if isinstance(step, BrioletteError):
                raise step
            self._running[request_id] = steps
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                return Output(request_id=request_id, generation=step)
