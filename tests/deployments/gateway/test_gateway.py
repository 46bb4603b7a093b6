"""The gateway over real gRPC and a real link, with the engine core and a runner that counts."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
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

from cluster.errors import (
    LinkError,
    Overloaded,
    PermissionDenied,
    PortTaken,
    Unavailable,
    UnknownModel,
)
from cluster.links.connect import Endpoint, connect
from cluster.tenants.admission import OpenLease
from cluster.tenants.tenancy import Tenant
from deployments.decoder.link import MAX_OUTBOX
from deployments.gateway.calls.chat_sessions import ChatSessions
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.calls.inference import Inference
from deployments.gateway.calls.output_collector import MAX_BUFFERED_TOKENS, OutputCollector
from deployments.gateway.calls.preprocessor import Preprocessor
from deployments.gateway.calls.remote_decoder import DecoderRequest, RemoteDecoder
from deployments.gateway.calls.tenant_threads import TenantThreads
from deployments.gateway.decoder_link import DecoderLink
from deployments.gateway.gateway import Gateway
from deployments.messages import GATEWAY_HELLO
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.admin_pb2 import ClusterStatus, GetStatusRequest
from protos.briolette.v1.admin_pb2_grpc import AdminStub
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    ChatRequest,
    CompleteRequest,
    Generation,
    ListModelsRequest,
    Sampling,
    TokenIds,
    TokenizeRequest,
)
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from protos.briolette.v1.stream_pb2 import Add, FromDecoder, Output, ToDecoder
from tests.support.gateway.fake_decoder import CONTEXT, SECRET, Decoder, make_tokenizer
from tests.support.gateway.requests import GREEDY, chat, complete, failure
from tests.support.gateway.running import no_decoder, running_gateway, serving
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def cluster(tokenizer: Tokenizer) -> Iterator[tuple[Decoder, Gateway]]:
    decoder = Decoder(tokenizer)
    with running_gateway(tokenizer, decoder.find) as gateway:
        wait_for(lambda: serving(gateway))
        yield decoder, gateway
    decoder.close()


@pytest.fixture
def decoder(cluster: tuple[Decoder, Gateway]) -> Iterator[Decoder]:
    decoder = cluster[0]
    yield decoder
    decoder.runner.step_s, decoder.runner.error = 0.0, None
    wait_for(lambda: not decoder.engine.has_work)
    decoder.engine.check_integrity()


@pytest.fixture
def channel(cluster: tuple[Decoder, Gateway], decoder: Decoder) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{cluster[1].port}") as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> InferenceStub:
    return InferenceStub(channel)


# Answers


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


def test_the_model_is_looked_at_again_once_it_is_known(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder: Any = SimpleNamespace(status=ClusterStatus())
    threads = TenantThreads("encoding", 1, 1, 1)
    sessions = ChatSessions(None, decoder, tokenizer, threads)
    inference = Inference(decoder, Preprocessor(decoder, tokenizer, threads), sessions)

    def encode(_: str, **_options: Any) -> list[int]:
        decoder.status.model = "counter"
        return [1]

    monkeypatch.setattr(tokenizer, "encode", encode)
    for model, tenant, error in (
        ("gemma", Tenant(), UnknownModel),
        ("", Tenant(models=("gemma",)), PermissionDenied),
    ):
        decoder.status.model = ""
        request = complete()
        request.model = model
        with pytest.raises(error):
            asyncio.run(inference.generate_once(request, ClientCall(OpenLease(tenant))))


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
    for call, request in (
        (stub.Tokenize, TokenizeRequest(text=text)),
        (stub.Tokenize, TokenizeRequest(messages=chat(text).messages)),
        (stub.CompleteOnce, complete(text)),
        (stub.ChatOnce, chat(text)),
    ):
        assert failure(lambda call=call, request=request: call(request)) == (
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


# Bad input


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


# Ends before the end


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


def test_a_slow_stream_is_bounded() -> None:
    async def behind() -> None:
        aborted: list[Sequence[str]] = []
        collector = OutputCollector(["slow", "other"], aborted.append)
        piece = Generation(text="a", token_ids=[1])
        for _ in range(MAX_BUFFERED_TOKENS + 2):
            collector.push(Output(request_id="slow", generation=piece))
        assert aborted == [["slow", "other"]]  # at once, and once
        with pytest.raises(Overloaded):
            await collector.take()

    asyncio.run(behind())


def test_answers_to_one_prompt_are_sent_with_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what has not finished is aborted at the end."""
    decoder = RemoteDecoder(lambda: Endpoint("", 0), SECRET, lambda: None, lambda spent: None)
    sent: list[ToDecoder] = []
    link = SimpleNamespace(send=sent.append)
    monkeypatch.setattr(decoder, "_link", link, raising=False)
    decoder.status.ready = True
    requests = [
        DecoderRequest(
            Add(request_id=str(i), sampling=Sampling(regex="a", seed=i), same_prompt=i % 2 > 0),
            [1, 2, 3],
        )
        for i in range(4)
    ]
    with decoder.generate(requests):
        pass
    assert [[(a.sampling.seed, a.sampling.regex) for a in m.adds] for m in sent[:2]] == [
        [(0, "a"), (1, "")],
        [(2, "a"), (3, "")],
    ]
    adds = [[(a.request_id, list(a.prompt_ids), a.same_prompt) for a in m.adds] for m in sent]
    whole = [1, 2, 3]
    assert adds[:2] == [
        [("0", whole, False), ("1", [], True)],
        [("2", whole, False), ("3", [], True)],
    ]
    assert [list(message.aborts) for message in sent[2:]] == [["0", "1", "2", "3"]]


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


# What goes wrong behind the gateway


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
    assert f"request_id={dict(call.initial_metadata())['x-request-id']}" in caplog.text
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
