"""A blocking client of `briolette.v1` that raises the errors of `cluster.errors`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from cluster.errors import (
    BrioletteError,
    ConfigError,
    DeadlineExceeded,
    Unauthenticated,
    Unavailable,
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

QUICK_S = 10.0  # timeout of calls that compute nothing
PARK_S = 90.0  # timeout of calls that wait until the store has written or deleted everything
DETAILS = "grpc-status-details-bin"  # https://grpc.github.io/grpc/core/md_doc_statuscodes.html

# Errors of gRPC itself, which have no reason: nobody answers, or not in time.
BY_STATUS: dict[str, type[BrioletteError]] = {
    error.status: error for error in (Unavailable, DeadlineExceeded)
}


class Client:
    """A connection to a gateway, which closes at the end of a `with` block.

    Every method raises the error that the gateway answers with, or Unavailable without a gateway.
    """

    def __init__(self, address: str, access: Access = Access()) -> None:  # noqa: B008
        """Prepare to connect to `address`, host:port or unix:PATH; connects with the first call.

        Raises:
            ConfigError: A file of `access` can't be read.
        """
        self._channel = grpc.intercept_channel(_channel(address, access), _SendKey(access.key))
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
        """Ask the model; closing the iterator early cancels the request.

        Args:
            messages: The conversation, or with `session` only what is new in it.
            sampling: How to choose tokens, and how many.
            session: Name of a session that the server keeps; "" for none.
            timeout_s: Deadline of the whole answer.
            thinking: Let the model think before it answers.

        Yields:
            Pieces of the answer; the last one has the reason of the end and the timings.
        """
        request = ChatRequest(
            messages=messages, sampling=sampling, session=session, thinking=thinking
        )
        with _our_errors():
            call = self._inference.Chat(request, timeout=timeout_s)
            try:
                yield from call
            finally:
                call.cancel()

    def status(self) -> ClusterStatus:
        """Return the newest status of the cluster."""
        with _our_errors():
            return self._admin.GetStatus(GetStatusRequest(), timeout=5.0)

    def usage(self, tenant: str = "", since: str = "") -> Sequence[DayUsage]:
        """Return the usage by day and tenant.

        Args:
            tenant: Name of one tenant; "" for all that the key may see.
            since: First day, as in 2026-11-24; "" for 30 days ago.
        """
        request = GetUsageRequest(tenant=tenant, since=since)
        with _our_errors():
            return self._admin.GetUsage(request, timeout=QUICK_S).days

    def list_sessions(self) -> Sequence[Session]:
        """Return the tenant's sessions, the most recently used one first."""
        with _our_errors():
            return self._sessions.ListSessions(ListSessionsRequest(), timeout=QUICK_S).sessions

    def get_session(self, name: str) -> GetSessionResponse:
        """Return a session with its messages. Raises UnknownSession."""
        with _our_errors():
            return self._sessions.GetSession(GetSessionRequest(name=name), timeout=QUICK_S)

    def park_session(self, name: str) -> ParkSessionResponse:
        """Free the memory that holds a session, once the store has it. Raises UnknownSession."""
        with _our_errors():
            return self._sessions.ParkSession(ParkSessionRequest(name=name), timeout=PARK_S)

    def resume_session(self, name: str) -> ResumeSessionResponse:
        """Bring a session into memory, computing what the store lacks. Raises UnknownSession."""
        with _our_errors():
            return self._sessions.ResumeSession(ResumeSessionRequest(name=name))

    def delete_session(self, name: str) -> DeleteSessionResponse:
        """Delete a session from memory and store. Raises UnknownSession."""
        with _our_errors():
            return self._sessions.DeleteSession(DeleteSessionRequest(name=name), timeout=PARK_S)

    def list_tenants(self) -> Sequence[Tenant]:
        """Return all tenants, sorted by name."""
        with _our_errors():
            return self._admin.ListTenants(ListTenantsRequest(), timeout=QUICK_S).tenants

    def create_tenant(self, tenant: Tenant) -> str:
        """Create a tenant and return its key. Raises TenantExists."""
        with _our_errors():
            request = CreateTenantRequest(tenant=tenant)
            return self._admin.CreateTenant(request, timeout=PARK_S).key

    def update_tenant(self, tenant: Tenant, *fields: str) -> Tenant:
        """Change the named fields of a tenant and return it. Raises UnknownTenant."""
        with _our_errors():
            request = UpdateTenantRequest(tenant=tenant, update_mask=FieldMask(paths=fields))
            return self._admin.UpdateTenant(request, timeout=QUICK_S)

    def rotate_key(self, name: str, grace_s: float) -> str:
        """Return a new key; old ones expire after `grace_s` seconds. Raises UnknownTenant."""
        with _our_errors():
            request = RotateKeyRequest(name=name, grace_s=grace_s)
            return self._admin.RotateKey(request, timeout=QUICK_S).key

    def delete_tenant(self, name: str) -> None:
        """Delete a tenant with everything that the store has of it. Raises UnknownTenant."""
        with _our_errors():
            self._admin.DeleteTenant(DeleteTenantRequest(name=name))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


class _SendKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the key to every call."""

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
def _our_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        raise to_error(error) from None


def to_error(call: grpc.Call) -> BrioletteError:
    """Return the error of a failed call; its class is named by `google.rpc.ErrorInfo`."""
    metadata: dict[str, Any] = dict(call.trailing_metadata() or ())
    kind = _reason(metadata.get(DETAILS, b"")).lower()
    by_status = BY_STATUS.get(call.code().name, BrioletteError)
    error_type = BrioletteError.by_kind.get(kind, by_status)
    sentence = call.details() or call.code().name
    if error_type is Unauthenticated:
        sentence += f" (Give a key with --key or {KEY_VARIABLE}.)"
    error = error_type(sentence)
    if (delay_s := metadata.get("retry-after-s")) is not None:
        error.retry_after_s = float(delay_s)
    return error


def _reason(details: bytes) -> str:
    """Return the reason in the details of a gRPC status, "" if there is none."""
    info = ErrorInfo()
    return next((info.reason for d in Status.FromString(details).details if d.Unpack(info)), "")
