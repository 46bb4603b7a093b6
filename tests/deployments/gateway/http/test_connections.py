"""Connections that say nothing, too little, or nothing any more: they keep nobody else out."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
import pytest
from prometheus_client import CollectorRegistry

from deployments.gateway.gateway import Gateway
from deployments.process.open_files import GRPC_PART, HTTP_PART, raise_limit
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.inference_pb2 import ListModelsRequest
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from tests.support.gateway.fake_decoder import Decoder, make_tokenizer
from tests.support.gateway.http_client import CHAT, is_closed, url
from tests.support.gateway.http_server import running_server
from tests.support.gateway.requests import complete, failure
from tests.support.gateway.running import running_gateway, serving
from tests.support.gateway.scripted_backend import ScriptedBackend
from tests.support.waiting import wait_for

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6  # types of frames
ACK = 1
END_HEADERS = 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def decoder(tokenizer: Tokenizer) -> Iterator[Decoder]:
    decoder = Decoder(tokenizer)
    yield decoder
    decoder.close()


def own_channel(gateway: Gateway) -> grpc.Channel:
    """On a connection that it shares with no other."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.insecure_channel(f"127.0.0.1:{gateway.port}", options)


def hold_silent(port: int, num: int) -> list[socket.socket]:
    held = []
    for _ in range(num):
        connection = socket.socket()
        connection.connect(("127.0.0.1", port))
        held.append(connection)
    return held


# How many


