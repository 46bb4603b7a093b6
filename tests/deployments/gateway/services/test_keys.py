"""A gateway with keys over real gRPC, Redis and TLS: who is let in, what is said to the rest."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry, generate_latest

from cluster.config import GatewayConfig
from cluster.errors import (
    ConfigError,
    PermissionDenied,
    QuotaExceeded,
    TenantExists,
    Unauthenticated,
    Unavailable,
    UnknownTenant,
)
from cluster.store.redis import RedisAddress
from cluster.tenants.admission import KeyAdmission
from cluster.tenants.directory import TenantDirectory
from cluster.tenants.keys import new_key
from cluster.tenants.sessions import Sessions
from deployments.commands.access import Access
from deployments.commands.client import Client
from deployments.gateway.gateway import Gateway
from deployments.gateway.tls import server_context
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.admin_pb2 import (
    CreateTenantRequest,
    GetStatusRequest,
    RotateKeyRequest,
    Tenant,
    UpdateTenantRequest,
)
from protos.briolette.v1.admin_pb2_grpc import AdminStub
from protos.briolette.v1.inference_pb2 import (
    ListModelsRequest,
    Message,
    Sampling,
    TokenizeRequest,
)
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from protos.briolette.v1.sessions_pb2 import ResumeSessionRequest
from protos.briolette.v1.sessions_pb2_grpc import SessionsStub
from tests.support.certificates import Authority
from tests.support.gateway.fake_decoder import Decoder, make_tokenizer
from tests.support.gateway.requests import complete, failure
from tests.support.gateway.running import running_gateway, serving
from tests.support.store.redis_servers import redis_server
from tests.support.waiting import wait_for

LOCAL_KEY, LOCAL = new_key(0.0)


def bearer(key: str) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata of a call with a key."""
    return (("authorization", f"Bearer {key}"),)


