"""OpenAI's SDK in front of the gateway's counting engine, and of answers by script."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from deployments.gateway.gateway import Gateway
from tests.support.gateway.fake_decoder import Decoder
from tests.support.gateway.http_server import running_server
from tests.support.gateway.scripted_backend import ScriptedBackend


@pytest.fixture
def base_url(cluster: tuple[Decoder, Gateway], decoder: Decoder) -> str:
    return f"http://127.0.0.1:{cluster[1].http_port}/v1"


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def scripted(backend: ScriptedBackend) -> Iterator[openai.OpenAI]:
    """A client of answers by script."""
    with running_server(backend) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
