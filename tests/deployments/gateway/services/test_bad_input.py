"""Bad input gets a status and a sentence, and disturbs no other call."""

from __future__ import annotations

import functools
import time
from typing import Any

import grpc
import pytest

from protos.briolette.v1.inference_pb2 import (
    ChatRequest,
    CompleteRequest,
    TokenIds,
)
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from tests.support.gateway.fake_decoder import CONTEXT, Decoder
from tests.support.gateway.requests import GREEDY, chat, complete, failure

BAD_CHATS = [
    (ChatRequest(sampling=GREEDY), "INVALID_ARGUMENT", "message"),
    (chat(role="wizard"), "INVALID_ARGUMENT", "role"),
    (chat("x" * CONTEXT), "INVALID_ARGUMENT", "context"),
    (chat(max_tokens=CONTEXT), "INVALID_ARGUMENT", "max_tokens"),
    (chat(max_tokens=0), "INVALID_ARGUMENT", "max_tokens"),
    (chat(temperature=-1.0), "INVALID_ARGUMENT", "temperature"),
    (chat(temperature=float("nan")), "INVALID_ARGUMENT", "temperature"),
    (chat(top_p=0.0), "INVALID_ARGUMENT", "top_p"),
    (chat(stop=[""]), "INVALID_ARGUMENT", "stop"),
    (chat(stop=["x"] * 17), "INVALID_ARGUMENT", "16 stop"),
    (chat(stop=["x" * 1001]), "INVALID_ARGUMENT", "1000 characters"),
    (chat(stop_token_ids=range(129)), "INVALID_ARGUMENT", "128 stop_token_ids"),
    (chat(stop_token_ids=[7] * 4_000_000), "INVALID_ARGUMENT", "128 stop_token_ids"),
    (chat(seed=2**64 - 1), "INVALID_ARGUMENT", "seed"),
    (ChatRequest(model="gpt", messages=chat().messages), "NOT_FOUND", "counter"),
]


@pytest.mark.parametrize(("request_", "status", "words"), BAD_CHATS)
def test_bad_chat(stub: InferenceStub, request_: ChatRequest, status: str, words: str) -> None:
    for call in (lambda: stub.ChatOnce(request_), lambda: list(stub.Chat(request_))):
        code, sentence = failure(call)
        assert (code, words in sentence, sentence.endswith(".")) == (status, True, True), sentence


def test_a_prompt_that_is_too_long_never_reaches_the_decoder(
    stub: InferenceStub, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder.engine, "add", None)
    for num_tokens in (CONTEXT, 1_000_000):
        code, sentence = failure(functools.partial(stub.CompleteOnce, complete("a" * num_tokens)))
        assert (code, "context" in sentence) == ("INVALID_ARGUMENT", True)


def test_huge_stop_lists_never_reach_the_decoder(
    stub: InferenceStub, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder.engine, "add", None)
    for stops in ({"stop_token_ids": [7] * 4_000_000}, {"stop": [""] * 1_000_000}):
        code, sentence = failure(functools.partial(stub.ChatOnce, chat(**stops)))
        assert (code, "At most" in sentence) == ("INVALID_ARGUMENT", True)


def test_bad_completion(stub: InferenceStub) -> None:
    assert failure(lambda: stub.CompleteOnce(complete("")))[0] == "INVALID_ARGUMENT"
    too_high = CompleteRequest(token_ids=TokenIds(ids=[256]), sampling=GREEDY)
    assert failure(lambda: stub.CompleteOnce(too_high))[0] == "INVALID_ARGUMENT"
    assert failure(lambda: stub.CompleteOnce(CompleteRequest()))[0] == "INVALID_ARGUMENT"


NO_MESSAGES = (b"\xff\xff\xff", b"\x12\x04\x0a\x02\xc3\x28")  # a role of invalid UTF-8


@pytest.mark.parametrize("method", ["Chat", "Complete"])
@pytest.mark.parametrize("data", NO_MESSAGES)
def test_bytes_that_are_no_message(channel: grpc.Channel, method: str, data: bytes) -> None:
    call: Any = channel.unary_stream(f"/briolette.v1.Inference/{method}")
    code, sentence = failure(lambda: list(call(data)))
    assert (code, "valid" in sentence) == ("INVALID_ARGUMENT", True)


def test_a_message_of_100_mb(channel: grpc.Channel) -> None:
    call: Any = channel.unary_unary("/briolette.v1.Inference/ChatOnce")
    assert failure(lambda: call(b"\0" * 100_000_000, timeout=20))[0] == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize(
    "data",
    [
        *(request.SerializeToString() for request, _, _ in BAD_CHATS),
        *NO_MESSAGES,
        b"\0" * 100_000_000,
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_bad_input_disturbs_nobody(
    channel: grpc.Channel, stub: InferenceStub, decoder: Decoder, data: bytes
) -> None:
    """A neighbour's tokens are the same, and no gap between two of them is long."""
    decoder.runner.step_s = 0.001
    call: Any = channel.unary_unary("/briolette.v1.Inference/ChatOnce")
    neighbour = stub.Complete(complete(max_tokens=CONTEXT - 10))
    tokens, slowest_s, came = list(next(neighbour).token_ids), 0.0, time.monotonic()
    refusals = [call.future(data) for _ in range(3)]
    for piece in neighbour:
        tokens += piece.token_ids
        slowest_s, came = max(slowest_s, time.monotonic() - came), time.monotonic()
    assert all(refusal.exception() is not None for refusal in refusals)
    assert tokens == [(98 + i) % 256 for i in range(CONTEXT - 10)]
    assert slowest_s < 1.0
