"""The sides of the gateway's bench: the engine alone, gRPC and HTTP, and another ingress."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc

from bench.lib import http_load
from bench.lib.http_load import Connection
from bench.lib.models import DEMO_DIR, BenchModel, random_prompts
from bench.lib.ours import InProcess
from protos.briolette.v1.inference_pb2 import CompleteRequest, Sampling, TokenIds
from protos.briolette.v1.inference_pb2_grpc import InferenceStub

MODEL = BenchModel("demo", DEMO_DIR)
PROMPT_TOKENS = 32
NUM_CLIENTS = 16  # that ask for one token at once, again and again


class Side(Protocol):
    """Something that writes tokens."""

    def stream(self, prompt: list[int], num_tokens: int) -> list[float]:
        """When each token came, in seconds from the request."""


class Load(Protocol):
    """Something that answers NUM_CLIENTS clients."""

    async def requests_per_s(self, seconds: float) -> float:
        """How many requests it answers in a second."""


class Engine:
    """The engine alone, in this process."""

    def __init__(self, system: InProcess) -> None:
        self._system = system

    def stream(self, prompt: list[int], num_tokens: int) -> list[float]:
        return list(self._system.generate([prompt], num_tokens).token_times[0])


class OverGrpc:
    """The whole gateway, through its gRPC."""

    def __init__(self, address: str) -> None:
        self._target = address
        host, _, port = address.rpartition(":")
        self.address = host, int(port)
        self._stub = InferenceStub(grpc.insecure_channel(address))

    def stream(self, prompt: list[int], num_tokens: int) -> list[float]:
        started, times = time.perf_counter(), list[float]()
        for piece in self._stub.Complete(_request(prompt, num_tokens), timeout=60.0):
            times += [time.perf_counter() - started] * len(piece.token_ids)
        return times

    async def requests_per_s(self, seconds: float) -> float:
        (prompt,) = random_prompts(MODEL, 1, PROMPT_TOKENS, seed=0)
        request, num_done = _request(prompt, 1), 0
        async with grpc.aio.insecure_channel(self._target) as channel:
            stub: Any = InferenceStub(channel)
            give_up_at = time.perf_counter() + seconds

            async def ask_again() -> None:
                nonlocal num_done
                while time.perf_counter() < give_up_at:
                    await stub.CompleteOnce(request)
                    num_done += 1

            started = time.perf_counter()
            await asyncio.gather(*(ask_again() for _ in range(NUM_CLIENTS)))
            return num_done / (time.perf_counter() - started)


class OverHttp:
    """The whole gateway, through OpenAI's HTTP."""

    def __init__(self, base_url: str, runner: asyncio.Runner) -> None:
        url = urlsplit(base_url)
        self.address = url.hostname or "", url.port or 0
        self._runner = runner

    def stream(self, prompt: list[int], num_tokens: int) -> list[float]:
        return self._runner.run(self._stream(prompt, num_tokens))

    async def _stream(self, prompt: list[int], num_tokens: int) -> list[float]:
        connection = await Connection.open(*self.address)
        times = await connection.event_times(_post(prompt, num_tokens, stream=True))
        connection.close()
        return times

    async def requests_per_s(self, seconds: float) -> float:
        (prompt,) = random_prompts(MODEL, 1, PROMPT_TOKENS, seed=0)
        request = _post(prompt, 1, stream=False)
        return await http_load.requests_per_s(*self.address, request, NUM_CLIENTS, seconds)


class Ingress:
    """Ray Serve's HTTP proxy and one replica."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def requests_per_s(self, seconds: float) -> float:
        request = http_load.get("/")
        return await http_load.requests_per_s(
            "127.0.0.1", self._port, request, NUM_CLIENTS, seconds
        )


def _request(prompt: list[int], num_tokens: int) -> CompleteRequest:
    sampling = Sampling(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return CompleteRequest(token_ids=TokenIds(ids=prompt), sampling=sampling)


def _post(prompt: list[int], num_tokens: int, stream: bool) -> bytes:
    return http_load.post(
        "/v1/completions",
        {
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        },
    )
