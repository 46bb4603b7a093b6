"""Reading values: threads, each with a connection, fill the caller's memory from Redis."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from cluster.store.breaker import Breaker
from cluster.store.redis import BulkConnection, RedisAddress, packed, reason_of
from cluster.store.scripts import LOOK, LOOK_UP, REMOVE_VALUES, TOUCH, tenant_prefix, value_name
from cluster.store.value import (
    HEADER_BYTES,
    BadValue,
    DamagedValue,
    ForeignValue,
    hasher,
    parse_header,
)

AHEAD = 2  # values requested at once on a connection; the server holds a copy of each
KEYS_AT_ONCE = 1000  # in a look-up: the server does nothing else meanwhile


class PendingLookup:
    """A look-up on its way: poll `done`, then take `result`. Any thread may call."""

    def __init__(self, tenant: str, keys: Sequence[bytes], *, touch: bool) -> None:
        self.tenant = tenant
        self.touch = touch
        self.keys = keys
        self._finished = threading.Event()
        self._sizes: list[int | None] = [None] * len(keys)

    def done(self) -> bool:
        """Return whether the answer is there, without blocking."""
        return self._finished.is_set()

    def result(self, timeout_s: float | None = None) -> list[int | None]:
        """Return the bytes of each key's payload, None if it is absent or Redis didn't answer.
        Raises TimeoutError.
        """
        if not self._finished.wait(timeout_s):
            raise TimeoutError
        return self._sizes

    def finish(self, sizes: list[int | None] | None) -> None:
        """Set the answer; None if Redis gave none. For the reading thread."""
        self._sizes = sizes or self._sizes
        self._finished.set()


class PendingRead:
    """Values on their way into the caller's memory. Any thread may call.

    Until `done`, the memory belongs to the store, even after `cancel`.
    """

    def __init__(
        self,
        tenant: str,
        wanted: Sequence[tuple[bytes, Sequence[memoryview]]],
        on_done: Callable[[PendingRead], None],
    ) -> None:
        self.tenant = tenant
        self.wanted = wanted
        self.started_at = time.perf_counter()
        self.outcomes = ["unreachable"] * len(wanted)
        self.is_cancelled = False
        self._on_done = on_done
        self._lock = threading.Lock()
        self._next = 0
        self.num_in_flight = 0
        self._finished = threading.Event()

    @property
    def num_bytes(self) -> int:
        """Bytes of payload that arrived undamaged."""
        return sum(
            sum(len(view) for view in views)
            for (_, views), outcome in zip(self.wanted, self.outcomes, strict=True)
            if outcome == "ok"
        )

    def done(self) -> bool:
        """Return whether nothing more will be written to the memory, without blocking."""
        return self._finished.is_set()

    def result(self, timeout_s: float | None = None) -> list[bool]:
        """Return for each wanted key whether its exact payload is in the memory now. Raises
        TimeoutError.
        """
        if not self._finished.wait(timeout_s):
            raise TimeoutError
        return [outcome == "ok" for outcome in self.outcomes]

    def cancel(self) -> None:
        """Request no more values. Those in flight still arrive: wait for `done`."""
        self.is_cancelled = True
        self.stop()

    def take(self) -> int | None:
        """Take the next index to request; None if there is none. For a reading thread."""
        with self._lock:
            if self._next >= len(self.wanted):
                return None
            self._next += 1
            self.num_in_flight += 1
            return self._next - 1

    def settle(self, index: int, outcome: str) -> None:
        """Set the outcome of an index that was taken. For a reading thread."""
        with self._lock:
            self.outcomes[index] = outcome
            self.num_in_flight -= 1
        self._finish_if_over()

    def stop(self) -> None:
        """Let no more indices be taken."""
        with self._lock:
            self._next = len(self.wanted)
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        with self._lock:
            is_over = self._next >= len(self.wanted) and self.num_in_flight == 0
            if not is_over or self._finished.is_set():
                return
            self._finished.set()
        self._on_done(self)


class Reader:
    """The reading threads. They remove damaged values from Redis, so that they are stored anew."""

    def __init__(
        self,
        address: RedisAddress,
        fingerprint: bytes,
        reach: Breaker,
        *,
        num_connections: int,
        ttl_ms: int,
        on_lookup_s: Callable[[float], None],
    ) -> None:
        """Start the threads.

        Args:
            address: The Redis server.
            fingerprint: 16 bytes; values of another one count as foreign.
            reach: Open while Redis is away.
            num_connections: Number of threads, each with a connection.
            ttl_ms: Time to live of an unused value in milliseconds.
            on_lookup_s: Called with the seconds that each look-up took.
        """
        self._address = address
        self._fingerprint = fingerprint
        self._reach = reach
        self._ttl_ms = ttl_ms
        self._on_lookup_s = on_lookup_s
        self._jobs: SimpleQueue[PendingLookup | PendingRead | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"kv-reader-{i}", daemon=True)
            for i in range(num_connections)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: PendingLookup | PendingRead) -> None:
        """Start a job; it ends at once if Redis is known to be away."""
        if not self._reach.is_closed:
            _give_up(job)
        elif isinstance(job, PendingLookup):
            self._jobs.put(job)
        else:
            for _ in self._threads:  # each takes what the others haven't
                self._jobs.put(job)

    def close(self) -> None:
        """End the threads; queued jobs end without an answer."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        while not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                _give_up(job)

    def _run(self) -> None:
        connection: BulkConnection | None = None
        while (job := self._jobs.get()) is not None:
            if job.done() or not self._reach.is_closed:
                _give_up(job)
                continue
            try:
                if connection is not None and connection.is_stale():
                    connection.close()
                    connection = None
                if connection is None:
                    connection = self._address.connect()
                self._do(connection, job)
            except Exception as error:  # border: the thread; a bug would end its reads for good
                if connection is not None:
                    connection.close()
                connection = None
                self._reach.failed(*reason_of(error))
                _give_up(job)
        if connection is not None:
            connection.close()

    def _do(self, connection: BulkConnection, job: PendingLookup | PendingRead) -> None:
        if isinstance(job, PendingLookup):
            job.finish(self._look_up(connection, job))
        else:
            bad_keys = self._read(connection, job)
            if bad_keys:
                connection.command(*self._script(REMOVE_VALUES, job.tenant), *bad_keys)
        self._reach.succeeded()

    def _look_up(self, connection: BulkConnection, job: PendingLookup) -> list[int | None]:
        started_at = time.perf_counter()
        lengths: list[int] = []
        for at in range(0, len(job.keys), KEYS_AT_ONCE):
            keys = job.keys[at : at + KEYS_AT_ONCE]
            script = self._script(LOOK_UP, job.tenant)
            found: bytes = connection.command(*script, TOUCH if job.touch else LOOK, *keys)
            lengths += map(int, found.split())
        self._on_lookup_s(time.perf_counter() - started_at)
        return [length - HEADER_BYTES if length > HEADER_BYTES else None for length in lengths]

    def _script(self, script: str, tenant: str) -> tuple[bytes | str, ...]:
        return ("EVAL", script, "1", tenant_prefix(tenant), str(self._ttl_ms))

    def _read(self, connection: BulkConnection, job: PendingRead) -> list[bytes]:
        """Read values until none is left to take; return the keys of those that are damaged."""
        bad_keys: list[bytes] = []
        in_flight: deque[int] = deque()
        try:
            while True:
                while len(in_flight) < AHEAD and (index := job.take()) is not None:
                    in_flight.append(index)
                    key, _ = job.wanted[index]
                    connection.send([packed([b"GET", value_name(job.tenant, key)])])
                if not in_flight:
                    return bad_keys
                key, views = job.wanted[in_flight[0]]
                outcome = self._receive(connection, value_name(job.tenant, key), views)
                if outcome in ("damaged", "foreign"):
                    bad_keys.append(key)
                job.settle(in_flight.popleft(), outcome)
        finally:
            for index in in_flight:
                job.settle(index, "unreachable")

    def _receive(self, connection: BulkConnection, name: bytes, views: Sequence[memoryview]) -> str:
        """Read the reply to a GET into the views; return the outcome."""
        length = connection.open_bulk()
        if length is None:
            return "missing"
        head = connection.read(min(length, HEADER_BYTES))
        try:
            header = parse_header(head, length, self._fingerprint)
            if header.payload_bytes != sum(len(view) for view in views):
                raise DamagedValue("another length than expected")
        except BadValue as error:
            connection.skip(length - len(head))
            connection.end_bulk()
            return "foreign" if isinstance(error, ForeignValue) else "damaged"
        checksum = hasher(header.prefix, name)
        for view in views:
            connection.read_into(view, checksum.update)
        connection.end_bulk()
        return "ok" if checksum.digest() == header.checksum else "damaged"


def _give_up(job: PendingLookup | PendingRead) -> None:
    if isinstance(job, PendingLookup):
        job.finish(None)
    else:
        job.stop()
