"""Write-behind: a thread sends queued values to Redis."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import redis

from cluster.store.breaker import Breaker
from cluster.store.redis import REDIS_ERRORS, reason_of
from cluster.store.sender import Outcomes, Sender
from cluster.store.value import StoredValue

BATCH_BYTES = 16 << 20
BATCH_VALUES = 64
IDLE_S = 0.25  # without work: then a look at whether a reader has found the server gone
RETRY_S = 5.0  # after a server refused to store; twice as long after each further refusal


@dataclass(frozen=True, slots=True)
class Removal:
    """Keys whose values are to be removed, those that were queued before included."""

    tenant: str
    keys: Sequence[bytes]
    num_bytes: int = 0


Entry: TypeAlias = StoredValue | Removal


class Writer:
    """The write queue and the thread that empties it, in order. Any thread may call.

    A value that is being sent when the connection breaks is lost; those queued behind it are sent
    later. While the server refuses to store, values are refused too: everybody's or, on a full
    server, those of tenants that can evict none of their own.
    """

    def __init__(
        self,
        sender: Sender,
        reach: Breaker,
        *,
        max_queue_bytes: int,
        on_outcome: Callable[[str, StoredValue], None],
    ) -> None:
        """Start the thread.

        Args:
            sender: The connection for writing, from now on this thread's.
            reach: Open while Redis is away.
            max_queue_bytes: Payload bytes that may be queued or in flight.
            on_outcome: Called once for each value that was put, with what became of it.
        """
        self._sender = sender
        self._reach = reach
        self._writing = Breaker(f"Writing to the KV store at {sender.address}", RETRY_S)
        self._tenant_writing: dict[str, Breaker] = {}  # of tenants that found the server full
        self._max_queue_bytes = max_queue_bytes
        self._on_outcome = on_outcome
        self._changed = threading.Condition()
        self._queue: deque[Entry] = deque()
        self._queue_bytes = 0
        self._num_put = self._num_settled = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="kv-writer", daemon=True)
        self._thread.start()

    @property
    def queue_bytes(self) -> int:
        """Bytes queued or in flight."""
        return self._queue_bytes

    @property
    def is_writable(self) -> bool:
        """True if every tenant may write."""
        tenants = list(self._tenant_writing.values())
        return self._writing.is_closed and not any(breaker.retry_in_s for breaker in tenants)

    def refusal(self, tenant: str, num_bytes: int) -> str | None:
        """Return the outcome with which a value of this size would be refused now; None if it
        would be queued.
        """
        if not self._reach.is_closed:
            return "unreachable"
        if self._is_refused(tenant):
            return "server_full"
        if self._queue_bytes + num_bytes > self._max_queue_bytes:
            return "queue_full"
        return None

    def put(self, value: StoredValue) -> bool:
        """Queue a value; return False if it was refused."""
        with self._changed:
            refusal = self.refusal(value.tenant, value.num_bytes)
            if refusal is None:
                self._enqueue(value)
        if refusal is not None:
            self._on_outcome(refusal, value)
        return refusal is None

    def remove(self, tenant: str, keys: Sequence[bytes]) -> None:
        """Queue the removal of values, those that are queued now included."""
        with self._changed:
            self._enqueue(Removal(tenant, keys))

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was put before is written or given up; return whether that came in
        time.
        """
        with self._changed:
            num_put = self._num_put
            return self._changed.wait_for(lambda: self._num_settled >= num_put, timeout_s)

    def close(self) -> None:
        """End the thread and give up what is queued."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _enqueue(self, entry: Entry) -> None:
        self._queue.append(entry)
        self._queue_bytes += entry.num_bytes
        self._num_put += 1
        self._changed.notify_all()

    # The thread

    def _run(self) -> None:
        batch: Removal | list[StoredValue] | None = []
        while batch is not None:
            try:
                if isinstance(batch, Removal):
                    self._remove(batch)
                elif batch:
                    self._write(batch)
                else:
                    self._sender.probe()
                    self._reach.succeeded()
            except Exception as error:  # border: the thread; a bug would end all writing for good
                self._sender.hang_up()
                self._reach.failed(*reason_of(error))
            batch = self._next_batch()
        self._sender.hang_up()

    def _next_batch(self) -> Removal | list[StoredValue] | None:
        """Wait for work: a removal or values; no values to probe the server; None at the end."""
        with self._changed:
            while not self._is_closed:
                if (pause_s := self._reach.retry_in_s) > 0:
                    self._changed.wait_for(lambda: self._is_closed, pause_s)
                elif not self._reach.is_closed:
                    return []
                elif self._queue:
                    return self._take()
                else:
                    self._changed.wait_for(lambda: self._queue or self._is_closed, IDLE_S)
        return None

    def _take(self) -> Removal | list[StoredValue]:
        """Take the next removal, or the values before it that make a batch."""
        batch: list[StoredValue] = []
        num_bytes = 0
        while self._queue and len(batch) < BATCH_VALUES and num_bytes < BATCH_BYTES:
            entry = self._queue[0]
            if isinstance(entry, Removal):
                if batch:
                    break
                self._queue.popleft()
                return entry
            self._queue.popleft()
            batch.append(entry)
            num_bytes += entry.num_bytes
        return batch

    def _remove(self, removal: Removal) -> None:
        try:
            self._sender.remove(removal.tenant, removal.keys)
        except REDIS_ERRORS:
            with self._changed:  # it is next once more, and isn't settled
                self._queue.appendleft(removal)
                self._num_settled -= 1
            raise
        finally:
            self._settle([removal])

    def _write(self, batch: Sequence[StoredValue]) -> None:
        """Send a batch, except for values put just before the server refused their tenant."""
        outcomes = {
            value: "server_full" if self._is_refused(value.tenant) else "unreachable"
            for value in batch
        }
        try:
            if wanted := [value for value in batch if outcomes[value] == "unreachable"]:
                self._note_refusals(wanted, outcomes, self._sender.send(wanted, outcomes))
                self._sender.look_at_memory()
        finally:
            self._report(outcomes)

    def _report(self, outcomes: Outcomes) -> None:
        try:
            for value, outcome in outcomes.items():
                self._on_outcome(outcome, value)
        finally:
            self._settle(list(outcomes))

    def _settle(self, entries: Sequence[Entry]) -> None:
        """Count entries that were taken as done or given up."""
        with self._changed:
            self._queue_bytes -= sum(entry.num_bytes for entry in entries)
            self._num_settled += len(entries)
            self._changed.notify_all()

    def _note_refusals(
        self,
        values: Sequence[StoredValue],
        outcomes: Outcomes,
        refusal: redis.ResponseError | None,
    ) -> None:
        if refusal is not None and not isinstance(refusal, redis.OutOfMemoryError):
            self._writing.failed(f"Redis refuses to store: {refusal}")
            return
        able = {v.tenant for v in values if outcomes[v] in ("written", "over_budget")}
        unable = {v.tenant for v in values if outcomes[v] == "server_full"} - able
        if able or unable:
            self._writing.succeeded()
        for tenant in able & self._tenant_writing.keys():
            self._tenant_writing[tenant].succeeded()
        for tenant in unable:
            self._breaker_of(tenant).failed(f"Redis refuses to store: {refusal}")

    def _is_refused(self, tenant: str) -> bool:
        breaker = self._tenant_writing.get(tenant)
        return self._writing.retry_in_s > 0 or (breaker is not None and breaker.retry_in_s > 0)

    def _breaker_of(self, tenant: str) -> Breaker:
        if tenant not in self._tenant_writing:
            what = f"Writing to the KV store at {self._sender.address} for {tenant!r}"
            self._tenant_writing[tenant] = Breaker(what, RETRY_S)
        return self._tenant_writing[tenant]
