"""A client of `briolette.v1` for the command line: plain, blocking, with our errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc

from cluster.errors import (
    BrioletteError,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    SessionInUse,
    StoreFull,
    Unavailable,
    UnknownModel,
    UnknownSession,
)
from protos.briolette.v1.admin_pb2 import ClusterStatus, GetStatusRequest
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
    )
}
QUICK_S = 10.0  # for calls that compute nothing
PARK_S = 90.0  # for those that wait until the store has everything


class Client:
    """One connection to a gateway; closes at the end of a `with` block."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._inference = InferenceStub(self._channel)
        self._admin = AdminStub(self._channel)
        self._sessions = SessionsStub(self._channel)

    def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        session: str = "",
        timeout_s: float | None = None,
    ) -> Iterator[Generation]:
        """The pieces of an answer as they come; leaving early cancels the request."""
        request = ChatRequest(messages=messages, sampling=sampling, session=session)
        with _our_errors(UnknownModel):
            call = self._inference.Chat(request, timeout=timeout_s)
            try:
                yield from call
            finally:
                call.cancel()

    def status(self) -> ClusterStatus:
        with _our_errors():
            return self._admin.GetStatus(GetStatusRequest(), timeout=5.0)

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

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


@contextmanager
def _our_errors(not_found: type[BrioletteError] = BrioletteError) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        kind = {**ERRORS, "NOT_FOUND": not_found}.get(error.code().name, BrioletteError)
        raise kind(error.details() or error.code().name) from None
