"""The border of an RPC: bytes in, a status and a sentence out, counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status.rpc_status import to_status

from cluster.errors import BrioletteError, Internal, InvalidRequest, StalledClient
from cluster.tenants.admission import Admission
from deployments.gateway.calls.client_call import ClientCall, key_in, new_request_id
from deployments.gateway.calls.inference import GenerationStream
from deployments.gateway.calls.request_log import RequestLog

MESSAGE_S = 60.0  # for the message of a request to arrive
STALL_S = 20.0  # a client that takes no message for so long is not reading

log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Methods:
    """Makes gRPC handlers of methods that take parsed requests and raise our errors.

    To gRPC each takes a stream, which looks the same on the wire: of another method's handler it
    reads the message before it calls it, so that whoever has no key could fill the memory.
    """

    def __init__(self, admission: Admission, requests: RequestLog) -> None:
        self._admission = admission
        self._requests = requests

    def generated(
        self,
        name: str,
        generate: Callable[
            [Sequence[Any], ClientCall], AbstractAsyncContextManager[GenerationStream]
        ],
        request_type: type[Message],
    ) -> Handler:
        """Return the handler of a method that streams the pieces of one answer."""

        async def handle(_: object, context: Context) -> None:
            async with self._answering(name, context) as call:
                request = await read(context, request_type)
                async with generate([request], call) as stream:
                    async for _, piece in stream:
                        await write(context, piece)

        return grpc.stream_stream_rpc_method_handler(handle, None, serialize)

    def unary(
        self,
        name: str,
        method: Callable[[Any, ClientCall], Awaitable[Message]],
        request_type: type[Message],
    ) -> Handler:
        """Return the handler of a method with one message each way."""

        async def handle(_: object, context: Context) -> None:
            async with self._answering(name, context) as call:
                request = await read(context, request_type)
                await write(context, await method(request, call))

        return grpc.stream_stream_rpc_method_handler(handle, None, serialize)

    @asynccontextmanager
    async def _answering(self, name: str, context: Context) -> AsyncIterator[ClientCall]:
        """Lets a call in and turns every error into a status and a sentence."""
        request_id = new_request_id()
        metadata = (("x-request-id", request_id),)
        try:
            lease = self._requests.admit(self._admission, key_of(context), name, request_id)
        except BrioletteError as error:
            await context.send_initial_metadata(metadata)
            await abort(context, error)
        call = ClientCall(lease, context.time_remaining(), request_id)
        status, problem = "OK", None
        self._requests.began(call, name)
        try:
            await context.send_initial_metadata(metadata)
            yield call
        except BrioletteError as error:
            status, problem = error.status, error
        except asyncio.CancelledError:
            left_s = context.time_remaining()
            is_late = left_s is not None and left_s <= 0
            status = "DEADLINE_EXCEEDED" if is_late else "CANCELLED"
            raise
        except Exception:  # border: an RPC
            log.exception("%s failed in the gateway. request_id=%s", name, request_id)
            problem = Internal("The gateway failed on this request; its log says why.")
            status = problem.status
        finally:
            self._requests.ended(call, name, status, problem)
        if problem is not None:  # a client that doesn't read takes no status either
            await abort(context, problem)


def key_of(context: Context) -> str | None:
    """The API key that a call shows."""
    metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
    return key_in(metadata.get)


async def abort(context: Context, error: BrioletteError) -> NoReturn:
    """End a call with an error's status and sentence.

    The details of the status have its kind in capitals, as the reason of a google.rpc.ErrorInfo,
    and the delay before a retry, if any, as google.rpc.RetryInfo; it is in `retry-after-s` too.
    """
    code, delay_s = grpc.StatusCode[error.status], error.retry_after_s
    status = Status(code=code.value[0], message=error.sentence)
    status.details.add().Pack(ErrorInfo(reason=error.kind.upper(), domain="briolette"))
    trailing: list[tuple[str, str | bytes]] = []
    if delay_s is not None:
        info = RetryInfo()
        info.retry_delay.FromNanoseconds(round(delay_s * 1e9))
        status.details.add().Pack(info)
        trailing.append(("retry-after-s", f"{delay_s:.3f}"))
    trailing += to_status(status).trailing_metadata
    await context.abort(code, error.sentence, tuple(trailing))


async def read(context: Context, request_type: type[Message]) -> Message:
    """The one message of a request. Raises InvalidRequest."""
    try:
        async with asyncio.timeout(MESSAGE_S):
            data = await context.read()
    except TimeoutError:
        raise InvalidRequest(f"The message didn't arrive within {MESSAGE_S:g} s.") from None
    if data is grpc.aio.EOF:
        raise InvalidRequest("The call has no message.")
    return parse(request_type, data)


def parse(request_type: type[Message], data: bytes) -> Message:
    """We parse ourselves: gRPC would call a malformed message an internal error."""
    try:
        return request_type.FromString(data)
    except DecodeError:
        name = request_type.DESCRIPTOR.full_name
        raise InvalidRequest(f"The message is not a valid {name}.") from None


def serialize(message: Message) -> bytes:
    return message.SerializeToString()


async def write(context: Context, message: Message) -> None:
    """Send one message; a client that doesn't take it in time is given up."""
    try:
        async with asyncio.timeout(STALL_S):
            await context.write(message)
    except TimeoutError:
        raise StalledClient("The client stopped reading.") from None
