"""Calls that end early: cancelled, too late, refused by a full queue, or not read."""

from __future__ import annotations

import time

import grpc
import pytest

from deployments.gateway.gateway import Gateway
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from tests.support.gateway.fake_decoder import CONTEXT, Decoder
from tests.support.gateway.requests import complete, failure
from tests.support.waiting import wait_for


def test_cancelling_aborts_within_a_step(stub: InferenceStub, decoder: Decoder) -> None:
    """The step that runs ends, and one more may begin while the cancellation travels."""
    decoder.runner.step_s = 0.1
    call = stub.Complete(complete(max_tokens=400))
    next(iter(call))
    assert decoder.engine.stats().num_running == 1
    num_begun = decoder.runner.num_steps
    call.cancel()
    wait_for(lambda: not decoder.engine.has_work)
    assert decoder.runner.num_steps - num_begun <= 2
    assert all(not used for used in decoder.engine.stats().num_used_blocks.values())


def test_a_deadline_aborts(stub: InferenceStub, decoder: Decoder) -> None:
    decoder.runner.step_s = 0.02
    started = time.monotonic()
    call = lambda: stub.CompleteOnce(complete(max_tokens=400), timeout=0.2)  # noqa: E731
    assert failure(call)[0] == "DEADLINE_EXCEEDED"
    assert time.monotonic() - started < 1.0
    wait_for(lambda: not decoder.engine.has_work, 0.5)


def test_a_full_queue_refuses_at_once(stub: InferenceStub, decoder: Decoder) -> None:
    decoder.runner.step_s = 0.02
    calls = [stub.Complete(complete(max_tokens=400)) for _ in range(12)]  # 4 run, 8 wait
    wait_for(lambda: decoder.loop.num_active == 12)
    for _ in range(5):
        started = time.monotonic()
        assert failure(lambda: stub.CompleteOnce(complete()))[0] == "UNAVAILABLE"
        assert time.monotonic() - started < 0.5
    for call in calls:
        call.cancel()


def test_a_client_that_stops_reading_is_given_up(
    cluster: tuple[Decoder, Gateway], decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.gateway.services.rpc.STALL_S", 0.3)
    decoder.runner.step_s = 0.01
    address = f"127.0.0.1:{cluster[1].port}"
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
    with grpc.insecure_channel(address, options) as channel:
        call = InferenceStub(channel).Complete(complete(max_tokens=CONTEXT - 2, logprobs=20))
        wait_for(lambda: decoder.engine.has_work)
        wait_for(lambda: not decoder.engine.has_work, 10)
        assert decoder.engine.stats().num_decode_tokens
        code, sentence = failure(lambda: list(call))
        assert (code, "reading" in sentence) == ("UNAVAILABLE", True)
