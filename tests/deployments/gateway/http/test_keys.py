"""HTTP with tenants' keys and TLS, as OpenAI's SDK meets it."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from prometheus_client import CollectorRegistry

from cluster.tenants.admission import KeyAdmission
from cluster.tenants.keys import new_key
from cluster.tenants.tenancy import Tenant
from cluster.tenants.usage import Used, today
from deployments.gateway.gateway import Gateway
from engine.text.tokenizer import Tokenizer
from tests.support.certificates import Authority
from tests.support.gateway.fake_decoder import Decoder, make_tokenizer
from tests.support.gateway.running import running_gateway, serving
from tests.support.store.redis_servers import redis_server
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture(scope="module")
def decoder(tokenizer: Tokenizer) -> Iterator[Decoder]:
    decoder = Decoder(tokenizer)
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def admission(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyAdmission]:
    directory = tmp_path_factory.mktemp("keys")
    with redis_server(directory) as address:
        yield KeyAdmission(address, directory / "tenants.json", new_key(0.0)[1])


@pytest.fixture(scope="module")
def gateway(
    tokenizer: Tokenizer,
    decoder: Decoder,
    admission: KeyAdmission,
    registry: CollectorRegistry,
) -> Iterator[Gateway]:
    with running_gateway(
        tokenizer, decoder.find, None, registry, admission, auth="keys"
    ) as gateway:
        wait_for(lambda: serving(gateway))
        yield gateway


@pytest.fixture
def tenant(admission: KeyAdmission) -> str:
    return f"t{len(admission.tenants.snapshot.records)}"


@pytest.fixture
def client(
    tenant: str, gateway: Gateway, admission: KeyAdmission, request: pytest.FixtureRequest
) -> openai.OpenAI:
    """Client with a key of the tenant that the test's parameter describes."""
    key = admission.tenants.directory.create(Tenant(name=tenant, **getattr(request, "param", {})))
    admission.tenants.refresh()
    return openai.OpenAI(base_url=gateway.base_url, api_key=key, max_retries=0)


def ask(client: openai.OpenAI, text: str = "a", n: int = 1) -> str:
    answer = client.completions.create(
        model="counter", prompt=text, temperature=0, max_tokens=8, n=n
    )
    return answer.choices[0].text


def test_a_key_is_needed(client: openai.OpenAI, registry: CollectorRegistry) -> None:
    assert ask(client) == "bcdefghi"
    assert [model.id for model in client.models.list()] == ["counter"]
    with pytest.raises(openai.AuthenticationError, match="is unknown") as caught:
        ask(client.with_options(api_key=client.api_key + "0"))
    assert caught.value.code == "invalid_api_key"
    labels = {"tenant": "(none)", "method": "/v1/completions", "status": "UNAUTHENTICATED"}
    assert registry.get_sample_value("briolette_gateway_requests_total", labels) == 1
    for other in ({}, {"authorization": "Bearer"}, {"authorization": "Basic eDp5"}):
        headers = {"x-api-key": client.api_key, **other}
        assert httpx.get(f"{client.base_url}models", headers=headers).status_code == 200
    elsewhere = httpx.get(
        f"{client.base_url}models", headers={"x-api-key": client.api_key, "host": "gpu.example"}
    )
    assert elsewhere.status_code == 200


def test_a_bad_deadline_is_counted_as_the_tenants(
    client: openai.OpenAI, registry: CollectorRegistry
) -> None:
    with pytest.raises(openai.BadRequestError, match="x-request-timeout"):
        client.models.list(extra_headers={"x-request-timeout": "soon"})
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    ended = [s.labels for s in samples if s.name == "briolette_gateway_requests_total"]
    assert ("/v1/models", "INVALID_ARGUMENT") in [(e["method"], e["status"]) for e in ended]


@pytest.mark.parametrize("client", [{"models": ("another",)}], indirect=True)
def test_a_model_that_is_not_allowed(client: openai.OpenAI) -> None:
    assert client.models.list().data == []
    with pytest.raises(openai.PermissionDeniedError, match="may not use"):
        ask(client)


