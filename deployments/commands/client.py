"""A client of `briolette.v1` for the command line: plain, blocking, with our errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from cluster.errors import (
    BrioletteError,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    PermissionDenied,
    QuotaExceeded,
    SessionInUse,
    StoreFull,
    TenantExists,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    UnknownSession,
    UnknownTenant,
)
from deployments.commands.access import KEY_VARIABLE, Access
from protos.briolette.v1.admin_pb2 import (
    ClusterStatus,
    CreateTenantRequest,
    DayUsage,
    DeleteTenantRequest,
    GetStatusRequest,
    GetUsageRequest,
    ListTenantsRequest,
    RotateKeyRequest,
    Tenant,
    UpdateTenantRequest,
)
from protos.briolette.v1.admin_pb2_grpc import AdminStub
from protos.briolette.v1.inference_pb2 import ChatRequest, Generation, Message, Sampling
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from protos.briolette.v1.sessions_pb2 import (
    DeleteSessionRequest,
    DeleteSessionResponse,
    GetSessionRequest,
    GetSessionResponse,
    ListSessionsRequest,
    ParkSessionRequest,
    ParkSessionResponse,
    ResumeSessionRequest,
    ResumeSessionResponse,
    Session,
)
from protos.briolette.v1.sessions_pb2_grpc import SessionsStub

ERRORS: dict[str, type[BrioletteError]] = {
    error.status: error
    for error in (
        InvalidRequest,
        Unavailable,
        DeadlineExceeded,
        ConfigError,
        SessionInUse,
        StoreFull,
        Unauthenticated,
        PermissionDenied,
        TenantExists,
    )
}
QUICK_S = 10.0  # for calls that compute nothing
PARK_S = 90.0  # for those that wait until the store has, or is rid of, everything


class Client:
    """One connection to a gateway; closes at the end of a `with` block."""

    def __init__(self, address: str, access: Access = Access()) -> None:  # noqa: B008
        """Raises ConfigError for files of `access` that can't be read."""
        self._channel = grpc.intercept_channel(_channel(address, access), _ShowKey(access.key))
        self._inference = InferenceStub(self._channel)
        self._admin = AdminStub(self._channel)
        self._sessions = SessionsStub(self._channel)

    def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        session: str = "",
        timeout_s: float | None = None,
        thinking: bool = False,
    ) -> Iterator[Generation]:
        """The pieces of an answer as they come; leaving early cancels the request."""
        request = ChatRequest(
            messages=messages, sampling=sampling, session=session, thinking=thinking
        )
        with _our_errors(UnknownModel):
            call = self._inference.Chat(request, timeout=timeout_s)
            try:
                yield from call
            finally:
                call.cancel()

    def status(self) -> ClusterStatus:
        with _our_errors():
            return self._admin.GetStatus(GetStatusRequest(), timeout=5.0)

    def usage(self, tenant: str = "", since: str = "") -> Sequence[DayUsage]:
        """By day and tenant; `since` is a day as 2026-11-24, by default 30 days ago."""
        request = GetUsageRequest(tenant=tenant, since=since)
        with _our_errors():
            return self._admin.GetUsage(request, timeout=QUICK_S).days

    def list_sessions(self) -> Sequence[Session]:
        """The last used one first."""
        with _our_errors():
            return self._sessions.ListSessions(ListSessionsRequest(), timeout=QUICK_S).sessions

    def get_session(self, name: str) -> GetSessionResponse:
        """Raises UnknownSession, as all that follow do."""
        with _our_errors(UnknownSession):
            return self._sessions.GetSession(GetSessionRequest(name=name), timeout=QUICK_S)

    def park_session(self, name: str) -> ParkSessionResponse:
        with _our_errors(UnknownSession):
            return self._sessions.ParkSession(ParkSessionRequest(name=name), timeout=PARK_S)

    def resume_session(self, name: str) -> ResumeSessionResponse:
        """As long as it takes, since what the store lacks is computed."""
        with _our_errors(UnknownSession):
            return self._sessions.ResumeSession(ResumeSessionRequest(name=name))

    def delete_session(self, name: str) -> DeleteSessionResponse:
        with _our_errors(UnknownSession):
            return self._sessions.DeleteSession(DeleteSessionRequest(name=name), timeout=PARK_S)

    def list_tenants(self) -> Sequence[Tenant]:
        """By name."""
        with _our_errors():
            return self._admin.ListTenants(ListTenantsRequest(), timeout=QUICK_S).tenants

    def create_tenant(self, tenant: Tenant) -> str:
        """Its key. Raises TenantExists."""
        with _our_errors():
            request = CreateTenantRequest(tenant=tenant)
            return self._admin.CreateTenant(request, timeout=PARK_S).key

    def update_tenant(self, tenant: Tenant, *fields: str) -> Tenant:
        """Raises UnknownTenant, as all that follow do."""
        with _our_errors(UnknownTenant):
            request = UpdateTenantRequest(tenant=tenant, update_mask=FieldMask(paths=fields))
            return self._admin.UpdateTenant(request, timeout=QUICK_S)

    def rotate_key(self, name: str, grace_s: float) -> str:
        """The new one."""
        with _our_errors(UnknownTenant):
            request = RotateKeyRequest(name=name, grace_s=grace_s)
            return self._admin.RotateKey(request, timeout=QUICK_S).key

    def delete_tenant(self, name: str) -> None:
        """With all that the store has of it, as long as that takes."""
        with _our_errors(UnknownTenant):
            self._admin.DeleteTenant(DeleteTenantRequest(name=name))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


class _ShowKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Sends the key with every call."""

    def __init__(self, key: str | None) -> None:
        self._metadata = [("authorization", f"Bearer {key}")] if key else []

    def intercept_unary_unary(self, go_on: Callable[..., Any], details: Any, request: Any) -> Any:
        return go_on(details._replace(metadata=self._metadata), request)

    def intercept_unary_stream(self, go_on: Callable[..., Any], details: Any, request: Any) -> Any:
        return go_on(details._replace(metadata=self._metadata), request)


def _channel(address: str, access: Access) -> grpc.Channel:
    if not access.has_tls:
        return grpc.insecure_channel(address)
    files = (access.ca_file, access.key_file, access.cert_file)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(*map(_read, files)))


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}.") from None


@contextmanager
def _our_errors(not_found: type[BrioletteError] = BrioletteError) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        kind = {**ERRORS, "NOT_FOUND": not_found}.get(error.code().name, BrioletteError)
        sentence = error.details() or error.code().name
        delay_s: Any = dict(error.trailing_metadata() or ()).get("retry-after-s")
        if kind is StoreFull and delay_s is not None:  # of the two, what waiting helps against
            kind = QuotaExceeded
        if kind is Unauthenticated:
            sentence += f" (briolette takes a key from --key or {KEY_VARIABLE}.)"
        failure = kind(sentence)
        failure.retry_after_s = None if delay_s is None else float(delay_s)
        raise failure from None
