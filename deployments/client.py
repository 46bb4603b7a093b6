"""A client of `briolette.v1` for the command line: plain, blocking, with our errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc

from cluster.errors import (
    BrioletteError,
    DeadlineExceeded,
    InvalidRequest,
    Unavailable,
    UnknownModel,
)
from protos.briolette.v1.admin_pb2 import ClusterStatus, GetStatusRequest
from protos.briolette.v1.admin_pb2_grpc import AdminStub
from protos.briolette.v1.inference_pb2 import ChatRequest, Generation, Message, Sampling
from protos.briolette.v1.inference_pb2_grpc import InferenceStub

ERRORS: dict[str, type[BrioletteError]] = {
    error.status: error for error in (InvalidRequest, UnknownModel, Unavailable, DeadlineExceeded)
}


class Client:
    """One connection to a gateway; closes at the end of a `with` block."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._inference = InferenceStub(self._channel)
        self._admin = AdminStub(self._channel)

    def chat(
        self, messages: Sequence[Message], sampling: Sampling, timeout_s: float | None = None
    ) -> Iterator[Generation]:
        """The pieces of an answer as they come; leaving early cancels the request."""
        request = ChatRequest(messages=messages, sampling=sampling)
        with _our_errors():
            call = self._inference.Chat(request, timeout=timeout_s)
            try:
                yield from call
            finally:
                call.cancel()

    def status(self) -> ClusterStatus:
        with _our_errors():
            return self._admin.GetStatus(GetStatusRequest(), timeout=5.0)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


@contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        kind = ERRORS.get(error.code().name, BrioletteError)
        raise kind(error.details() or error.code().name) from None