@pytest.mark.parametrize("client", [{"tokens_per_minute": 60}], indirect=True)
def test_over_quota(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        for _ in range(3):
            ask(client, "x" * 30)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert caught.value.code == "rate_limit_exceeded"


@pytest.mark.parametrize("client", [{"max_in_flight": 1}], indirect=True)
def test_a_call_is_one_request_in_flight_whatever_its_choices(client: openai.OpenAI) -> None:
    for _ in range(2):  # nothing stays behind
        assert ask(client, n=3) == "bcdefghi"


@pytest.mark.parametrize("client", [{"tokens_per_minute": 100}], indirect=True)
def test_a_prompt_is_charged_once_and_all_of_a_call_together(client: openai.OpenAI) -> None:
    complete = partial(client.completions.create, model="counter", temperature=0, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="120 tokens"):  # no waiting helps
        complete(prompt=["x" * 60, "y" * 60])
    complete(prompt="x" * 60, n=8)
    with pytest.raises(openai.RateLimitError):
        complete(prompt="x" * 60)


def used_by(gateway: Gateway, tenant: str) -> Used:
    """Today."""
    rows = gateway._usage._books.read(today(), today())
    return next((row.used for row in rows if row.tenant == tenant), Used())


@pytest.mark.parametrize("client", [{"tokens_per_minute": 100}], indirect=True)
@pytest.mark.parametrize("prompts", [["x" * 120], ["x" * 60, "y" * 60]])
def test_a_refused_call_costs_nothing(
    client: openai.OpenAI, tenant: str, gateway: Gateway, decoder: Decoder, prompts: list[str]
) -> None:
    """Whatever its choices: none begins before the whole call is charged."""
    num_steps = decoder.runner.num_steps
    complete = partial(client.completions.create, model="counter", max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="120 tokens"):
        complete(prompt=prompts, n=8)
    complete(prompt="x" * 60)
    with pytest.raises(openai.RateLimitError):
        complete(prompt=["x" * 30, "y" * 30], n=4)
    wait_for(lambda: used_by(gateway, tenant).requests == 1)
    assert decoder.runner.num_steps == num_steps + 1


def test_a_call_counts_once_whatever_its_choices(
    client: openai.OpenAI, tenant: str, gateway: Gateway
) -> None:
    answer = client.completions.create(
        model="counter", prompt=["a" * 10, "b" * 5], n=3, max_tokens=4, temperature=0
    )
    assert answer.usage is not None and answer.usage.prompt_tokens == 15
    wait_for(lambda: used_by(gateway, tenant).output_tokens == 24)
    used = used_by(gateway, tenant)
    assert (used.requests, used.prompt_tokens) == (1, 15)


def test_a_deadline_that_is_past_is_no_overload(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="deadline passed") as caught:
        client.with_options(default_headers={"x-request-timeout": "0.000001"}).completions.create(
            model="counter", prompt="a"
        )
    assert caught.value.status_code == 504


def test_tls_with_and_without_clients_certificates(
    tokenizer: Tokenizer, decoder: Decoder, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    cert_file, key_file = authority.sign("gateway")
    own = authority.sign("client")
    files: dict[str, Any] = {"tls_cert_file": cert_file, "tls_key_file": key_file}
    for mutual in (dict[str, Any](), {"tls_client_ca_file": authority.file}):
        with running_gateway(tokenizer, decoder.find, **files, **mutual) as gateway:
            assert (gateway.base_url or "").startswith("https://127.0.0.1:")
            context = ssl.create_default_context(cafile=str(authority.file))
            if mutual:
                with pytest.raises(openai.APIConnectionError):
                    models(gateway, context)
                context.load_cert_chain(*own)
            wait_for(lambda c=context: models(gateway, c) == ["counter"])  # type: ignore[misc]
            with pytest.raises(openai.APIConnectionError):
                models(gateway, ssl.create_default_context())
            with pytest.raises(httpx.RemoteProtocolError):
                httpx.get(f"http://127.0.0.1:{gateway.http_port}/healthz")


def models(gateway: Gateway, context: ssl.SSLContext) -> list[str]:
    with openai.OpenAI(
        base_url=gateway.base_url,
        api_key="any",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(verify=context),
    ) as client:
        return [model.id for model in client.models.list()]
