"""What a gateway sends to the decoder for a call, and what it buffers for its client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import (
    Overloaded,
    PermissionDenied,
    UnknownModel,
)
from cluster.links.connect import Endpoint
from cluster.tenants.admission import OpenLease
from cluster.tenants.tenancy import Tenant
from deployments.gateway.calls.chat_sessions import ChatSessions
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.calls.inference import Inference
from deployments.gateway.calls.output_collector import MAX_BUFFERED_TOKENS, OutputCollector
from deployments.gateway.calls.preprocessor import Preprocessor
from deployments.gateway.calls.remote_decoder import DecoderRequest, RemoteDecoder
from deployments.gateway.calls.tenant_threads import TenantThreads
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.admin_pb2 import ClusterStatus
from protos.briolette.v1.inference_pb2 import (
    Generation,
    Sampling,
)
from protos.briolette.v1.stream_pb2 import Add, Output, ToDecoder
from tests.support.gateway.fake_decoder import SECRET
from tests.support.gateway.requests import complete


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
