"""A decoder whose blocks are values in a real Redis, a gateway with sessions, and a client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from cluster.metrics import Metrics
from cluster.spec import AttentionKind
from cluster.store.kv_store import KVStore
from cluster.store.redis import RedisAddress
from cluster.tenants.sessions import Sessions
from deployments.gateway.gateway import Gateway
from engine.cache.block_store import StoredBlock
from engine.request import Request
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.admin_pb2 import ClusterStatus, GetStatusRequest
from protos.briolette.v1.admin_pb2_grpc import AdminStub
from protos.briolette.v1.inference_pb2 import ChatRequest, Generation, Message, Sampling
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from protos.briolette.v1.sessions_pb2 import GetSessionRequest, ListSessionsRequest, Session
from protos.briolette.v1.sessions_pb2_grpc import SessionsStub
from tests.support.engine.memory_store import MemoryStore
from tests.support.gateway.fake_decoder import Decoder
from tests.support.gateway.running import running_gateway, serving
from tests.support.waiting import wait_for

HELLO = "Hello there, this is the beginning of it."


class RedisBlocks(MemoryStore):
    """Every block is a value in Redis; what the blocks hold doesn't matter to a counting runner."""

    def __init__(self, address: RedisAddress) -> None:
        super().__init__()
        self.store = KVStore(address, b"counter", "counter", Metrics(CollectorRegistry()))
        self.fingerprint = b"counter"
        self.blocks = self
        self.forgotten: set[bytes] = set()

    def read(self, kind: AttentionKind, block_id: int) -> bytes:
        return bytes(1000)

    def write(self, kind: AttentionKind, block_id: int, value: Any) -> None:
        pass

    def save(self, request: Request, blocks: Sequence[StoredBlock]) -> None:
        super().save(request, blocks)
        for block in blocks:
            self.store.put(request.tenant, self._key(block.kind, block.block_hash), [bytes(1000)])

    def keys_of(self, request: Request) -> tuple[bytes, ...]:
        computed = request.block_hashes[: request.num_computed_tokens // 16]
        shown = {AttentionKind.GLOBAL: computed, AttentionKind.SLIDING: computed[-4:]}
        return tuple(self._key(kind, h) for kind, hashes in shown.items() for h in hashes)

    def traces_of(self, request: Request) -> tuple[bytes, ...]:
        new = slice(request.num_cached_tokens // 16, request.num_computed_tokens // 16)
        hashes = request.block_hashes[new]
        return tuple(self._key(kind, h) for kind in AttentionKind for h in hashes)

    def forget(self, tenant: str, keys: Iterable[bytes]) -> None:
        self.forgotten.update(keys)

    def flush(self, timeout_s: float) -> bool:
        return self.store.flush(timeout_s)

    def _key(self, kind: AttentionKind, block_hash: bytes) -> bytes:
        return kind.value.encode() + block_hash


@dataclass
class SessionCluster:
    """A decoder, a gateway and a client of both services."""

    decoder: Decoder
    gateway: Gateway
    blocks: RedisBlocks
    channel: grpc.Channel

    def __post_init__(self) -> None:
        self.inference, self.sessions = InferenceStub(self.channel), SessionsStub(self.channel)

    def status(self) -> ClusterStatus:
        answer: ClusterStatus = AdminStub(self.channel).GetStatus(GetStatusRequest())
        return answer

    def ask(self, text: str, session: str = "trip", **sampling: Any) -> Generation:
        request = ChatRequest(
            messages=[Message(role="user", content=text)],
            sampling=Sampling(**{"temperature": 0.0, "max_tokens": 8, **sampling}),
            session=session,
        )
        answer: Generation = self.inference.ChatOnce(request, timeout=20)
        return answer

    def list_all(self) -> list[Session]:
        return list(self.sessions.ListSessions(ListSessionsRequest()).sessions)

    def said(self, name: str = "trip") -> list[str]:
        got = self.sessions.GetSession(GetSessionRequest(name=name))
        return [message.content for message in got.messages]


@contextmanager
def running_sessions(
    tokenizer: Tokenizer,
    address: RedisAddress,
    blocks: RedisBlocks | None = None,
    budget: int = 1 << 20,
    runner: Any = None,
) -> Iterator[SessionCluster]:
    blocks = blocks or RedisBlocks(address)
    decoder = Decoder(tokenizer, store=blocks, runner=runner)
    kept = Sessions(address, 60.0, lambda tenant: budget)
    with running_gateway(tokenizer, decoder.find, kept) as gateway:
        wait_for(lambda: serving(gateway))
        with grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            yield SessionCluster(decoder, gateway, blocks, channel)
    decoder.close()
    blocks.store.close()
