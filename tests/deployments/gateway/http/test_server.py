"""The HTTP server: who may ask, what an error looks like, what never waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx2 as httpx
import pytest
from prometheus_client import CollectorRegistry

from cluster.errors import PortTaken, Unauthenticated
from cluster.tenants.admission import Lease, OpenAdmission, OpenLease
from deployments.gateway.gateway import Gateway
from deployments.gateway.http.event_stream import EventStreamResponse
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.inference_pb2 import Generation
from tests.support.gateway.fake_decoder import CONTEXT, Decoder, make_tokenizer
from tests.support.gateway.http_client import CHAT, is_closed, url
from tests.support.gateway.http_server import running_server
from tests.support.gateway.running import running_gateway, serving
from tests.support.gateway.scripted_backend import END, ScriptedBackend
from tests.support.waiting import wait_for

LONG = {**CHAT, "max_tokens": CONTEXT - 40}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture(scope="module")
def cluster(tokenizer: Tokenizer, registry: CollectorRegistry) -> Iterator[tuple[Decoder, Gateway]]:
    decoder = Decoder(tokenizer)
    with running_gateway(tokenizer, decoder.find, registry=registry) as gateway:
        wait_for(lambda: serving(gateway))
        yield decoder, gateway
    decoder.close()


@pytest.fixture
def decoder(cluster: tuple[Decoder, Gateway]) -> Iterator[Decoder]:
    decoder = cluster[0]
    yield decoder
    decoder.runner.step_s, decoder.ready = 0.0, True
    decoder.loop.wake()
    wait_for(lambda: not decoder.engine.has_work)
    wait_for(lambda: serving(cluster[1]))
    decoder.engine.check_integrity()


@pytest.fixture
def gateway(cluster: tuple[Decoder, Gateway], decoder: Decoder) -> Gateway:
    return cluster[1]


def connected(gateway: Gateway, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", gateway.http_port or 0), 5)
    connection.sendall(data)
    return connection


def post(body: bytes = b"", *headers: str) -> bytes:
    """The bytes of a chat request."""
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: 127.0.0.1", *headers]
    return "\r\n".join([*lines, "content-type: application/json", "", ""]).encode() + body


# What is there


def test_models(gateway: Gateway) -> None:
    answer = httpx.get(url(gateway, "/v1/models"))
    assert answer.status_code == 200
    assert [model["id"] for model in answer.json()["data"]] == ["counter"]
    assert httpx.get(url(gateway, "/v1/models/counter")).json()["max_model_len"] == CONTEXT
    unknown = httpx.get(url(gateway, "/v1/models/gpt/4"))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_health_follows_the_decoder(gateway: Gateway, decoder: Decoder) -> None:
    assert httpx.get(url(gateway, "/healthz")).json() == {"status": "SERVING"}
    decoder.ready = False
    decoder.loop.wake()
    wait_for(lambda: httpx.get(url(gateway, "/healthz")).status_code == 503)
    assert "group 2" in httpx.get(url(gateway, "/healthz")).json()["reason"]
    answer = httpx.post(url(gateway), json=CHAT)
    assert answer.status_code == 503 and "group 2" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] == "1"


def test_without_a_port_there_is_none(tokenizer: Tokenizer) -> None:
    decoder = Decoder(tokenizer)
    with running_gateway(tokenizer, decoder.find, http_port=None) as gateway:
        wait_for(lambda: serving(gateway))
        assert gateway.http_port is None
    decoder.close()


def test_a_taken_port_is_said(tokenizer: Tokenizer) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        decoder = Decoder(tokenizer)
        with (
            pytest.raises(PortTaken, match=f"{port}.*gateway.http_port"),
            running_gateway(tokenizer, decoder.find, http_port=port),
        ):
            pass
        decoder.close()


# Errors


@pytest.mark.parametrize(
    ("method", "path", "body", "status_code"),
    [
        ("GET", "/nothing", b"", 404),
        ("GET", "/v1/chat/completions", b"", 405),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "model": "\\ud800"}', 400),
        ("POST", "/v1/chat/completions", b'{"messages": []}', 400),
        ("POST", "/v1/chat/completions", b"", 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
    ],
)
def test_every_error_has_openais_form_and_an_id(
    gateway: Gateway, method: str, path: str, body: bytes, status_code: int
) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.request(method, url(gateway, path), content=body, headers=headers)
    assert answer.status_code == status_code
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert len(answer.headers["x-request-id"]) == 32
    assert "access-control-allow-origin" not in answer.headers


def test_a_bug_is_an_error_with_a_form_too(caplog: pytest.LogCaptureFixture) -> None:
    answers = ScriptedBackend()
    answers.script = [Generation(text="a"), 0.0, "no piece"]  # type: ignore[list-item]
    with running_server(answers) as address:
        whole = httpx.post(f"{address}/v1/chat/completions", json=CHAT)
        assert whole.status_code == 500 and "its log" in whole.json()["error"]["message"]
        assert whole.headers["x-request-id"]
        stream = httpx.post(f"{address}/v1/chat/completions", json={**CHAT, "stream": True})
        assert "event: error" in stream.text and "its log" in stream.text
    for answer in (whole, stream):
        assert f"request_id={answer.headers['x-request-id']}" in caplog.text


def test_a_body_that_is_too_long(tokenizer: Tokenizer) -> None:
    decoder = Decoder(tokenizer)
    with running_gateway(tokenizer, decoder.find, max_message_bytes=2000) as gateway:
        wait_for(lambda: serving(gateway))
        assert httpx.post(url(gateway), json=CHAT).status_code == 200
        answer = httpx.post(url(gateway), content=b" " * 3000)
        assert answer.status_code == 400 and "2,000 bytes" in answer.json()["error"]["message"]
        endless = connected(gateway, post(b"", "transfer-encoding: chunked"))
        endless.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")  # and no end
        wait_for(lambda: b"2,000 bytes" in endless.recv(4096))
    decoder.close()


# Who may ask


def test_only_this_machines_names_are_served_without_keys(gateway: Gateway) -> None:
    def status_code(**headers: str) -> int:
        return httpx.post(url(gateway), json=CHAT, headers=headers).status_code

    port = gateway.http_port
    assert status_code() == 200
    for host in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert status_code(host=host, origin=f"http://{host}") == 200
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "localhost@evil.example",
    ):
        assert status_code(host=host) == 403
    for origin in ("http://evil.example", f"https://evil.example:{port}", "null"):
        assert status_code(origin=origin) == 403
    text = httpx.post(url(gateway), content=httpx.Request("POST", url(gateway), json=CHAT).read())
    assert text.status_code == 400  # a page could send it without asking first
    assert "application/json" in text.json()["error"]["message"]


class KeysOnly(OpenAdmission):
    """An admission with one key."""

    is_open = False

    def admit(self, key: str | None) -> Lease:
        if key != "right":
            raise Unauthenticated("This call needs a key.")
        return OpenLease()


def test_keys_are_looked_at_before_the_body() -> None:
    with running_server(ScriptedBackend(), KeysOnly()) as address:

        def ask(headers: dict[str, str]) -> int:
            return httpx.post(
                f"{address}/v1/chat/completions", json=CHAT, headers=headers
            ).status_code

        assert ask({"authorization": "Bearer right", "host": "gateway.example"}) == 200
        assert ask({"authorization": "bearer  right"}) == 200
        assert ask({"authorization": "Bearer wrong"}) == ask({}) == 401
        assert ask({"authorization": "Basic right"}) == 401
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 5) as connection:
            connection.sendall(post(b"", "content-length: 1000000"))
            assert connection.recv(100).startswith(b"HTTP/1.1 401")
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert httpx.get(f"{address}/openapi.json").status_code == 200


# Counted


def test_calls_are_counted(gateway: Gateway, decoder: Decoder, registry: CollectorRegistry) -> None:
    def count(name: str, **labels: str) -> float:
        labels = {"tenant": "default", "method": "/v1/chat/completions", **labels}
        return registry.get_sample_value(f"briolette_gateway_{name}", labels) or 0.0

    done = count("requests_total", status="OK")
    refused = count("requests_total", status="NOT_FOUND")
    gone = count("aborted_total", reason="client")
    assert httpx.post(url(gateway), json=CHAT).status_code == 200
    assert httpx.post(url(gateway), json={**CHAT, "model": "x"}).status_code == 404
    decoder.runner.step_s = 0.01
    with httpx.stream("POST", url(gateway), json={**LONG, "stream": True}) as stream:
        pieces = stream.iter_bytes()
        next(pieces)
        assert count("streams") == 1
    wait_for(lambda: count("streams") == 0)
    assert count("requests_total", status="OK") == done + 1
    assert count("requests_total", status="NOT_FOUND") == refused + 1
    assert count("requests_total", status="CANCELLED") >= 1
    assert count("aborted_total", reason="client") == gone + 1


# Whoever is slow, silent or gone


def test_silent_and_endless_connections_are_closed(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.gateway.http.connections.HEAD_S", 0.3)
    silent = connected(gateway)
    slow = connected(gateway)
    served = connected(gateway, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
    deadline = time.monotonic() + 3
    while not is_closed(slow):
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError):
            slow.sendall(b"G")  # something, but never a request
        time.sleep(0.05)
    wait_for(lambda: is_closed(silent) and is_closed(served))
    endless = connected(gateway, b"GET / HTTP/1.1\r\nx: ")
    with contextlib.suppress(OSError):
        for _ in range(100):
            endless.sendall(b"x" * 10_000)
    wait_for(lambda: is_closed(endless))


def test_a_body_that_does_not_come(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.gateway.http.call_middleware.BODY_S", 0.2)
    connection = connected(gateway, post(b"{", "content-length: 100"))
    assert b"400" in connection.recv(12)
    wait_for(lambda: b"didn't arrive" in connection.recv(4096))


def test_requests_behind_each_other_on_one_connection(gateway: Gateway) -> None:
    request = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
    connection, said = connected(gateway, request * 5), b""
    while said.count(b'"object":"list"') < 5:
        said += connection.recv(4096)


def streaming(address: str) -> socket.socket:
    """A client with a small window that asks for a stream and has read nothing yet."""
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({**CHAT, "stream": True}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    connection.sendall(post(body, f"content-length: {len(body)}"))
    return connection


def test_a_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it was sent up to then doesn't keep the connection."""
    monkeypatch.setattr("deployments.gateway.http.connections.STALL_S", 0.3)
    answers, registry = ScriptedBackend(), CollectorRegistry()
    answers.script = [Generation(text="x" * 1_000_000)] * 20
    with running_server(answers, registry=registry) as address:
        connection = streaming(address)
        wait_for(lambda: answers.num_running == 1)
        wait_for(lambda: answers.num_running == 0, 10)
        labels = {"tenant": "default", "method": "/v1/chat/completions", "reason": "stalled"}
        wait_for(lambda: registry.get_sample_value("briolette_gateway_aborted_total", labels) == 1)
        answers.script = [Generation(text="a"), END]
        assert httpx.post(f"{address}/v1/chat/completions", json=CHAT).status_code == 200
        connection.close()


