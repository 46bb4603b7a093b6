"""Sessions over real gRPC and a real Redis, with the engine core and a store that it saves in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.store.redis import RedisAddress
from cluster.store.scripts import value_name
from cluster.tenants.sessions import Sessions
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.inference_pb2 import ChatRequest, Message, Sampling
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from protos.briolette.v1.sessions_pb2 import (
    DeleteSessionRequest,
    GetSessionRequest,
    ListSessionsRequest,
    ParkSessionRequest,
    ResumeSessionRequest,
)
from protos.briolette.v1.sessions_pb2_grpc import SessionsStub
from tests.support.gateway.fake_decoder import Decoder, make_tokenizer
from tests.support.gateway.requests import GREEDY, failure
from tests.support.gateway.running import running_gateway, serving
from tests.support.gateway.session_cluster import (
    HELLO,
    RedisBlocks,
    SessionCluster,
    running_sessions,
)
from tests.support.store.redis_servers import redis_server
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def address(tmp_path: Path) -> Iterator[RedisAddress]:
    with redis_server(tmp_path) as found:
        yield found


@pytest.fixture
def cluster(tokenizer: Tokenizer, address: RedisAddress) -> Iterator[SessionCluster]:
    with running_sessions(tokenizer, address) as made:
        yield made


def test_a_session_goes_on_where_it_was(cluster: SessionCluster) -> None:
    first = cluster.ask(HELLO)
    second = cluster.ask("And then?")
    assert cluster.said() == [HELLO, first.text, "And then?", second.text]
    assert second.usage.cached_tokens >= first.usage.prompt_tokens + 8 - 16

    roles = ("user", "assistant", "user")
    messages = [
        Message(role=role, content=text) for role, text in zip(roles, cluster.said(), strict=False)
    ]
    plain = cluster.inference.ChatOnce(ChatRequest(messages=messages, sampling=GREEDY))
    assert plain.usage.prompt_tokens == second.usage.prompt_tokens
    assert plain.text == second.text


def test_what_a_stop_string_cut_off_is_no_part_of_it(cluster: SessionCluster) -> None:
    assert cluster.ask(HELLO, stop=[">"]).text == ";<="
    assert cluster.ask(HELLO, "other", stop_token_ids=[ord(">")]).text == ";<="
    again = [cluster.ask("And then?", name) for name in ("trip", "other")]
    assert again[0].usage.prompt_tokens == again[1].usage.prompt_tokens
    assert cluster.said()[:2] == cluster.said("other")[:2] == [HELLO, ";<="]


def test_a_turn_that_was_cancelled_leaves_no_trace_in_it(cluster: SessionCluster) -> None:
    cluster.ask(HELLO)
    before = cluster.said()
    cluster.decoder.runner.step_s = 0.05
    messages = [Message(role="user", content="Never mind.")]
    call = cluster.inference.Chat(
        ChatRequest(messages=messages, sampling=Sampling(max_tokens=200), session="trip")
    )
    next(iter(call))
    assert failure(lambda: cluster.ask("Me too!")) == (
        "ABORTED",
        "The session 'trip' is in use right now; try again later.",
    )
    for name, request in (
        ("ParkSession", ParkSessionRequest),
        ("ResumeSession", ResumeSessionRequest),
    ):
        method = getattr(cluster.sessions, name)
        assert failure(lambda: method(request(name="trip")))[0] == "ABORTED"  # noqa: B023
    assert cluster.ask("Another one.", "other").text
    call.cancel()
    cluster.decoder.runner.step_s = 0.0
    wait_for(lambda: not cluster.decoder.engine.has_work)
    assert cluster.said() == before
    assert cluster.ask("And then?").usage.cached_tokens > 0


def test_of_two_gateways_the_second_to_finish_is_refused(
    cluster: SessionCluster, tokenizer: Tokenizer, address: RedisAddress
) -> None:
    cluster.ask(HELLO)
    kept = Sessions(address, 60.0, lambda tenant: 1 << 20)
    with running_gateway(tokenizer, cluster.decoder.find, kept) as other:
        wait_for(lambda: serving(other))
        with grpc.insecure_channel(f"127.0.0.1:{other.port}") as channel:
            cluster.decoder.runner.step_s = 0.02
            messages = [Message(role="user", content="Slow.")]
            slow = InferenceStub(channel).Chat(
                ChatRequest(messages=messages, sampling=Sampling(max_tokens=60), session="trip")
            )
            next(iter(slow))
            quick = cluster.ask("Quick.")
            status, sentence = failure(lambda: list(slow))
    assert status == "ABORTED" and "was changed meanwhile" in sentence
    assert cluster.said()[2:] == ["Quick.", quick.text]


def test_the_list_has_sizes_ages_and_what_is_in_memory(cluster: SessionCluster) -> None:
    cluster.ask(HELLO, "older")
    cluster.ask(HELLO, "newer")
    cluster.blocks.flush(5)
    newer, older = cluster.list_all()
    assert (newer.name, older.name) == ("newer", "older")
    assert newer.num_tokens == older.num_tokens == 65 and newer.num_bytes > 6 * 1000
    assert newer.created <= newer.last_used and older.last_used <= newer.created
    assert newer.tokens_in_memory == 64 and newer.missing_values == 0


def test_parking_frees_memory_and_resuming_brings_it_back(cluster: SessionCluster) -> None:
    cluster.ask(HELLO)
    cluster.ask("And then?")
    parked = cluster.sessions.ParkSession(ParkSessionRequest(name="trip"))
    assert parked.freed_bytes > 0 and parked.session.tokens_in_memory == 0
    assert parked.session.missing_values == 0
    assert [group.cached for group in cluster.status().load.kv_blocks] == [0, 0]
    num_tokens = parked.session.num_tokens

    back = cluster.sessions.ResumeSession(ResumeSessionRequest(name="trip"))
    assert (back.memory_tokens, back.store_tokens) == (0, 96) and back.total_s > 0
    assert back.store_tokens + back.computed_tokens == num_tokens
    assert cluster.list_all()[0].tokens_in_memory == 96
    again = cluster.sessions.ResumeSession(ResumeSessionRequest(name="trip"))
    assert (again.memory_tokens, again.store_tokens) == (96, 0)
    assert cluster.ask("Still there?").usage.fetched_tokens == 0


def test_a_parked_session_that_is_asked_resumes_by_itself(cluster: SessionCluster) -> None:
    cluster.ask(HELLO)
    cluster.sessions.ParkSession(ParkSessionRequest(name="trip"))
    answer = cluster.ask("And then?")
    assert answer.usage.cached_tokens == answer.usage.fetched_tokens == 64


def test_it_survives_a_restart_of_everything_but_redis(
    cluster: SessionCluster, tokenizer: Tokenizer, address: RedisAddress
) -> None:
    first = cluster.ask(HELLO)
    saved = RedisBlocks(address)
    saved.values = cluster.blocks.values
    with running_sessions(tokenizer, address, saved) as later:
        assert [session.tokens_in_memory for session in later.list_all()] == [0]
        assert later.ask("And then?").usage.fetched_tokens == 64
        assert later.said()[:2] == [HELLO, first.text]


def test_deleting_leaves_no_key(cluster: SessionCluster, address: RedisAddress) -> None:
    cluster.ask(HELLO, max_tokens=80)
    cluster.ask("And then?", max_tokens=80)
    cluster.decoder.runner.step_s = 0.01
    messages = [Message(role="user", content="This is cancelled: " + 100 * "x")]
    call = cluster.inference.Chat(ChatRequest(messages=messages, session="trip"))
    assert [next(call) for _ in range(40)]
    call.cancel()
    wait_for(lambda: not cluster.decoder.engine.has_work)
    assert address.client().keys("*")
    deleted = cluster.sessions.DeleteSession(DeleteSessionRequest(name="trip"))
    assert deleted.freed_bytes > 0 and cluster.list_all() == []
    assert address.client().keys("*") == []
    assert cluster.decoder.engine.session_tokens("default") == {}
    assert failure(cluster.said)[0] == "NOT_FOUND"


def test_the_decoder_hears_what_the_store_lacks(
    cluster: SessionCluster, address: RedisAddress
) -> None:
    kept = Sessions(address, 60.0, lambda tenant: 1 << 20)
    cluster.ask(HELLO)
    cluster.blocks.flush(5)
    needed = kept.load("default", "trip").block_keys
    address.client().delete(*(value_name("default", key) for key in needed[:2]))
    cluster.ask("And then?")
    wait_for(lambda: cluster.blocks.forgotten.issuperset(needed[:2]))
    cluster.blocks.flush(5)
    needed = kept.load("default", "trip").block_keys
    cluster.blocks.forgotten.clear()
    cluster.sessions.DeleteSession(DeleteSessionRequest(name="trip"))
    wait_for(lambda: cluster.blocks.forgotten.issuperset(needed))


def test_another_model_reads_the_messages_anew(
    cluster: SessionCluster, tokenizer: Tokenizer, address: RedisAddress
) -> None:
    text = cluster.ask(HELLO).text
    kept = Sessions(address, 60.0, lambda tenant: 1 << 20)
    was = kept.load("default", "trip")
    content = {**was.content, "token_ids": [1, 2, 3]}  # of another tokenizer
    facts: dict[str, Any] = {"fingerprint": "another", "num_tokens": 3, "version": was.version}
    kept.save("default", "trip", content, was.block_keys, **facts)
    back = cluster.sessions.ResumeSession(ResumeSessionRequest(name="trip"))
    assert back.memory_tokens + back.computed_tokens > len(HELLO)
    assert cluster.ask("And then?").usage.prompt_tokens > len(HELLO)
    assert cluster.said()[:3] == [HELLO, text, "And then?"]


def test_while_values_can_not_be_written_nothing_is_given_up(
    cluster: SessionCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.ask(HELLO)
    monkeypatch.setattr(cluster.blocks, "flush", lambda timeout_s: False)
    for call in (
        lambda: cluster.sessions.ParkSession(ParkSessionRequest(name="trip")),
        lambda: cluster.sessions.DeleteSession(DeleteSessionRequest(name="trip")),
    ):
        status, sentence = failure(call)
        assert status == "UNAVAILABLE" and "Writing the session" in sentence
    assert [session.tokens_in_memory for session in cluster.list_all()] == [64]


def test_without_a_decoder_sessions_are_still_listed_and_shown(cluster: SessionCluster) -> None:
    cluster.ask(HELLO)
    cluster.decoder.close()
    wait_for(lambda: not serving(cluster.gateway))
    (session,) = cluster.list_all()
    assert session.num_tokens == 65 and not session.HasField("tokens_in_memory")
    assert cluster.said()[0] == HELLO
    for call in (
        lambda: cluster.sessions.ParkSession(ParkSessionRequest(name="trip")),
        lambda: cluster.sessions.DeleteSession(DeleteSessionRequest(name="trip")),
        lambda: cluster.sessions.ResumeSession(ResumeSessionRequest(name="trip")),
        lambda: cluster.ask("And then?"),
    ):
        assert failure(call) == ("UNAVAILABLE", "The decoder is not reachable right now.")
    assert len(cluster.said()) == 2


def test_without_redis_sessions_say_so_and_other_chats_go_on(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(ExitStack())
        address = server.enter_context(redis_server(tmp_path))
        cluster = stack.enter_context(running_sessions(tokenizer, address))
        cluster.ask(HELLO)
        server.close()
        named = [
            lambda: cluster.ask("And then?"),
            cluster.list_all,
            cluster.said,
            lambda: cluster.sessions.ParkSession(ParkSessionRequest(name="trip")),
            lambda: cluster.sessions.ResumeSession(ResumeSessionRequest(name="trip")),
            lambda: cluster.sessions.DeleteSession(DeleteSessionRequest(name="trip")),
        ]
        for call in named:
            status, sentence = failure(call)
            assert status == "UNAVAILABLE" and "doesn't answer" in sentence
        assert cluster.ask(HELLO, session="").text


def test_an_answer_that_can_not_be_kept_ends_with_a_sentence(
    tokenizer: Tokenizer, address: RedisAddress
) -> None:
    with running_sessions(tokenizer, address, budget=14_000) as cluster:
        first = cluster.ask(HELLO)
        status, sentence = failure(lambda: cluster.ask("x" * 200))
        assert status == "RESOURCE_EXHAUSTED" and "budget is 14,000" in sentence
        assert cluster.said() == [HELLO, first.text]


def test_bad_input_gets_a_status_and_a_sentence(cluster: SessionCluster) -> None:
    cluster.ask(HELLO)
    unknown = "There is no session 'tripp'; did you mean 'trip'?"
    for name, request in (
        ("GetSession", GetSessionRequest),
        ("ParkSession", ParkSessionRequest),
        ("ResumeSession", ResumeSessionRequest),
        ("DeleteSession", DeleteSessionRequest),
    ):
        method: Any = getattr(cluster.sessions, name)
        assert failure(lambda: method(request(name="tripp"))) == ("NOT_FOUND", unknown)  # noqa: B023
        for bad in ("", "x" * 201, "two\nlines"):
            status, sentence = failure(lambda: method(request(name=bad)))  # noqa: B023
            assert status == "INVALID_ARGUMENT" and "name has 1 to 200 bytes" in sentence
    assert failure(lambda: cluster.ask("Hi.", "x" * 201))[0] == "INVALID_ARGUMENT"
    nothing = ChatRequest(session="trip", sampling=GREEDY)
    assert failure(lambda: cluster.inference.ChatOnce(nothing)) == (
        "INVALID_ARGUMENT",
        "A chat needs at least one message.",
    )
    assert "context holds 512" in failure(lambda: cluster.ask("x" * 600))[1]
    assert failure(lambda: cluster.ask("Hi.", temperature=-1))[0] == "INVALID_ARGUMENT"
    assert len(cluster.said()) == 2


def test_a_decoder_without_a_store_keeps_what_was_said(
    tokenizer: Tokenizer, address: RedisAddress
) -> None:
    decoder = Decoder(tokenizer)
    kept = Sessions(address, 60.0, lambda tenant: 1 << 20)
    with running_gateway(tokenizer, decoder.find, kept) as gateway:
        wait_for(lambda: serving(gateway))
        with grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            cluster = SessionCluster(decoder, gateway, RedisBlocks(address), channel)
            cluster.ask(HELLO)
            assert cluster.ask("And then?").usage.prompt_tokens > len(HELLO)
            parked = cluster.sessions.ParkSession(ParkSessionRequest(name="trip"))
            assert parked.freed_bytes == 0
            cluster.sessions.DeleteSession(DeleteSessionRequest(name="trip"))
            cluster.blocks.store.close()
    decoder.close()
    assert address.client().keys("*") == []


def test_without_a_store_there_are_no_sessions(tokenizer: Tokenizer) -> None:
    decoder = Decoder(tokenizer)
    with running_gateway(tokenizer, decoder.find) as gateway:
        wait_for(lambda: serving(gateway))
        with grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            chat = ChatRequest(
                messages=[Message(role="user", content=HELLO)], sampling=GREEDY, session="trip"
            )
            for call in (
                lambda: InferenceStub(channel).ChatOnce(chat),
                lambda: SessionsStub(channel).ListSessions(ListSessionsRequest()),
            ):
                status, sentence = failure(call)
                assert status == "FAILED_PRECONDITION" and "store.enabled" in sentence
    decoder.close()
