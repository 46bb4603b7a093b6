"""The HTTP server: who may ask, what an error looks like, what never waits for ever."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2 as httpx
import pytest

from deployments.gateway import Gateway
from engine.tokenizer import Tokenizer
from tests.test_gateway import Decoder, make_tokenizer, running_gateway, wait_for


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def gateway(tokenizer: Tokenizer) -> Iterator[Gateway]:
    decoder = Decoder(tokenizer)
    with running_gateway(tokenizer, decoder.find) as gateway:
        wait_for(lambda: httpx.get(url(gateway, "/healthz")).status_code == 200)
        yield gateway
    decoder.close()


def url(gateway: Gateway, path: str) -> str:
    return f"http://127.0.0.1:{gateway.http_port}{path}"


def test_models(gateway: Gateway) -> None:
    answer = httpx.get(url(gateway, "/v1/models"))
    assert answer.status_code == 200 and answer.headers["x-request-id"]
    assert [model["id"] for model in answer.json()["data"]] == ["counter"]
    assert httpx.get(url(gateway, "/v1/models/counter")).json()["max_model_len"] == 512
    unknown = httpx.get(url(gateway, "/v1/models/gpt/4"))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
