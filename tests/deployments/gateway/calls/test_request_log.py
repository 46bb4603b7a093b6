"""The log of requests: one line for each, with the id that the client sees, and never a text."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from bench.lib.http_load import post
from cluster.errors import Unauthenticated
from cluster.metrics import Metrics
from cluster.tenants.admission import Lease, OpenAdmission, OpenLease
from deployments.gateway.calls import request_log
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.calls.request_log import FILE, NOBODY, RequestLog
from protos.briolette.v1.admin_pb2 import GetStatusRequest
from protos.briolette.v1.admin_pb2_grpc import AdminStub
from protos.briolette.v1.inference_pb2 import Generation, Timings, Usage
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from protos.briolette.v1.stream_pb2 import Add
from tests.support.gateway.fake_decoder import Decoder, make_tokenizer
from tests.support.gateway.requests import chat, complete
from tests.support.gateway.running import running_gateway, serving
from tests.support.waiting import wait_for

SECRET_TEXT = "the launch is on Tuesday"


class Logged:
    """A gateway, a decoder, and what the log says."""

    def __init__(self, decoder: Decoder, channel: grpc.Channel, folder: Path) -> None:
        self.decoder, self.channel, self.folder = decoder, channel, folder
        self.stub = InferenceStub(channel)
        self.registry = CollectorRegistry()
        self.port = 0
        self.http_port: int | None = None

    @property
    def lines(self) -> list[dict[str, Any]]:
        path = self.folder / FILE
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def last(self, num_lines: int, timeout_s: float = 5.0) -> dict[str, Any]:
        """Wait until so many lines are logged, and return the last."""
        wait_for(lambda: len(self.lines) == num_lines, timeout_s)
        return self.lines[-1]


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[Logged]:
    tokenizer, registry = make_tokenizer(), CollectorRegistry()
    decoder = Decoder(tokenizer)
    folder = tmp_path / "logs"
    with running_gateway(tokenizer, decoder.find, registry=registry, log_dir=folder) as gateway:
        wait_for(lambda: serving(gateway))
        with grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            made = Logged(decoder, channel, folder)
            made.registry, made.port, made.http_port = registry, gateway.port, gateway.http_port
            yield made
    decoder.close()


def id_of(call: Any) -> str:
    """What the client sees first."""
    return str(dict(call.initial_metadata())["x-request-id"])


def test_an_answer_leaves_a_line_with_the_clients_id(logged: Logged) -> None:
    call = logged.stub.Chat(chat(SECRET_TEXT))
    pieces = list(call)
    line = logged.last(1)
    assert line["request_id"] == id_of(call) == pieces[0].request_id
    assert (line["tenant"], line["model"], line["method"]) == ("default", "counter", "Chat")
    assert (line["status"], line["error"], line["level"]) == ("OK", "", "INFO")
    assert line["prompt_tokens"] == pieces[-1].usage.prompt_tokens > len(SECRET_TEXT)
    assert (line["output_tokens"], line["cached_tokens"]) == (8, 0)
    assert 0 <= line["queue_s"] <= line["ttft_s"] <= line["total_s"] < 5
    assert datetime.fromisoformat(line["time"]).tzinfo is not None
    text = (logged.folder / FILE).read_text()
    assert SECRET_TEXT not in text and pieces[0].text not in text
    _, unary = logged.stub.ChatOnce.with_call(chat(SECRET_TEXT))
    assert logged.last(2)["request_id"] == id_of(unary)


def test_an_answer_over_http_leaves_one_too(logged: Logged) -> None:
    def ask(**fields: Any) -> Any:
        body = {"model": "counter", "messages": [{"role": "user", "content": "hello"}], **fields}
        return urllib.request.Request(
            f"http://127.0.0.1:{logged.http_port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )

    with urllib.request.urlopen(ask(max_tokens=4, n=2), timeout=10) as answer:
        request_id = answer.headers["x-request-id"]
    line = logged.last(1)
    assert (line["request_id"], line["status"]) == (request_id, "OK")
    assert (line["method"], line["output_tokens"]) == ("/v1/chat/completions", 8)
    assert line["prompt_tokens"] == len("user:hello\nassistant:")  # of both answers
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(ask(max_tokens=10_000), timeout=10)
    line = logged.last(2)
    assert line["request_id"] == caught.value.headers["x-request-id"]
    assert (line["status"], line["error"]) == ("INVALID_ARGUMENT", "context_too_long")


def test_cancelled_late_and_refused_requests(logged: Logged) -> None:
    logged.decoder.runner.step_s = 0.02
    stream = logged.stub.Complete(complete("abc", max_tokens=400))
    next(stream)
    stream.cancel()
    line = logged.last(1)
    assert (line["status"], line["error"], line["level"]) == ("CANCELLED", "", "INFO")
    assert line["prompt_tokens"] == 3 and 0 < line["output_tokens"] < 50 and line["ttft_s"] > 0
    with pytest.raises(grpc.RpcError):
        logged.stub.CompleteOnce(complete(max_tokens=400), timeout=0.2)
    line = logged.last(2)
    assert (line["status"], line["level"]) == ("DEADLINE_EXCEEDED", "WARNING")
    with pytest.raises(grpc.RpcError) as caught:
        logged.stub.CompleteOnce(complete(""))
    line = logged.last(3)
    assert (line["status"], line["error"]) == ("INVALID_ARGUMENT", "invalid_request")
    assert line["request_id"] == id_of(caught.value)


def test_errors_are_counted_by_kind(logged: Logged) -> None:
    logged.decoder.runner.step_s = 0.02
    running = [logged.stub.Complete(complete(max_tokens=300)) for _ in range(4)]
    for stream in running:
        next(stream)
    waiting = [logged.stub.Complete(complete(max_tokens=300)) for _ in range(8)]
    wait_for(lambda: logged.decoder.engine.stats().num_waiting == 8)
    with pytest.raises(grpc.RpcError) as caught:
        logged.stub.CompleteOnce(complete())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    labels = {"tenant": "default", "method": "CompleteOnce", "error": "overloaded"}
    name = "briolette_gateway_errors_total"
    wait_for(lambda: logged.registry.get_sample_value(name, labels) == 1)
    assert logged.last(1)["error"] == "overloaded"
    for stream in (*running, *waiting):
        stream.cancel()


def test_a_failure_is_found_by_its_id_in_every_log(
    logged: Logged, caplog: pytest.LogCaptureFixture
) -> None:
    logged.decoder.runner.error = ValueError("a bug")
    with pytest.raises(grpc.RpcError):
        logged.stub.CompleteOnce(complete())
    line = logged.last(1)
    assert (line["status"], line["level"]) == ("INTERNAL", "ERROR")
    assert line["request_id"] in caplog.text  # the decoder's log


def test_what_is_asked_every_second_is_no_news(logged: Logged) -> None:
    AdminStub(logged.channel).GetStatus(GetStatusRequest())
    logged.stub.CompleteOnce(complete())
    assert logged.last(1)["method"] == "CompleteOnce"


def test_a_caller_that_is_not_let_in(tmp_path: Path) -> None:
    """It has an id too, which its client sees in either dialect."""
    tokenizer, registry = make_tokenizer(), CollectorRegistry()
    decoder, nobody = Decoder(tokenizer), NobodyAdmission()
    with (
        running_gateway(
            tokenizer, decoder.find, registry=registry, admission=nobody, log_dir=tmp_path
        ) as gateway,
        grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel,
    ):
        logged = Logged(decoder, channel, tmp_path)
        with pytest.raises(grpc.RpcError) as refused:
            logged.stub.ChatOnce(chat())
        line = logged.last(1)
        assert line["request_id"] == id_of(refused.value)
        assert (line["status"], line["error"]) == ("UNAUTHENTICATED", "unauthenticated")
        stream = logged.stub.Chat(chat())
        with pytest.raises(grpc.RpcError):
            next(stream)
        assert logged.last(2)["request_id"] == id_of(stream)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{gateway.http_port}/v1/models", timeout=5)
        line = logged.last(3)
        assert line["request_id"] == caught.value.headers["x-request-id"]
        assert (line["method"], line["level"]) == ("/v1/models", "WARNING")
    decoder.close()
    labels = {"tenant": NOBODY, "method": "ChatOnce", "error": "unauthenticated"}
    assert registry.get_sample_value("briolette_gateway_errors_total", labels) == 1


class NobodyAdmission(OpenAdmission):
    """Admits no call."""

    is_open = False

    def admit(self, key: str | None) -> Lease:
        raise Unauthenticated("Not you.")


@pytest.mark.parametrize("dialect", ["grpc", "http"])
def test_a_client_that_does_not_read_has_one_name(
    dialect: str, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.gateway.services.rpc.STALL_S", 0.3)
    monkeypatch.setattr("deployments.gateway.http.connections.STALL_S", 0.3)
    monkeypatch.setattr("deployments.gateway.calls.output_collector.MAX_BUFFERED_TOKENS", 10**6)
    logged.decoder.runner.step_s = 0.002
    if dialect == "grpc":
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
        with grpc.insecure_channel(f"127.0.0.1:{logged.port}", options) as channel:
            call = InferenceStub(channel).Complete(complete(max_tokens=500, logprobs=20))
            line, method = logged.last(1, 20.0), "Complete"
            call.cancel()
    else:
        messages = [{"role": "user", "content": "a"}]
        body = {"messages": messages, "stream": True, "logprobs": True, "top_logprobs": 20}
        with small_window(logged.http_port) as connection:
            connection.sendall(post("/v1/chat/completions", {**body, "ignore_eos": True}))
            line, method = logged.last(1, 20.0), "/v1/chat/completions"
    facts = (line["method"], line["status"], line["error"], line["level"])
    assert facts == (method, "UNAVAILABLE", "stalled_client", "WARNING")
    labels = {"tenant": "default", "method": method}
    value = logged.registry.get_sample_value
    assert value("briolette_gateway_errors_total", {**labels, "error": "stalled_client"}) == 1
    assert value("briolette_gateway_aborted_total", {**labels, "reason": "stalled"}) == 1
    assert value("briolette_gateway_requests_total", {**labels, "status": "UNAVAILABLE"}) == 1


def small_window(port: int | None) -> socket.socket:
    """A connection to a client that takes little."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    return connection


