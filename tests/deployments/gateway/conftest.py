"""A gateway in front of a fake decoder, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from deployments.gateway.gateway import Gateway
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from tests.support.gateway.fake_decoder import Decoder, make_tokenizer
from tests.support.gateway.running import running_gateway, serving
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
