"""What goes wrong behind the gateway: failing steps, a decoder that hangs or is lost."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any

import grpc
import pytest

from cluster.errors import (
    LinkError,
    PortTaken,
    Unavailable,
)
from cluster.links.connect import connect
from deployments.decoder.link import MAX_OUTBOX
from deployments.gateway.decoder_link import DecoderLink
from deployments.gateway.gateway import Gateway
from deployments.messages import GATEWAY_HELLO
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.admin_pb2 import ClusterStatus
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from protos.briolette.v1.stream_pb2 import FromDecoder
from tests.support.gateway.fake_decoder import SECRET, Decoder
from tests.support.gateway.requests import chat, complete, failure
from tests.support.gateway.running import no_decoder, running_gateway, serving
from tests.support.waiting import wait_for


def test_a_failing_step_ends_its_requests_only(
    stub: InferenceStub, decoder: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    decoder.runner.error = Unavailable("No copy of expert group 2 answers.")
    assert failure(lambda: stub.CompleteOnce(complete())) == (
        "UNAVAILABLE",
        "No copy of expert group 2 answers.",
    )
    decoder.runner.error = RuntimeError("a bug")
    call = stub.CompleteOnce.future(complete())
    assert failure(call.result)[0] == "INTERNAL"
    metadata: dict[str, Any] = {key: value for key, value in call.initial_metadata()}
    assert f"request_id={metadata['x-request-id']}" in caplog.text
    decoder.runner.error = None
    assert stub.CompleteOnce(complete()).text == "bcdefghi"


def test_a_request_that_cannot_be_added_ends_alone(
    stub: InferenceStub, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in `add` something unforeseen happens."""
    decoder.runner.step_s = 0.005
    neighbour = stub.Complete(complete(max_tokens=300))
    tokens = list(next(neighbour).token_ids)
    scheduler = decoder.engine.scheduler
    for owner, name in (
        (scheduler.kv, "find_prefix"),
        (scheduler.store, "fetch"),
        (decoder.engine, "_resume"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_: int("no number"))
            code, sentence = failure(lambda: stub.CompleteOnce(complete()))
            assert (code, "log" in sentence) == ("INTERNAL", True)
    for piece in neighbour:
        tokens += piece.token_ids
    assert tokens == [(98 + i) % 256 for i in range(300)]


def test_health_follows_the_decoder(
    cluster: tuple[Decoder, Gateway], stub: InferenceStub, decoder: Decoder
) -> None:
    decoder.ready = False
    decoder.loop.wake()
    wait_for(lambda: not serving(cluster[1]))
    code, sentence = failure(lambda: stub.ChatOnce(chat()))
    assert (code, "group 2" in sentence) == ("UNAVAILABLE", True)
    decoder.ready = True
    decoder.loop.wake()
    wait_for(lambda: serving(cluster[1]))


def test_a_hanging_step_is_no_health(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.gateway.decoder_link.SILENCE_S", 0.5)
    monkeypatch.setattr("deployments.decoder.status.PERIOD_S", 0.1)
    monkeypatch.setattr("deployments.decoder.step_loop.LONGEST_STEP_S", 0.5)
    decoder = Decoder(tokenizer)
    with running_gateway(tokenizer, decoder.find) as gateway:
        wait_for(lambda: serving(gateway))
        time.sleep(0.8)
        assert serving(gateway) and decoder.loop.problem() is None  # idle is well
        decoder.runner.go_on.clear()
        with grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            call = InferenceStub(channel).CompleteOnce.future(complete())
            wait_for(lambda: not serving(gateway))
            wait_for(lambda: decoder.loop.problem() is not None)
            decoder.runner.go_on.set()
            assert call.result(5).text == "bcdefghi"
        wait_for(lambda: serving(gateway))
        assert decoder.loop.problem() is None
    decoder.close()
    assert decoder.loop.problem() is not None


def test_a_step_that_waits_and_says_so_is_health(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.gateway.decoder_link.SILENCE_S", 0.5)
    monkeypatch.setattr("deployments.decoder.step_loop.LONGEST_STEP_S", 0.5)
    decoder = Decoder(tokenizer)

    def wait_long(_: float) -> bool:
        for _ in range(15):
            time.sleep(0.1)
            decoder.loop.step_waits()
        return True

    with running_gateway(tokenizer, decoder.find) as gateway:
        wait_for(lambda: serving(gateway))
        monkeypatch.setattr(decoder.runner.go_on, "wait", wait_long)
        with grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            call = InferenceStub(channel).CompleteOnce.future(complete(max_tokens=1))
            while not call.done():
                assert serving(gateway) and decoder.loop.problem() is None
                time.sleep(0.05)
            assert call.result().text == "b"
    decoder.close()


def test_a_gateway_that_takes_nothing_holds_up_nobody(tokenizer: Tokenizer) -> None:
    """What is for it waits in its outbox, not in the step loop; then it is given up."""
    decoder = Decoder(tokenizer)
    with connect(decoder.find(), SECRET, GATEWAY_HELLO):  # and never reads
        wait_for(lambda: len(decoder.gateways._links) == 1)
        big = FromDecoder(status=ClusterStatus(reason="x" * 100_000))
        started = time.monotonic()
        for _ in range(MAX_OUTBOX + 100):
            decoder.gateways.broadcast(big)
        assert time.monotonic() - started < 1.0
        wait_for(lambda: not decoder.gateways._links)
    decoder.close()


def test_the_first_message_says_whether_it_is_ready(tokenizer: Tokenizer) -> None:
    decoder = Decoder(tokenizer)
    with connect(decoder.find(), SECRET, GATEWAY_HELLO) as link:
        status = FromDecoder.FromString(bytes(link.recv(2.0))).status
    assert status.ready and status.model == "counter"
    decoder.close()


def test_a_lost_decoder_ends_streams_and_the_next_one_is_found(tokenizer: Tokenizer) -> None:
    first = Decoder(tokenizer)
    first.runner.step_s = 0.02
    decoders = [first]
    with running_gateway(tokenizer, lambda: decoders[-1].find()) as gateway:
        wait_for(lambda: serving(gateway))
        with grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            stub = InferenceStub(channel)
            call = stub.Complete(complete(max_tokens=300))
            next(iter(call))
            first.close()
            code, sentence = failure(lambda: list(call))
            assert (code, "decoder" in sentence) == ("UNAVAILABLE", True)
            wait_for(lambda: not serving(gateway))
            assert failure(lambda: stub.ChatOnce(chat()))[0] == "UNAVAILABLE"
            decoders.append(Decoder(tokenizer))
            wait_for(lambda: serving(gateway))
            assert stub.CompleteOnce(complete()).text == "bcdefghi"
    decoders[-1].close()


def test_a_request_that_waits_for_a_lost_link_runs_for_nobody_on_the_next(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(tokenizer)
    decoder.runner.step_s = 0.01
    taken, go_on = threading.Event(), threading.Event()

    def send_late(*_: object) -> None:
        taken.set()
        go_on.wait(10)
        raise LinkError("The link broke.")

    with running_gateway(tokenizer, decoder.find) as gateway:
        wait_for(lambda: serving(gateway))
        lost = gateway._decoder._link._link
        assert lost is not None
        monkeypatch.setattr(lost, "send", send_late)
        with grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            stub = InferenceStub(channel)
            calls = [stub.CompleteOnce.future(complete(max_tokens=400))]  # goes with the link
            assert taken.wait(5)
            calls.append(stub.CompleteOnce.future(complete(max_tokens=400)))  # waits behind it
            wait_for(lambda: gateway._decoder._link._outbox.qsize() > 0)
            lost.close()
            assert {failure(call.result)[0] for call in calls} == {"UNAVAILABLE"}
            wait_for(lambda: gateway._decoder._link._link not in (None, lost))
            go_on.set()
            wait_for(lambda: serving(gateway))
            assert stub.CompleteOnce(complete()).text == "bcdefghi"  # comes behind the others
            wait_for(lambda: not decoder.engine.has_work, 2.0)
            assert decoder.runner.num_steps < 100
    decoder.close()


def test_a_gateway_that_goes_takes_its_requests_along(tokenizer: Tokenizer) -> None:
    decoder = Decoder(tokenizer)
    decoder.runner.step_s = 0.02
    with running_gateway(tokenizer, decoder.find) as gateway:
        wait_for(lambda: serving(gateway))
        with grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            next(iter(InferenceStub(channel).Complete(complete(max_tokens=400))))
            gateway._decoder.close()
            wait_for(lambda: not decoder.engine.has_work)
    decoder.close()


def test_the_secret_is_needed(tokenizer: Tokenizer) -> None:
    decoder = Decoder(tokenizer)
    messages: list[object] = []
    loop = asyncio.new_event_loop()
    link = DecoderLink(loop, b"wrong", decoder.find, messages.append, lambda _: None, lambda: None)
    loop.run_until_complete(asyncio.sleep(0.3))
    link.close()
    decoder.close()
    assert not messages


def test_a_taken_port_is_said(tokenizer: Tokenizer) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(PortTaken, match=str(port)),
            running_gateway(tokenizer, no_decoder, port=port),
        ):
            pass
