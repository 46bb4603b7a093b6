"""Write-behind: a thread of its own sends to Redis what waits in the queue."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from cluster.breaker import Breaker
from cluster.kv_keys import BOOK_VALUE, LOOK_UP, MAKE_ROOM, OVERHEAD_BYTES, USE, tenant_prefix
from cluster.kv_queue import Value, WriteQueue
from cluster.kv_value import HEADER_BYTES, header_of
from cluster.redis import BulkConnection, RedisAddress, packed, reason_of

IDLE_S = 0.25  # then a look at whether a reader has found the server gone
RETRY_S = 5.0  # what refuses to store is asked again after this, then twice as long, and so on


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the server, as it says itself."""

    used_bytes: int
    max_bytes: int  # 0: no limit


class Writer:
    """The thread.

    `on_outcome(outcome, value)` is called once for each value that was put, `on_used(tenant,
    bytes)` with what a tenant uses after a write, `on_memory` after each batch. A value
    that is being sent when the connection breaks is lost; those that wait behind it are sent later.
    Where the server refuses to store, those that wait are given up for a while: all, or on a server
    that is full those of tenants that can make no room.
    """

    def __init__(
        self,
        address: RedisAddress,
        fingerprint: bytes,
        reach: Breaker,
        *,
        queue_bytes: int,
        ttl_ms: int,
        budget_of: Callable[[str], int],
        on_outcome: Callable[[str, Value], None],
        on_used: Callable[[str, int], None],
        on_memory: Callable[[Memory], None],
    ) -> None:
        self._address = address
        self._fingerprint = fingerprint
        self._reach = reach
        self._writing = Breaker(f"Writing to the KV store at {address}", first_retry_s=RETRY_S)
        self._writing_of: dict[str, Breaker] = {}  # tenants that found the server full
        self._ttl_ms = ttl_ms
        self._budget_of = budget_of
        self._on_outcome = on_outcome
        self._on_used = on_used
        self._on_memory = on_memory
        self._queue = WriteQueue(queue_bytes)
        self._connection: BulkConnection | None = None
        self._thread = threading.Thread(target=self._run, name="kv-writer", daemon=True)
        self._thread.start()

    @property
    def queue_bytes(self) -> int:
        """Bytes that wait or are being sent."""
        return self._queue.num_bytes

    @property
    def is_writable(self) -> bool:
        """Whether everybody may write."""
        tenants = list(self._writing_of.values())
        return self._writing.is_closed and not any(breaker.retry_in_s for breaker in tenants)

    def refusal(self, tenant: str, num_bytes: int) -> str | None:
        """The outcome that a value of this size would have at once, if it can't be taken."""
        if not self._reach.is_closed:
            return "unreachable"
        if self._is_refused(tenant):
            return "server_full"
        if not self._queue.has_room(num_bytes):
            return "queue_full"
        return None

    def put(self, value: Value) -> bool:
        """Queue a value; False where there is no place for it."""
        refusal = self.refusal(value.tenant, value.num_bytes)
        if refusal is None and not self._queue.put(value):
            refusal = "queue_full"
        if refusal is not None:
            self._on_outcome(refusal, value)
        return refusal is None

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was put before is written or given up; whether that came in time."""
        return self._queue.flush(timeout_s)

    def close(self) -> None:
        """Give up what still waits."""
        self._queue.close()
        self._thread.join()

    def _run(self) -> None:
        batch: list[Value] | None = []
        while batch is not None:
            try:
                if batch:
                    self._write(batch)
                else:
                    self._probe()
            except Exception as error:  # the thread's border: a bug would end all writing for good
                self._hang_up()
                self._reach.failed(*reason_of(error))
            batch = self._next_batch()
        self._hang_up()

    def _next_batch(self) -> list[Value] | None:
        """Values to write; none when the server should be tried again; None at the end."""
        while not self._queue.is_closed:
            pause_s = max(self._reach.retry_in_s, self._writing.retry_in_s)
            if pause_s > 0:
                self._queue.rest(pause_s)
            elif not self._reach.is_closed:
                return []
            elif batch := self._queue.take(IDLE_S):
                return batch
        return None

    def _probe(self) -> None:
        """See whether the server answers (again)."""
        self._hang_up()
        self._connected().command("PING")
        self._look_at_memory()
        self._reach.succeeded()

    def _look_at_memory(self) -> None:
        """Ask the server how full it is, if it lets us."""
        answer = _answer_or_error(self._connected(), "INFO", "memory")
        if isinstance(answer, bytes):
            lines = [line.partition(b":") for line in answer.split(b"\r\n")]
            info = {name: value for name, _, value in lines}
            used, limit = info.get(b"used_memory", b"0"), info.get(b"maxmemory", b"0")
            self._on_memory(Memory(int(used), int(limit)))

    def _write(self, batch: Sequence[Value]) -> None:
        outcomes = ["unreachable"] * len(batch)
        try:
            self._send(self._connected(), batch, outcomes)
            self._look_at_memory()
        finally:
            self._settled(batch, outcomes)
            self._give_up_refused()

    def _give_up_refused(self) -> None:
        """Nothing is put either while a server that refuses is left alone."""
        values = self._queue.take_if(lambda value: self._is_refused(value.tenant))
        self._settled(values, ["server_full"] * len(values))

    def _is_refused(self, tenant: str) -> bool:
        breaker = self._writing_of.get(tenant)
        return self._writing.retry_in_s > 0 or (breaker is not None and breaker.retry_in_s > 0)

    def _settled(self, values: Sequence[Value], outcomes: Sequence[str]) -> None:
        try:
            for value, outcome in zip(values, outcomes, strict=True):
                self._on_outcome(outcome, value)
        finally:
            self._queue.settled(values)

    def _send(
        self, connection: BulkConnection, batch: Sequence[Value], outcomes: list[str]
    ) -> None:
        """Send what isn't there yet; note what became of each value."""
        for i in self._present(connection, batch):
            outcomes[i] = "present"
        absent = [i for i, outcome in enumerate(outcomes) if outcome != "present"]
        refusal = self._send_these(connection, batch, outcomes, absent)
        if isinstance(refusal, redis.OutOfMemoryError):
            self._send_again(connection, batch, outcomes)
        elif refusal is not None:
            self._writing.failed(f"Redis refuses to store: {refusal}")
            return
        if absent:
            self._writing.succeeded()
            self._note_who_can_write(batch, outcomes, refusal)

    def _send_these(
        self,
        connection: BulkConnection,
        batch: Sequence[Value],
        outcomes: list[str],
        indices: Sequence[int],
    ) -> redis.ResponseError | None:
        """Send some values, one ahead of the replies. Returns why the server refused one."""
        refusal = None
        under_way: deque[int] = deque()
        for i in [*indices, None]:
            if i is not None:
                connection.send(self._transaction(batch[i]))
                under_way.append(i)
            while under_way and (i is None or len(under_way) > 1):
                done = under_way.popleft()
                outcomes[done], error = self._read_outcome(connection, batch[done])
                refusal = refusal or error
        return refusal

    def _send_again(
        self, connection: BulkConnection, batch: Sequence[Value], outcomes: list[str]
    ) -> None:
        """Send what a full server refused of those that can make room."""
        refused = [i for i, outcome in enumerate(outcomes) if outcome == "server_full"]
        with_room = self._make_room(connection, [batch[i] for i in refused])
        self._send_these(
            connection, batch, outcomes, [i for i in refused if batch[i].tenant in with_room]
        )

    def _note_who_can_write(
        self,
        batch: Sequence[Value],
        outcomes: Sequence[str],
        refusal: redis.ResponseError | None,
    ) -> None:
        """A tenant of whom a full server took nothing is left alone, which stops no others."""
        tenants: dict[str, set[str]] = {}
        for value, outcome in zip(batch, outcomes, strict=True):
            tenants.setdefault(outcome, set()).add(value.tenant)
        can = tenants.get("written", set()) | tenants.get("over_budget", set())
        for tenant in tenants.get("server_full", set()) - can:
            what = f"Writing to the KV store at {self._address} for {tenant!r}"
            breaker = self._writing_of.setdefault(tenant, Breaker(what, first_retry_s=RETRY_S))
            breaker.failed(f"Redis refuses to store: {refusal}")
        for tenant in can & self._writing_of.keys():
            self._writing_of[tenant].succeeded()

    def _make_room(self, connection: BulkConnection, values: Sequence[Value]) -> set[str]:
        """On a full server tenants write over the oldest of their own; which could."""
        by_tenant: dict[str, int] = {}
        for value in values:
            num_bytes = value.num_bytes + HEADER_BYTES + OVERHEAD_BYTES
            by_tenant[value.tenant] = by_tenant.get(value.tenant, 0) + num_bytes
        return {
            tenant
            for tenant, num_bytes in by_tenant.items()
            if connection.command(*self._script(MAKE_ROOM, tenant), num_bytes)
        }

    def _present(self, connection: BulkConnection, batch: Sequence[Value]) -> list[int]:
        """Which of the values Redis has already, at least by their length."""
        by_tenant: dict[str, list[int]] = {}
        for i, value in enumerate(batch):
            by_tenant.setdefault(value.tenant, []).append(i)
        present = []
        for tenant, indices in by_tenant.items():
            found: bytes = connection.command(
                *self._script(LOOK_UP, tenant), USE, *(batch[i].key for i in indices)
            )
            present += [
                i
                for i, length in zip(indices, found.split(), strict=True)
                if int(length) == batch[i].num_bytes + HEADER_BYTES
            ]
        return present

    def _script(self, script: str, tenant: str) -> tuple[bytes, ...]:
        ttl = str(self._ttl_ms).encode()
        return (b"EVAL", script.encode(), b"1", tenant_prefix(tenant), ttl)

    def _transaction(self, value: Value) -> list[bytes | memoryview]:
        """SET and its entry in the books, both or neither; the payload is not copied."""
        name = tenant_prefix(value.tenant) + b"kv:" + value.key
        header = header_of(value.parts, name, self._fingerprint)
        num_bytes = len(header) + value.num_bytes
        set_head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, num_bytes)
        ttl = str(self._ttl_ms).encode()
        book = packed(
            [
                *self._script(BOOK_VALUE, value.tenant),
                str(self._budget_of(value.tenant)).encode(),
                value.key,
                str(num_bytes + OVERHEAD_BYTES).encode(),
            ]
        )
        return [
            packed([b"MULTI"]) + set_head + header,
            *value.parts,
            b"\r\n$2\r\nPX\r\n$%d\r\n%s\r\n" % (len(ttl), ttl) + book + packed([b"EXEC"]),
        ]

    def _read_outcome(
        self, connection: BulkConnection, value: Value
    ) -> tuple[str, redis.ResponseError | None]:
        """Read the four replies to a transaction: what became of the value, and the refusal."""
        replies = [_reply_or_error(connection) for _ in range(4)]
        for reply in replies:  # the first has the reason; EXEC only says that there was one
            if isinstance(reply, redis.ResponseError):
                return "server_full", reply
        _, booked = replies[3]
        if isinstance(booked, redis.ResponseError):
            return "server_full", booked
        used, is_kept = booked
        self._on_used(value.tenant, used)
        return ("written" if is_kept else "over_budget"), None

    def _connected(self) -> BulkConnection:
        if self._connection is not None and self._connection.is_stale():
            self._hang_up()
        if self._connection is None:
            self._connection = self._address.connect()
        return self._connection

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def _answer_or_error(connection: BulkConnection, *words: str) -> Any:
    try:
        return connection.command(*words)
    except redis.ResponseError as error:
        return error


def _reply_or_error(connection: BulkConnection) -> Any:
    try:
        return connection.reply()
    except redis.ResponseError as error:
        return error
