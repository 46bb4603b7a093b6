"""Requests whose format is still to be compiled: who waits for it, and who doesn't."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
import torch
from torch import Tensor

from cluster.errors import InvalidRequest, Overloaded
from deployments.decoder.formats import FormatQueue, GatewayMessage
from engine.batch import Batch
from engine.request import Request
from engine.text.grammar import Grammar
from engine.text.grammars import Grammars
from protos.briolette.v1.inference_pb2 import Sampling
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from protos.briolette.v1.stream_pb2 import Add, ToDecoder
from tests.support.engine.gemma_chat import make_tokenizer
from tests.support.gateway.fake_decoder import Decoder
from tests.support.gateway.requests import complete, failure
from tests.support.gateway.running import running_gateway, serving
from tests.support.waiting import wait_for

TOKENIZER = make_tokenizer()


class SlowCompiler:
    """Compiles one after the other, each when it is told to."""

    def __init__(self) -> None:
        self.begun: list[str | None] = []
        self.compiled: list[str | None] = []
        self.may_end = threading.Semaphore(0)

    def compile(self, grammar: Grammar) -> None:
        self.begun.append(grammar.text)
        assert self.may_end.acquire(timeout=10)
        self.compiled.append(grammar.text)
        if grammar.text == "wrong":
            raise InvalidRequest("This is told when it is taken in.")

    def is_compiled(self, grammar: Grammar) -> bool:
        return grammar.text in self.compiled


class Waiting(SimpleNamespace):
    compiler: SlowCompiler
    formats: FormatQueue
    ready: list[GatewayMessage]


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    compiler, ready = SlowCompiler(), list[GatewayMessage]()
    formats = FormatQueue(cast(Grammars, compiler), ready.append)
    formats.start()
    yield Waiting(compiler=compiler, formats=formats, ready=ready)
    formats.close()
    compiler.may_end.release(100)
    wait_for(lambda: not formats.is_alive)


def adding(
    regex: str | None, *request_ids: str, tenant: str = "ann", gateway: int = 0
) -> GatewayMessage:
    sampling = Sampling() if regex is None else Sampling(regex=regex)
    adds = [Add(request_id=rid, tenant=tenant, sampling=sampling) for rid in request_ids]
    return GatewayMessage(gateway, ToDecoder(adds=adds))


def taken_in(ready: list[GatewayMessage]) -> list[str]:
    return [
        add.request_id
        for message in ready
        for add in message.content.adds
        if add.request_id not in message.dropped
    ]


def test_only_formats_that_are_not_compiled_wait(waiting: Waiting) -> None:
    assert not waiting.formats.hold(adding(None, "plain"))
    assert not waiting.formats.hold(GatewayMessage(0, ToDecoder(aborts=["x"])))
    assert waiting.formats.hold(adding("a", "1"))
    waiting.compiler.may_end.release()
    wait_for(lambda: taken_in(waiting.ready) == ["1"])
    assert not waiting.formats.hold(adding("a", "2"))


def test_tenants_take_turns(waiting: Waiting) -> None:
    for i in range(3):
        waiting.formats.hold(adding(f"a{i}", f"ann {i}"))
    waiting.formats.hold(adding("b", "bob", tenant="bob"))
    waiting.compiler.may_end.release(4)
    wait_for(lambda: len(waiting.ready) == 4)
    assert taken_in(waiting.ready).index("bob") <= 2


def test_a_wrong_format_is_taken_in_to_be_refused(waiting: Waiting) -> None:
    waiting.formats.hold(adding("wrong", "1"))
    waiting.formats.hold(adding("a", "2"))
    waiting.compiler.may_end.release(2)
    wait_for(lambda: taken_in(waiting.ready) == ["1", "2"])


def test_a_format_that_cannot_be_looked_at_is_taken_in_to_be_refused(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the thread that reads from a gateway goes on."""
    monkeypatch.setattr(waiting.compiler, "is_compiled", None)
    assert not waiting.formats.hold(adding("a", "1"))