def test_several_answers_to_one_call_add_up() -> None:
    call = ClientCall(OpenLease())
    call.begin("counter", 20)
    for num_tokens in (3, 5):
        add = Add(request_id=str(num_tokens))
        call.record(add, Generation(token_ids=[1]))
        usage, timings = Usage(output_tokens=num_tokens, cached_tokens=8), Timings(queue_s=0.05)
        last = Generation(token_ids=[1] * (num_tokens - 1), usage=usage, timings=timings)
        call.record(add, last)
    whole = call.stats
    assert (whole.usage.prompt_tokens, whole.usage.output_tokens) == (20, 8)
    assert (whole.usage.cached_tokens, whole.model) == (16, "counter")
    assert whole.timings.queue_s == 0.05 and 0 < whole.timings.ttft_s < 1


def test_the_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "MAX_BYTES", 1000)
    log = RequestLog(Metrics(CollectorRegistry()), tmp_path)
    for _ in range(100):
        call = ClientCall(OpenLease())
        call.begin("counter", 3)
        log.ended(call, "Chat", "OK")
    log.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1 + request_log.NUM_OLD_FILES
    assert sum(file.stat().st_size for file in files) <= 1000 * len(files)
    json.loads((tmp_path / FILE).read_text().splitlines()[-1])