def test_2000_silent_connections_keep_nobody_out(tokenizer: Tokenizer, decoder: Decoder) -> None:
    """Connections of each dialect; both ends of each are files of this process."""
    num = min(2000, raise_limit() // 8)
    assert num >= 100
    held: list[socket.socket] = []
    with running_gateway(tokenizer, decoder.find) as gateway:
        wait_for(lambda: serving(gateway))
        try:
            for port in (gateway.port, gateway.http_port or 0):
                held += hold_silent(port, num)
            started = time.monotonic()
            assert httpx.post(url(gateway), json=CHAT).status_code == 200
            with own_channel(gateway) as channel:
                assert InferenceStub(channel).ListModels(ListModelsRequest(), timeout=5).models
            assert time.monotonic() - started < 5.0
            assert not any(map(is_closed, held[-num:]))
        finally:
            for connection in held:
                connection.close()


def test_both_ports_leave_files_for_the_rest() -> None:
    assert GRPC_PART + HTTP_PART <= 7 / 8


def test_above_the_limit_of_http_the_longest_silent_one_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployments.gateway.http.server.raise_limit", lambda: 48)
    with running_server(ScriptedBackend()) as address:
        held = hold_silent(int(address.rpartition(":")[2]), 17)
        wait_for(lambda: sum(map(is_closed, held)) == 5)
        assert all(map(is_closed, held[:5]))
        assert httpx.get(f"{address}/healthz").status_code == 200
        for connection in held:
            connection.close()


def test_who_is_being_answered_makes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.gateway.http.server.raise_limit", lambda: 8)
    answers = ScriptedBackend()
    answers.script = [60.0]
    with running_server(answers) as address:
        port = int(address.rpartition(":")[2])
        asking = hold_silent(port, 2)
        for connection in asking:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n")
            connection.sendall(b"content-type: application/json\r\ncontent-length: 60\r\n\r\n")
            connection.sendall(b'{"messages": [{"role": "user", "content": "a"}]}'.ljust(60))
        wait_for(lambda: answers.num_running == 2)
        (refused,) = hold_silent(port, 1)
        wait_for(lambda: is_closed(refused))
        assert answers.num_running == 2
        for connection in asking:
            connection.close()
        wait_for(lambda: answers.num_running == 0)
        assert httpx.get(f"{address}/healthz").status_code == 200


def test_above_the_limit_of_grpc_nobody_gets_in_until_silent_ones_go(
    tokenizer: Tokenizer, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("deployments.gateway.gateway.raise_limit", lambda: 16)
    monkeypatch.setattr("deployments.gateway.gateway.HANDSHAKE_S", 2.0)
    local = tmp_path / "gateway.sock"
    with running_gateway(tokenizer, decoder.find, local_socket=local) as gateway:
        wait_for(lambda: serving(gateway))
        with own_channel(gateway) as channel, own_channel(gateway) as late:
            stub = InferenceStub(channel)
            assert stub.CompleteOnce(complete()).text == "bcdefghi"
            started = time.monotonic()
            held = hold_silent(gateway.port, 16)  # 10 are let in at most
            wait_for(lambda: sum(map(is_closed, held)) >= 7, 1.0)
            assert stub.CompleteOnce(complete(), timeout=1.0).text == "bcdefghi"
            code, sentence = failure(lambda: InferenceStub(late).CompleteOnce(complete()))
            assert (code, "connect" in sentence) == ("UNAVAILABLE", True)
            assert time.monotonic() - started < 2.0  # nobody was let in by the end of silent ones
            with grpc.insecure_channel(f"unix:{local}") as own:  # whose bound is its own
                assert InferenceStub(own).CompleteOnce(complete(), timeout=1.0).text == "bcdefghi"
            ask_again: dict[str, Any] = {"wait_for_ready": True, "timeout": 10.0}
            assert InferenceStub(late).CompleteOnce(complete(), **ask_again).text == "bcdefghi"
            assert all(map(is_closed, held))
            for connection in held:
                connection.close()


# How long


def test_silent_grpc_connections_are_closed(
    tokenizer: Tokenizer, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.gateway.gateway.HANDSHAKE_S", 0.5)
    with running_gateway(tokenizer, decoder.find) as gateway:
        (silent,) = hold_silent(gateway.port, 1)
        wait_for(lambda: is_closed(silent))


class Http2:
    """A client that says what a test wants, byte by byte."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.settimeout(10)
        self._said = self._socket.makefile("rb")
        self.send(PREFACE + frame(SETTINGS))

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def call(self, method: str) -> None:
        """Begin one as the stream 1."""
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"/briolette.v1.Inference/{method}",
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        block = b"".join(b"\0" + text(name) + text(value) for name, value in fields.items())
        self.send(frame(HEADERS, block, END_HEADERS, 1))

    def frames(self) -> Iterator[int]:
        """The types of those that come, until the server hangs up; it is acknowledged."""
        while head := self._said.read(9):
            kind, flags, data = head[3], head[4], self._said.read(int.from_bytes(head[:3]))
            if kind in (SETTINGS, PING) and not flags & ACK:
                self.send(frame(kind, data if kind == PING else b"", ACK))
            yield kind

    def close(self) -> None:
        self._said.close()
        self._socket.close()


def frame(kind: int, data: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return len(data).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + data


def text(value: str) -> bytes:
    """Encode the text of a header as HPACK does short ones."""
    return bytes([len(value)]) + value.encode()


def test_a_connection_without_calls_is_closed(
    tokenizer: Tokenizer, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a client that had gone quiet asks again as if nothing had been."""
    monkeypatch.setattr("deployments.gateway.gateway.IDLE_S", 0.5)
    with running_gateway(tokenizer, decoder.find) as gateway:
        wait_for(lambda: serving(gateway))
        with own_channel(gateway) as channel:
            stub = InferenceStub(channel)
            stub.CompleteOnce(complete())
            client, started = Http2(gateway.port), time.monotonic()
            kinds = list(client.frames())
            assert kinds[0] == SETTINGS
            assert 0.4 < time.monotonic() - started < 5.0
            client.close()
            assert stub.CompleteOnce(complete()).text == "bcdefghi"
        decoder.runner.step_s = 0.01
        with own_channel(gateway) as channel:  # a call that takes longer is not cut off
            answer = InferenceStub(channel).CompleteOnce(complete(max_tokens=100))
            assert answer.timings.total_s > 1.0


def test_a_message_that_does_not_come(
    tokenizer: Tokenizer, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of one neither."""
    monkeypatch.setattr("deployments.gateway.services.rpc.MESSAGE_S", 0.3)
    registry = CollectorRegistry()
    with running_gateway(tokenizer, decoder.find, registry=registry) as gateway:
        wait_for(lambda: serving(gateway))

        def num_refused() -> float:
            labels = {"tenant": "default", "method": "Complete", "status": "INVALID_ARGUMENT"}
            name = "briolette_gateway_requests_total"
            return registry.get_sample_value(name, labels) or 0.0

        client, started = Http2(gateway.port), time.monotonic()
        client.call("Complete")
        client.send(frame(DATA, b"\0\0\0\0\x64" + b"\x12" * 10, 0, 1))  # 10 bytes of 100
        headers = (kind for kind in client.frames() if kind == HEADERS)
        assert list(islice(headers, 2))  # at the beginning, and with the status
        assert 0.2 < time.monotonic() - started < 5.0
        wait_for(lambda: num_refused() == 1)
        client.close()