def test_a_client_that_reads_slowly_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow client lives as long as it takes something within the limit."""
    monkeypatch.setattr("deployments.gateway.http.connections.STALL_S", 0.3)
    answers = ScriptedBackend()
    answers.script = [Generation(text="x" * 1_000_000)] * 12 + [END]
    with running_server(answers) as address:
        connection, num_bytes, tail = streaming(address), 0, b""
        started = time.monotonic()
        while not tail.endswith(b"0\r\n\r\n"):
            data = connection.recv(200_000)
            assert data, "closed too early"
            tail = (tail + data)[-20:]
            num_bytes += len(data)
            time.sleep(0.01)
        assert num_bytes > 12_000_000 and time.monotonic() - started > 0.6
        connection.close()


def test_a_sign_of_life_and_an_event_never_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sending of each takes longer than it is until the next one."""
    monkeypatch.setattr("deployments.gateway.http.event_stream.HEARTBEAT_S", 0.01)
    sent: list[str] = []
    is_sending = False

    async def events() -> AsyncGenerator[bytes, None]:
        for _ in range(5):
            await asyncio.sleep(0.025)
            yield b"data: {}\n\n"

    async def send(message: Any) -> None:
        nonlocal is_sending
        assert not is_sending
        is_sending = True
        await asyncio.sleep(0.02)
        is_sending = False
        sent.append(message["type"].rpartition(".")[2])

    stream = EventStreamResponse(events())
    asyncio.run(stream({"type": "http", "path": "/", "state": {}}, None, send))  # type: ignore[arg-type]
    assert sent[0] == "start" and sent.count("start") == 1 and len(sent) > 7


# The end


def test_a_stop_lets_answers_end_and_refuses_the_rest() -> None:
    answers = ScriptedBackend()
    answers.script = [Generation(text="a"), 0.3, END]

    body = {**CHAT, "stream": True}
    with running_server(answers, grace_s=5.0) as address:
        stream = httpx.stream("POST", f"{address}/v1/chat/completions", json=body)
        response = stream.__enter__()
        lines = response.iter_lines()
        next(lines)
    assert "data: [DONE]" in list(lines)
    stream.__exit__(None, None, None)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/healthz")
    with running_server(answers, grace_s=0.0) as address:
        stream = httpx.stream("POST", f"{address}/v1/chat/completions", json=body)
        lines = stream.__enter__().iter_lines()
        next(lines)
    with pytest.raises(httpx.RemoteProtocolError):  # cut off, and the client can tell
        list(lines)
    assert answers.num_running == 0
