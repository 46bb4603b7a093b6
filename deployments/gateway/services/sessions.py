"""The service `briolette.v1.Sessions`: list kept conversations, show, park, resume, delete them."""

from __future__ import annotations

import time
from collections.abc import Mapping

import grpc

from cluster.errors import Unavailable
from cluster.tenants.sessions import SessionInfo
from deployments.gateway.calls.chat_sessions import ChatSessions
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.calls.remote_decoder import DecoderRequest, RemoteDecoder
from deployments.gateway.services.rpc import Methods
from protos.briolette.v1 import sessions_pb2
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_UNSPECIFIED,
    Generation,
    Message,
    Sampling,
)
from protos.briolette.v1.sessions_pb2 import (
    DeleteSessionRequest,
    DeleteSessionResponse,
    GetSessionRequest,
    GetSessionResponse,
    ListSessionsRequest,
    ListSessionsResponse,
    ParkSessionRequest,
    ParkSessionResponse,
    ResumeSessionRequest,
    ResumeSessionResponse,
    Session,
)
from protos.briolette.v1.stream_pb2 import Add, SessionAnswer, SessionCall

NAME: str = sessions_pb2.DESCRIPTOR.services_by_name["Sessions"].full_name

ASK_S = 2.0  # a longer step is not waited for
PARK_S = 60.0  # what waits to be written is written first


class SessionService:
    """The methods, on top of the store and of a decoder that may come and go."""

    def __init__(self, chat_sessions: ChatSessions, decoder: RemoteDecoder) -> None:
        self._sessions = chat_sessions
        self._decoder = decoder

    def handler(self, methods: Methods) -> grpc.GenericRpcHandler:
        """What a gRPC server calls."""
        unary = methods.unary
        by_name = {
            "ListSessions": unary("ListSessions", self.list_all, ListSessionsRequest),
            "GetSession": unary("GetSession", self._get, GetSessionRequest),
            "ParkSession": unary("ParkSession", self.park, ParkSessionRequest),
            "ResumeSession": unary("ResumeSession", self._resume, ResumeSessionRequest),
            "DeleteSession": unary("DeleteSession", self.delete, DeleteSessionRequest),
        }
        return grpc.method_handlers_generic_handler(NAME, by_name)

    async def list_all(self, _: ListSessionsRequest, call: ClientCall) -> ListSessionsResponse:
        tenant = call.tenant
        infos = await self._sessions.ask(tenant, self._sessions.sessions.list, tenant)
        in_memory = await self._in_memory(tenant)
        return ListSessionsResponse(sessions=[to_session(info, in_memory) for info in infos])

    async def _get(self, request: GetSessionRequest, call: ClientCall) -> GetSessionResponse:
        tenant = call.tenant
        session = await self._session(tenant, request.name)
        kept = await self._sessions.load(tenant, request.name)
        messages = [Message(**message) for message in kept.messages]
        return GetSessionResponse(session=session, messages=messages)

    async def park(self, request: ParkSessionRequest, call: ClientCall) -> ParkSessionResponse:
        tenant = call.tenant
        with self._sessions.hold(tenant, request.name):
            await self._session(tenant, request.name)
            freed_bytes = (await self._free(tenant, request.name)).freed_bytes
            session = await self._session(tenant, request.name)
            return ParkSessionResponse(session=session, freed_bytes=freed_bytes)

    async def _resume(
        self, request: ResumeSessionRequest, call: ClientCall
    ) -> ResumeSessionResponse:
        tenant, model = call.tenant, self._decoder.status.model
        if model:
            call.lease.tenant.check_model(model)
        with self._sessions.hold(tenant, request.name):
            started = time.monotonic()
            kept = await self._sessions.load(tenant, request.name)
            prompt_ids = await self._sessions.encode_history(kept)
            add = Add(
                request_id=call.request_id,
                sampling=Sampling(temperature=0.0, max_tokens=1),  # which nobody is told of
                tenant=tenant,
                weight=call.lease.tenant.weight,
                session=request.name,
                timeout_s=call.time_remaining_s,
                kv_bytes=call.lease.tenant.kv_bytes or 0,
            )
            piece = Generation()
            with (
                call.lease,
                call.charged(len(prompt_ids)) as charge,
                self._decoder.generate([DecoderRequest(add, prompt_ids)]) as outputs,
            ):
                while piece.finish_reason == FINISH_REASON_UNSPECIFIED:
                    piece = (await outputs.take()).generation
                    charge(piece)
            usage = piece.usage
            return ResumeSessionResponse(
                memory_tokens=usage.cached_tokens - usage.fetched_tokens,
                store_tokens=usage.fetched_tokens,
                computed_tokens=len(prompt_ids) - usage.cached_tokens,
                total_s=time.monotonic() - started,
            )

    async def delete(
        self, request: DeleteSessionRequest, call: ClientCall
    ) -> DeleteSessionResponse:
        tenant = call.tenant
        with self._sessions.hold(tenant, request.name):
            await self._session(tenant, request.name)
            # What waits to be written would come again after the deletion.
            freed_bytes = (await self._free(tenant, request.name)).freed_bytes
            await self._sessions.delete(tenant, request.name)
            return DeleteSessionResponse(freed_bytes=freed_bytes)

    async def _session(self, tenant: str, name: str) -> Session:
        sessions = self._sessions.sessions
        info = await self._sessions.ask(tenant, sessions.info, tenant, name)
        return to_session(info, await self._in_memory(tenant))

    async def _in_memory(self, tenant: str) -> Mapping[str, int] | None:
        """Tokens by session; None where the decoder doesn't answer."""
        try:
            answer = await self._decoder.call(SessionCall(tenant=tenant), ASK_S)
        except Unavailable:
            return None
        return answer.tokens_in_memory

    async def _free(self, tenant: str, name: str) -> SessionAnswer:
        return await self._decoder.call(SessionCall(tenant=tenant, park=name), PARK_S)


def to_session(info: SessionInfo, in_memory: Mapping[str, int] | None) -> Session:
    """What a list shows, as a message."""
    session = Session(
        name=info.name,
        num_tokens=info.num_tokens,
        num_bytes=info.num_bytes,
        created=info.created,
        last_used=info.last_used,
        missing_values=info.num_missing,
    )
    if in_memory is not None:  # an answer that was cancelled may have left more than the session
        session.tokens_in_memory = min(in_memory.get(info.name, 0), info.num_tokens)
    return session
