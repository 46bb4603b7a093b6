"""What the gateway's bench measures with; no speed is asserted."""

from __future__ import annotations

import asyncio

import pytest

from bench.lib import http_load
from bench.lib.http_load import Connection, get, post, requests_per_s
from bench.team import gateway_cost
from bench.team.gateway_cost import Beside
from bench.team.silent import num_open, silent_connections
from protos.briolette.v1.inference_pb2 import Generation
from tests.support.gateway.http_server import running_server
from tests.support.gateway.scripted_backend import END, ScriptedBackend

SIDES = ("engine", "gRPC", "HTTP")
CHAT = {"messages": [{"role": "user", "content": "a"}]}


def test_a_load_and_a_stream() -> None:
    answers = ScriptedBackend()
    answers.script = [Generation(text="a"), 0.05, Generation(text="b"), END]

    async def measure(port: int) -> None:
        rate = await requests_per_s("127.0.0.1", port, post("/v1/chat/completions", CHAT), 2, 0.3)
        assert 0 < rate <= 2 / 0.05
        connection = await Connection.open("127.0.0.1", port)
        request = post("/v1/chat/completions", {**CHAT, "stream": True})
        first, second, _ = await connection.event_times(request)
        assert second - first >= 0.04
        assert len(await connection.event_times(request)) == 3  # the connection is kept
        with pytest.raises(RuntimeError, match="404"):
            await connection.ask(get("/nothing"))
        connection.close()

    with running_server(answers) as address:
        asyncio.run(measure(int(address.rpartition(":")[2])))


def test_silent_connections_are_held_and_counted() -> None:
    with running_server(ScriptedBackend()) as address:
        with silent_connections("127.0.0.1", int(address.rpartition(":")[2]), 20) as held:
            assert (len(held), num_open(held)) == (20, 20)
        assert all(connection.fileno() == -1 for connection in held)


def test_results_and_checks() -> None:
    gaps = {name: [0.001 * (i + 1)] * 100 for i, name in enumerate(SIDES)}
    rates = {"gRPC": [200.0, 300.0], "HTTP": [100.0, 50.0], "Serve's ingress": [100.0, 100.0]}
    results = gateway_cost.latency_results({"gap": gaps, "single": gaps}, rates)
    assert results["gap"]["HTTP"]["added_p50_us"] == 2000
    assert results["requests_per_s"]["gRPC"] == 250.0
    beside = {
        "gRPC": [Beside(10_000, [0.0109] * 9, [0.01] * 9)] * 3,
        "HTTP": [Beside(99, [0.0111] * 9, [0.01] * 9), Beside(10_000, [0.012] * 9, [0.01] * 9)],
    }
    verdicts = [check.ok for check in gateway_cost.make_checks(rates, beside)]
    assert verdicts == [True, False, True, True, False, False]
    shown = gateway_cost.silent_results(beside)
    assert (shown["silent"]["HTTP"]["held"], shown["alone"]["HTTP"]["p50_us"]) == (99, 10_000)
    assert shown["silent"]["gRPC"] == {"held": 10_000, "p50_us": 10_900, "p99_us": 10_900}


def test_the_clients_requests_are_whole() -> None:
    head, _, body = http_load.post("/x", {"a": 1}).partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
