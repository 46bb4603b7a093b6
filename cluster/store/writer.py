"""Write-behind: a thread of its own sends to Redis what waits in the queue."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import redis

from cluster.store.breaker import Breaker
from cluster.store.redis import REDIS_ERRORS, BulkConnection, RedisAddress, reason_of
from cluster.store.sender import Outcomes, Sender
from cluster.store.write_queue import Removal, Value, WriteQueue

IDLE_S = 0.25  # then a look at whether a reader has found the server gone
RETRY_S = 5.0  # what refuses to store is asked again after this, then twice as long, and so on


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the server, as it says itself."""

    used_bytes: int
    max_bytes: int  # 0: no limit


class Writer:
    """The queue and its thread.

    `on_outcome(outcome, value)` is called once for each value that was put, `on_used(tenant,
    bytes)` with what a tenant uses after a write, `on_memory` after each batch. A value
    that is being sent when the connection breaks is lost; those that wait behind it are sent later.
    Where the server refuses to store, values are given up for a while: all, or on a server that is
    full those of tenants that can make no room.
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
        self._sender = Sender(fingerprint, ttl_ms, budget_of, on_used)
        self._reach = reach
        self._writing = Breaker(f"Writing to the KV store at {address}", first_retry_s=RETRY_S)
        self._writing_of: dict[str, Breaker] = {}  # tenants that found the server full
        self._on_outcome = on_outcome
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

    def remove(self, tenant: str, keys: Sequence[bytes]) -> None:
        """Queue the removal of these values, those that wait before it included."""
        self._queue.put(Removal(tenant, keys))

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was put before is written or given up; whether that came in time."""
        return self._queue.flush(timeout_s)

    def close(self) -> None:
        """Give up what still waits."""
        self._queue.close()
        self._thread.join()

    def _run(self) -> None:
        batch: Removal | list[Value] | None = []
        while batch is not None:
            try:
                if isinstance(batch, Removal):
                    self._remove(batch)
                elif batch:
                    self._write(batch)
                else:
                    self._probe()
            except Exception as error:  # the thread's border: a bug would end all writing for good
                self._hang_up()
                self._reach.failed(*reason_of(error))
            batch = self._next_batch()
        self._hang_up()

    def _next_batch(self) -> Removal | list[Value] | None:
        """What to do; no values when the server should be tried again; None at the end."""
        while not self._queue.is_closed:
            if (pause_s := self._reach.retry_in_s) > 0:
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
        answer = self._connected().command_or_error("INFO", "memory")
        if isinstance(answer, bytes):
            lines = [line.partition(b":") for line in answer.split(b"\r\n")]
            info = {name: value for name, _, value in lines}
            used, limit = info.get(b"used_memory", b"0"), info.get(b"maxmemory", b"0")
            self._on_memory(Memory(int(used), int(limit)))

    def _remove(self, removal: Removal) -> None:
        try:
            self._sender.remove(self._connected(), removal)
        except REDIS_ERRORS:
            self._queue.put_back(removal)
            raise
        finally:
            self._queue.settled([removal])

    def _write(self, batch: Sequence[Value]) -> None:
        """Send a batch, but for values put just before the server refused their tenant."""
        outcomes = {
            value: "server_full" if self._is_refused(value.tenant) else "unreachable"
            for value in batch
        }
        try:
            if wanted := [value for value in batch if outcomes[value] == "unreachable"]:
                self._send(wanted, outcomes)
                self._look_at_memory()
        finally:
            self._settled(outcomes)

    def _settled(self, outcomes: Outcomes) -> None:
        try:
            for value, outcome in outcomes.items():
                self._on_outcome(outcome, value)
        finally:
            self._queue.settled(list(outcomes))

    def _send(self, values: Sequence[Value], outcomes: Outcomes) -> None:
        refusal = self._sender.send(self._connected(), values, outcomes)
        if refusal is not None and not isinstance(refusal, redis.OutOfMemoryError):
            self._writing.failed(f"Redis refuses to store: {refusal}")
            return
        able = {v.tenant for v in values if outcomes[v] in ("written", "over_budget")}
        unable = {v.tenant for v in values if outcomes[v] == "server_full"} - able
        if able or unable:
            self._writing.succeeded()
        for tenant in able & self._writing_of.keys():
            self._writing_of[tenant].succeeded()
        for tenant in unable:
            self._breaker_of(tenant).failed(f"Redis refuses to store: {refusal}")

    def _is_refused(self, tenant: str) -> bool:
        breaker = self._writing_of.get(tenant)
        return self._writing.retry_in_s > 0 or (breaker is not None and breaker.retry_in_s > 0)

    def _breaker_of(self, tenant: str) -> Breaker:
        if tenant not in self._writing_of:
            what = f"Writing to the KV store at {self._address} for {tenant!r}"
            self._writing_of[tenant] = Breaker(what, first_retry_s=RETRY_S)
        return self._writing_of[tenant]

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