@dataclass
class Cluster:
    """A gateway with keys and the operator's client of it."""

    decoder: Decoder
    gateway: Gateway
    registry: CollectorRegistry
    operator: Client
    channel: grpc.Channel
    address: RedisAddress

    def create(self, name: str, **terms: Any) -> str:
        """The key of a tenant that there wasn't."""
        return self.operator.create_tenant(Tenant(name=name, **terms))

    def set(self, name: str, **terms: Any) -> Tenant:
        return self.operator.update_tenant(Tenant(name=name, **terms), *terms)

    def complete(self, key: str | None, text: str = "a", **options: Any) -> str:
        """The answer to a prompt of as many tokens as it has characters."""
        metadata = bearer(key) if key else ()
        stub = InferenceStub(self.channel)
        return stub.CompleteOnce(complete(text, **options), metadata=metadata, timeout=20).text

    def refusal(self, key: str | None, text: str = "a", **options: Any) -> tuple[str, str]:
        return failure(lambda: self.complete(key, text, **options))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def cluster(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("keys")
    decoder, registry = Decoder(tokenizer), CollectorRegistry()
    with redis_server(directory) as address:
        admission = KeyAdmission(address, directory / "tenants.json", LOCAL)
        kept = Sessions(address, 60.0, lambda tenant: admission.tenants.kv_bytes(tenant) or 1 << 20)
        with running_gateway(
            tokenizer, decoder.find, kept, registry, admission, auth="keys"
        ) as gateway:
            at = f"127.0.0.1:{gateway.port}"
            wait_for(lambda: serving(gateway))
            with Client(at, Access(LOCAL_KEY)) as operator, grpc.insecure_channel(at) as channel:
                yield Cluster(decoder, gateway, registry, operator, channel, address)
    decoder.close()


# Who is let in


def test_a_key_opens_what_no_key_does(cluster: Cluster) -> None:
    key = cluster.create("opens")
    assert cluster.complete(key) == "bcdefghi"
    code, sentence = cluster.refusal(None)
    assert (code, "asks for a key" in sentence) == ("UNAUTHENTICATED", True)
    code, sentence = cluster.refusal(key + "0")
    assert (code, sentence) == ("UNAUTHENTICATED", "This key is unknown.")
    stub = InferenceStub(cluster.channel)
    by_header = stub.CompleteOnce(complete("a"), metadata=(("x-api-key", key),))
    assert by_header.text == "bcdefghi"
    small = stub.CompleteOnce(complete("a"), metadata=(("authorization", f"bearer {key}"),))
    assert small.text == "bcdefghi"


def test_every_method_but_health_and_reflection_asks_for_a_key(cluster: Cluster) -> None:
    database = ProtoReflectionDescriptorDatabase(cluster.channel)
    names = set(database.get_services())
    health_pb2_grpc.HealthStub(cluster.channel).Check(health_pb2.HealthCheckRequest())
    asked = 0
    for name in names:
        if not name.startswith("briolette."):
            continue
        file = database.FindFileContainingSymbol(name)
        (service,) = [s for s in file.service if name.endswith(f".{s.name}")]
        for method in service.method:
            kind = "unary_stream" if method.server_streaming else "unary_unary"
            call: Any = getattr(cluster.channel, kind)(f"/{name}/{method.name}")
            answer = lambda call=call: list(call(b"")) if kind == "unary_stream" else call(b"")  # noqa: B023, E731
            assert failure(answer)[0] == "UNAUTHENTICATED", method.name
            asked += 1
    assert asked >= 17


def test_the_status_is_for_every_key(cluster: Cluster) -> None:
    metadata = bearer(cluster.create("watcher"))
    status = AdminStub(cluster.channel).GetStatus(GetStatusRequest(), metadata=metadata)
    assert status.ready and status.model == "counter"


def test_disabled_enabled_rotated_expired_and_deleted(cluster: Cluster) -> None:
    """Each acts on the next call: the gateway that makes a change knows it when it answers."""
    first = cluster.create("moody")
    cluster.set("moody", disabled=True)
    assert cluster.refusal(first) == ("PERMISSION_DENIED", "The tenant moody is disabled.")
    cluster.set("moody", disabled=False)
    assert cluster.complete(first)
    second = cluster.operator.rotate_key("moody", grace_s=3600)
    assert cluster.complete(first) and cluster.complete(second)
    third = cluster.operator.rotate_key("moody", grace_s=0)
    assert cluster.refusal(first)[0] == cluster.refusal(second)[0] == "UNAUTHENTICATED"
    cluster.set("moody", expires=time.time() - 1)
    assert cluster.refusal(third)[0] == "PERMISSION_DENIED"
    cluster.set("moody", expires=0.0)
    assert cluster.complete(third)
    cluster.operator.delete_tenant("moody")
    assert cluster.refusal(third)[0] == "UNAUTHENTICATED"


def test_a_request_that_runs_goes_on_when_its_tenant_is_deleted(cluster: Cluster) -> None:
    key = cluster.create("leaving", max_in_flight=1)
    cluster.decoder.runner.step_s = 0.01
    metadata = bearer(key)
    call = InferenceStub(cluster.channel).Complete(complete(max_tokens=40), metadata=metadata)
    tokens = list(next(call).token_ids)
    cluster.operator.delete_tenant("leaving")
    for piece in call:
        tokens += piece.token_ids
    cluster.decoder.runner.step_s = 0.0
    assert len(tokens) == 40 and cluster.refusal(key)[0] == "UNAUTHENTICATED"


def test_a_turn_that_runs_when_its_tenant_is_deleted_leaves_no_session(cluster: Cluster) -> None:
    cluster.decoder.runner.step_s = 0.01
    with Client(f"127.0.0.1:{cluster.gateway.port}", Access(cluster.create("gone"))) as client:
        message, sampling = Message(role="user", content="x"), Sampling(max_tokens=20)
        turn = client.chat([message], sampling, session="trip")
        next(turn)
        cluster.operator.delete_tenant("gone")
        with pytest.raises(PermissionDenied, match="gone was deleted; nothing is kept"):
            list(turn)
    cluster.decoder.runner.step_s = 0.0
    with cluster.address.client() as redis:
        assert not list(redis.scan_iter("briolette:{gone}*"))


# What each may


def test_only_allowed_models_are_seen_and_used(cluster: Cluster) -> None:
    key = cluster.create("picky", models=["other"])
    metadata = bearer(key)
    stub = InferenceStub(cluster.channel)
    code, sentence = cluster.refusal(key)
    assert (code, "may not use the model counter" in sentence) == ("PERMISSION_DENIED", True)
    tokenize = lambda: stub.Tokenize(TokenizeRequest(text="a"), metadata=metadata)  # noqa: E731
    assert failure(tokenize)[0] == "PERMISSION_DENIED"
    assert not stub.ListModels(ListModelsRequest(), metadata=metadata).models
    sessions = SessionsStub(cluster.channel)
    resume = lambda: sessions.ResumeSession(ResumeSessionRequest(name="x"), metadata=metadata)  # noqa: E731
    assert failure(resume)[0] == "PERMISSION_DENIED"
    cluster.set("picky", models=["other", "counter"])
    assert cluster.complete(key)
    assert len(stub.ListModels(ListModelsRequest(), metadata=metadata).models) == 1


def test_over_quota_says_when_to_come_back(cluster: Cluster) -> None:
    key = cluster.create("thrifty", tokens_per_minute=60)
    assert cluster.complete(key, "x" * 50, max_tokens=8)  # 2 are left
    with pytest.raises(grpc.RpcError) as caught:
        cluster.complete(key, "x" * 12)
    error = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(error)
    reason, info = ErrorInfo(), RetryInfo()
    assert status is not None and status.message == error.details()
    assert "used its 60 tokens a minute" in status.message
    assert status.details[0].Unpack(reason) and status.details[1].Unpack(info)
    assert (reason.reason, reason.domain) == ("QUOTA_EXCEEDED", "briolette")
    assert 5 < info.retry_delay.ToNanoseconds() / 1e9 <= 10
    metadata: Any = error.trailing_metadata()
    trailing = dict(metadata)
    assert float(trailing["retry-after-s"]) == pytest.approx(info.retry_delay.seconds, abs=1)
    with Client(f"127.0.0.1:{cluster.gateway.port}", Access(key)) as client:
        message = Message(role="user", content="x" * 20)
        with pytest.raises(QuotaExceeded, match="retry after") as refused:
            list(client.chat([message], Sampling(max_tokens=1)))
    assert refused.value.retry_after_s is not None and refused.value.retry_after_s > 5
    code, sentence = cluster.refusal(key, "x" * 61)
    assert (code, "60 in a minute" in sentence) == ("INVALID_ARGUMENT", True)
    cluster.set("thrifty", tokens_per_minute=0)
    assert cluster.complete(key, "x" * 100)


def test_an_answer_is_paid_for_and_a_debt_waited_off(cluster: Cluster) -> None:
    key = cluster.create("spender", tokens_per_minute=100)
    assert len(cluster.complete(key, "x" * 10, max_tokens=200)) == 200
    code, sentence = cluster.refusal(key)
    assert (code, "retry after 6" in sentence) == ("RESOURCE_EXHAUSTED", True)


def test_what_an_overloaded_cluster_refuses_costs_nothing(cluster: Cluster) -> None:
    key = cluster.create("unlucky", tokens_per_minute=100)
    cluster.decoder.ready = False
    cluster.decoder.loop.wake()
    wait_for(lambda: not serving(cluster.gateway))
    for _ in range(3):
        assert cluster.refusal(key, "x" * 60)[0] == "UNAVAILABLE"
    cluster.decoder.ready = True
    cluster.decoder.loop.wake()
    wait_for(lambda: serving(cluster.gateway))
    assert cluster.complete(key, "x" * 60)


def test_sessions_are_a_tenants_own_and_cost_it_tokens(cluster: Cluster) -> None:
    keys = {name: cluster.create(name, tokens_per_minute=100) for name in ("kim", "lee")}
    clients = {
        name: Client(f"127.0.0.1:{cluster.gateway.port}", Access(key)) for name, key in keys.items()
    }
    message, sampling = Message(role="user", content="x" * 50), Sampling(max_tokens=8)
    list(clients["kim"].chat([message], sampling, session="trip"))
    assert [session.name for session in clients["kim"].list_sessions()] == ["trip"]
    assert not clients["lee"].list_sessions()
    with pytest.raises(QuotaExceeded, match="kim has used its 100 tokens"):
        clients["kim"].resume_session("trip")
    cluster.operator.delete_tenant("kim")
    cluster.create("kim")
    with Client(
        f"127.0.0.1:{cluster.gateway.port}", Access(cluster.operator.rotate_key("kim", 0.0))
    ) as again:
        assert not again.list_sessions()


@pytest.mark.parametrize("method", ["Complete", "CompleteOnce"])
def test_without_a_key_no_message_is_waited_for(cluster: Cluster, method: str) -> None:
    call: Any = cluster.channel.stream_stream(f"/briolette.v1.Inference/{method}")
    ends = threading.Event()
    never = iter(lambda: ends.wait(30), True)
    try:
        assert failure(lambda: next(call(never, timeout=5)))[0] == "UNAUTHENTICATED"
    finally:
        ends.set()


def test_requests_in_flight_end_with_the_call(cluster: Cluster) -> None:
    key = cluster.create("single", max_in_flight=1)
    metadata = bearer(key)
    cluster.decoder.runner.step_s = 0.01
    call = InferenceStub(cluster.channel).Complete(complete(max_tokens=400), metadata=metadata)
    next(iter(call))
    code, sentence = cluster.refusal(key)
    assert (code, "1 requests in flight" in sentence) == ("RESOURCE_EXHAUSTED", True)
    tokenize = InferenceStub(cluster.channel).Tokenize
    code, _ = failure(lambda: tokenize(TokenizeRequest(text="a"), metadata=metadata))
    assert code == "RESOURCE_EXHAUSTED"
    call.cancel()
    wait_for(lambda: not cluster.decoder.engine.has_work)
    cluster.decoder.runner.step_s = 0.0
    for _ in range(3):  # failed ones end too
        assert cluster.refusal(key, max_tokens=0)[0] == "INVALID_ARGUMENT"
    assert cluster.complete(key)


def test_the_decoder_is_told_weight_and_budget(cluster: Cluster) -> None:
    told = cluster.decoder.budgets
    told.clear()
    key = cluster.create("heavy", weight=3.0, kv_bytes=5 << 20)
    cluster.complete(key)
    cluster.set("heavy", kv_bytes=0)
    cluster.complete(key)
    assert told == [("heavy", 5 << 20), ("heavy", None)]


# Who may change it


def test_tenants_change_nothing_unless_they_are_admins(cluster: Cluster) -> None:
    key = cluster.create("nosy")
    with Client(f"127.0.0.1:{cluster.gateway.port}", Access(key)) as client:
        for call in (
            lambda: client.list_tenants(),
            lambda: client.create_tenant(Tenant(name="friend")),
            lambda: client.update_tenant(Tenant(name="nosy", admin=True), "admin"),
            lambda: client.rotate_key("nosy", 0.0),
            lambda: client.delete_tenant("nosy"),
        ):
            with pytest.raises(PermissionDenied, match="operator's key"):
                call()
        cluster.set("nosy", admin=True)
        assert "nosy" in {tenant.name for tenant in client.list_tenants()}
        client.delete_tenant("nosy")
        with pytest.raises(Unauthenticated, match="BRIOLETTE_API_KEY"):
            client.list_tenants()


def test_one_admins_changes_leave_threads_to_another(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long Redis takes for them."""
    key, go_on = cluster.create("slow", admin=True), threading.Event()

    def rotate(directory: TenantDirectory, name: str, grace_s: float) -> str:
        go_on.wait(20)
        return "a key"

    monkeypatch.setattr(TenantDirectory, "rotate", rotate)
    metadata, admin = (("x-api-key", key),), AdminStub(cluster.channel)
    calls = [
        admin.RotateKey.future(RotateKeyRequest(name="slow"), metadata=metadata) for _ in range(12)
    ]
    time.sleep(0.2)
    started = time.monotonic()
    assert "slow" in [tenant.name for tenant in cluster.operator.list_tenants()]
    assert time.monotonic() - started < 2.0
    assert not any(call.done() for call in calls)
    go_on.set()
    assert [call.result(10).key for call in calls] == ["a key"] * 12


def test_a_list_shows_all_but_keys(cluster: Cluster) -> None:
    key = cluster.create("shown", weight=2.5, tokens_per_minute=7, models=["counter"])
    (shown,) = [t for t in cluster.operator.list_tenants() if t.name == "shown"]
    assert (shown.weight, shown.tokens_per_minute, list(shown.models)) == (2.5, 7, ["counter"])
    assert [k.key_id for k in shown.keys] == [key.split("_")[1]]
    assert time.time() - 10 < shown.created <= time.time()
    assert key.split("_")[2] not in str(cluster.operator.list_tenants())


def test_what_an_admin_can_get_wrong(cluster: Cluster) -> None:
    cluster.create("twice")
    with pytest.raises(TenantExists, match="a tenant twice already"):
        cluster.create("twice")
    with pytest.raises(UnknownTenant, match="no tenant 'nobody'"):
        cluster.set("nobody", weight=2.0)
    with pytest.raises(UnknownTenant):
        cluster.operator.rotate_key("nobody", 0.0)
    with pytest.raises(UnknownTenant):
        cluster.operator.delete_tenant("nobody")
    bad = (
        CreateTenantRequest(tenant=Tenant(name="no name")),
        CreateTenantRequest(tenant=Tenant(name="default")),
        CreateTenantRequest(),
        CreateTenantRequest(tenant=Tenant(name="w", weight=-1.0)),
        UpdateTenantRequest(tenant=Tenant(name="twice")),
        UpdateTenantRequest(tenant=Tenant(name="twice"), update_mask=FieldMask(paths=["name"])),
        RotateKeyRequest(name="twice", grace_s=1e12),
        RotateKeyRequest(name="twice", grace_s=float("nan")),
    )
    stub, metadata = AdminStub(cluster.channel), bearer(LOCAL_KEY)
    for request in bad:
        method = type(request).__name__.removesuffix("Request")
        call = lambda r=request, m=method: getattr(stub, m)(r, metadata=metadata)  # noqa: E731
        code, sentence = failure(call)
        assert code == "INVALID_ARGUMENT" and sentence.endswith("."), (request, sentence)


def test_an_open_cluster_has_no_tenants(tokenizer: Tokenizer) -> None:
    decoder = Decoder(tokenizer)
    with (
        running_gateway(tokenizer, decoder.find) as gateway,
        Client(f"127.0.0.1:{gateway.port}", Access("brio_any_key")) as client,
        pytest.raises(ConfigError, match=r"gateway\.auth"),
    ):
        client.create_tenant(Tenant(name="ann"))
    decoder.close()


def test_metrics_and_logs_know_tenants_and_no_keys(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = cluster.create("logged", tokens_per_minute=1)
    said = [cluster.refusal(wrong)[1] for wrong in (key + "0", f"{key} {key}")]
    said += [cluster.refusal(key, "x" * 2)[1], str(cluster.operator.list_tenants())]
    metrics = generate_latest(cluster.registry).decode()
    secret = key.split("_")[2]
    assert secret not in "".join(said) + metrics + caplog.text
    refused = 'requests_total{method="CompleteOnce",status="UNAUTHENTICATED",tenant="(none)"}'
    assert refused in metrics and 'tenant="logged"' in metrics


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def test_tls_and_nothing_else_on_that_port(tokenizer: Tokenizer, authority: Authority) -> None:
    cert_file, key_file = authority.sign("gateway")
    decoder = Decoder(tokenizer)
    files: dict[str, Any] = {"tls_cert_file": cert_file, "tls_key_file": key_file}
    with running_gateway(tokenizer, decoder.find, **files) as gateway:
        at = f"127.0.0.1:{gateway.port}"
        with Client(at, Access(ca_file=authority.file, has_tls=True)) as client:
            wait_for(lambda: client.status().ready)
        with Client(at) as client, pytest.raises(Unavailable):
            client.status()
        with Client(at, Access(has_tls=True)) as client, pytest.raises(Unavailable):
            client.status()  # nobody that is known has signed it
    decoder.close()


def test_mutual_tls_and_a_socket_for_this_machine(
    tokenizer: Tokenizer, authority: Authority, tmp_path: Path
) -> None:
    cert_file, key_file = authority.sign("gateway")
    decoder, socket = Decoder(tokenizer), tmp_path / "gateway.sock"
    files: dict[str, Any] = {
        "tls_cert_file": cert_file,
        "tls_key_file": key_file,
        "tls_client_ca_file": authority.file,
    }
    stranger = Authority(tmp_path, "stranger").sign("client")
    with running_gateway(tokenizer, decoder.find, local_socket=socket, **files) as gateway:
        at = f"127.0.0.1:{gateway.port}"
        with Client(at, Access(None, True, authority.file, *authority.sign("client"))) as client:
            wait_for(lambda: client.status().ready)
        for shown in ((), stranger):
            with (
                Client(at, Access(None, True, authority.file, *shown)) as client,
                pytest.raises(Unavailable),
            ):
                client.status()
        with Client(f"unix:{socket}") as client:
            assert client.status().ready
    decoder.close()


def files_that_fail(authority: Authority, tmp_path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    cert_file, key_file = authority.sign("one")
    _, other_key_file = authority.sign("other")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    none = tmp_path / "none.pem"
    good = {"tls_cert_file": cert_file, "tls_key_file": key_file}
    yield {**good, "tls_key_file": other_key_file}, "the key belongs to another certificate"
    yield {**good, "tls_cert_file": nonsense}, "can't be used"
    yield {**good, "tls_key_file": nonsense}, "can't be used"
    yield {**good, "tls_cert_file": none}, f"tls_cert_file {none} can't be read: No such file"
    yield {**good, "tls_key_file": none}, f"tls_key_file {none} can't be read: No such file"
    yield {**good, "tls_client_ca_file": none}, "tls_client_ca_file"
    yield {**good, "tls_client_ca_file": nonsense}, "can't be used"


def test_files_that_cannot_be_used_are_named(authority: Authority, tmp_path: Path) -> None:
    for files, words in files_that_fail(authority, tmp_path):
        with pytest.raises(ConfigError) as caught:
            server_context(GatewayConfig(**files))
        assert words in str(caught.value), caught.value
    assert server_context(GatewayConfig()) is None
    cert_file, key_file = authority.sign("one")
    mutual = GatewayConfig(
        tls_cert_file=cert_file, tls_key_file=key_file, tls_client_ca_file=authority.file
    )
    context = server_context(mutual)
    assert context is not None and context.verify_mode is ssl.CERT_REQUIRED