def test_what_is_dropped_is_neither_compiled_nor_taken_in(waiting: Waiting) -> None:
    waiting.formats.hold(adding("a", "1"))
    waiting.formats.hold(adding("b", "2", "3"))
    waiting.formats.hold(adding("c", "4", gateway=7))
    wait_for(lambda: waiting.compiler.begun == ["a"])
    waiting.formats.drop(["1", "2", "other"])
    waiting.formats.drop_gateway(7)
    waiting.compiler.may_end.release(3)
    wait_for(lambda: len(waiting.ready) == 3)
    assert taken_in(waiting.ready) == ["3"]
    assert waiting.compiler.begun == ["a", "b"]  # for 3, which has come with 2


def test_a_tenant_may_not_have_endless_formats_wait(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.decoder.formats.MAX_WAITING", 2)
    waiting.formats.hold(adding("a", "1"))
    wait_for(lambda: waiting.compiler.begun == ["a"])
    waiting.formats.hold(adding("b", "2"))
    waiting.formats.hold(adding("c", "3"))
    with pytest.raises(Overloaded, match="2 of your calls"):
        waiting.formats.hold(adding("d", "4"))
    assert waiting.formats.hold(adding("d", "5", tenant="bob"))


# In a decoder


class AlwaysA:
    """A model that knows one letter."""

    def execute(self, batch: Batch) -> Tensor:
        ids = TOKENIZER.encode_plain("a") * len(batch.logits_indices)
        return torch.nn.functional.one_hot(torch.tensor(ids), TOKENIZER.vocab_size).float() * 50


def test_adds_and_aborts_do_not_wait_for_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a step, nor a deadline."""
    decoder = Decoder(TOKENIZER, runner=AlwaysA())
    grammars = decoder.engine.grammars
    assert grammars is not None
    may_end, compile_now = threading.Event(), grammars.compile

    def compile_later(grammar: Grammar) -> None:
        assert may_end.wait(10)
        compile_now(grammar)

    monkeypatch.setattr(grammars, "compile", compile_later)
    with (
        running_gateway(TOKENIZER, decoder.find) as gateway,
        grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel,
    ):
        wait_for(lambda: serving(gateway))
        stub = InferenceStub(channel)
        slow = stub.CompleteOnce.future(complete(regex="a{3}"))
        given_up = stub.CompleteOnce.future(complete(regex="a{4}"))
        late = failure(lambda: stub.CompleteOnce(complete(regex="a{5}"), timeout=0.3))
        assert late[0] == "DEADLINE_EXCEEDED"
        given_up.cancel()
        assert stub.CompleteOnce(complete(), timeout=5).text == "a" * 8
        assert not slow.done()
        may_end.set()
        assert slow.result(5).text == "aaa"
        wait_for(lambda: not decoder.engine.has_work)
        assert decoder.registry.get_sample_value(
            "briolette_requests_total", {"model": "counter", "tenant": "default", "reason": "stop"}
        )
    decoder.engine.check_integrity()
    decoder.close()


def test_times_count_from_the_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that has waited for its format keeps its deadline."""
    decoder = Decoder(TOKENIZER)
    grammars, add = decoder.engine.grammars, decoder.engine.add
    assert grammars is not None
    times: list[tuple[float, float | None]] = []
    may_end, compile_now = threading.Event(), grammars.compile

    def compile_later(grammar: Grammar) -> None:
        assert may_end.wait(10)
        compile_now(grammar)

    def add_timed(*, arrived_at: float, deadline_at: float | None, **options: Any) -> Request:
        times.append((arrived_at, deadline_at))
        return add(arrived_at=arrived_at, deadline_at=deadline_at, **options)

    monkeypatch.setattr(grammars, "compile", compile_later)
    monkeypatch.setattr(decoder.engine, "add", add_timed)
    sampling = Sampling(regex="a{6}")
    request = Add(request_id="r", prompt_ids=[1], sampling=sampling, timeout_s=20.0)
    before = time.monotonic()
    decoder.loop.on_message(0, ToDecoder(adds=[request]))
    after = time.monotonic()
    may_end.set()
    wait_for(lambda: bool(times))
    decoder.close()
    [(arrived_at, deadline_at)] = times
    assert before <= arrived_at <= after and deadline_at == arrived_at + 20.0
