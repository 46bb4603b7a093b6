"""The service `Inference`: real gRPC, a real link, the engine core and a runner that counts."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx2 as httpx
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from deployments.gateway.gateway import Gateway
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.admin_pb2 import GetStatusRequest
from protos.briolette.v1.admin_pb2_grpc import AdminStub
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    CompleteRequest,
    ListModelsRequest,
    TokenIds,
    TokenizeRequest,
)
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from tests.support.gateway.fake_decoder import CONTEXT, Decoder
from tests.support.gateway.requests import GREEDY, chat, complete, failure


def test_a_stream_says_the_same_as_one_message(stub: InferenceStub) -> None:
    pieces = list(stub.Complete(complete(logprobs=2)))
    whole = stub.CompleteOnce(complete(logprobs=2))
    assert "".join(piece.text for piece in pieces) == whole.text == "bcdefghi"
    ids = [token for piece in pieces for token in piece.token_ids]
    assert ids == list(whole.token_ids) == list(b"bcdefghi")
    assert pieces[-1].usage == whole.usage
    assert (whole.usage.prompt_tokens, whole.usage.output_tokens) == (1, 8)
    assert pieces[-1].finish_reason == whole.finish_reason == FINISH_REASON_LENGTH
    assert all(piece.finish_reason == 0 for piece in pieces[:-1])
    assert 0 <= whole.timings.queue_s <= whole.timings.ttft_s <= whole.timings.total_s < 5
    assert pieces[0].request_id and not any(piece.request_id for piece in pieces[1:])
    assert len(whole.logprobs) == 8
    assert whole.logprobs[0].alternatives[0].text == "b"
    assert whole.logprobs[0].logprob == pytest.approx(0.0, abs=1e-6)


def test_chat_goes_through_the_template(stub: InferenceStub) -> None:
    answer = stub.ChatOnce(chat("hello"))
    assert answer.text == ";<=>?@AB"  # what counts on from the colon of "assistant:"
    ids = stub.Tokenize(TokenizeRequest(messages=chat("hello").messages)).token_ids
    assert bytes(ids) == b"user:hello\nassistant:"
    assert answer.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("method", ["Complete", "CompleteOnce"])
def test_a_call_without_a_message(channel: grpc.Channel, method: str) -> None:
    call: Any = channel.stream_stream(f"/briolette.v1.Inference/{method}")
    assert failure(lambda: next(call(iter(())))) == ("INVALID_ARGUMENT", "The call has no message.")


def test_a_sentence_repeats_only_so_much_of_what_was_sent(stub: InferenceStub) -> None:
    request = complete()
    request.model = "\N{GRINNING FACE}" * 20_000
    code, sentence = failure(lambda: list(stub.Complete(request)))
    assert (code, len(sentence), sentence[-1]) == ("NOT_FOUND", 500, "…")


def test_a_text_that_can_never_fit_is_not_even_encoded(
    cluster: tuple[Decoder, Gateway], stub: InferenceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode_plain", lambda *_: pytest.fail("It was encoded."))
    text = "x" * (2 * CONTEXT + 1)  # a token has two bytes at most
    calls: tuple[tuple[Any, Any], ...] = (
        (stub.Tokenize, TokenizeRequest(text=text)),
        (stub.Tokenize, TokenizeRequest(messages=chat(text).messages)),
        (stub.CompleteOnce, complete(text)),
        (stub.ChatOnce, chat(text)),
    )
    for call, request in calls:
        assert failure(functools.partial(call, request)) == (
            "INVALID_ARGUMENT",
            "The prompt has 1,025 bytes; the context holds 512 tokens, which can't be so many.",
        )


def test_stop_strings_and_token_ids(stub: InferenceStub) -> None:
    answer = stub.CompleteOnce(complete(stop=["ef"], max_tokens=50))
    assert (answer.text, answer.finish_reason) == ("bcd", FINISH_REASON_STOP)
    assert answer.matched_stop == "ef"
    by_ids = CompleteRequest(token_ids=TokenIds(ids=[97, 98]), sampling=GREEDY)
    assert stub.CompleteOnce(by_ids).text == "cdefghij"


def test_many_streams_at_once(stub: InferenceStub) -> None:
    with ThreadPoolExecutor(8) as pool:
        prompts = [chr(ord("a") + i) for i in range(8)]
        answers = pool.map(lambda text: stub.CompleteOnce(complete(text, max_tokens=40)), prompts)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert list(answer.token_ids) == [ord(prompt) + 1 + i for i in range(40)]


def test_models_and_status(channel: grpc.Channel, stub: InferenceStub) -> None:
    (model,) = stub.ListModels(ListModelsRequest()).models
    assert (model.id, model.context_tokens, model.vocab_size) == ("counter", CONTEXT, 256)
    status = AdminStub(channel).GetStatus(GetStatusRequest())
    assert status.ready and status.gateway.pid
    assert {group.group for group in status.load.kv_blocks} == {"sliding", "global"}


def test_a_client_without_our_protos_can_call(channel: grpc.Channel, decoder: Decoder) -> None:
    """Services, files and message types, all by reflection; as grpcurl does it."""
    database = ProtoReflectionDescriptorDatabase(channel)
    names = {"briolette.v1.Inference", "briolette.v1.Admin", "grpc.health.v1.Health"}
    assert names <= set(database.get_services())
    pool = DescriptorPool(database)
    method = pool.FindServiceByName("briolette.v1.Inference").FindMethodByName("CompleteOnce")
    request_type, answer_type = map(GetMessageClass, (method.input_type, method.output_type))
    assert request_type is not CompleteRequest
    call: Any = channel.unary_unary(
        "/briolette.v1.Inference/CompleteOnce",
        request_serializer=request_type.SerializeToString,
        response_deserializer=answer_type.FromString,
    )
    request = ParseDict(
        {"text": "a", "sampling": {"temperature": 0, "maxTokens": 8}}, request_type()
    )
    assert call(request, timeout=10).text == "bcdefghi"


def test_several_answers_are_encoded_once(
    cluster: tuple[Decoder, Gateway], decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Any] = []
    encode = Tokenizer.apply_chat_template

    def count(self: Tokenizer, messages: Any, **options: Any) -> list[int]:
        encoded.append(messages)
        return encode(self, messages, **options)

    monkeypatch.setattr(Tokenizer, "apply_chat_template", count)
    body = {"messages": [{"role": "user", "content": "a"}], "n": 5, "temperature": 0}
    url = f"http://127.0.0.1:{cluster[1].http_port}/v1/chat/completions"
    answer = httpx.post(url, json={**body, "max_tokens": 4}).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == [";<=>"] * 5
    assert len(encoded) == 1 and answer["usage"]["prompt_tokens"] == len("user:a\nassistant:")
