"""Look-ups and reads: threads with a connection each fill the caller's memory from Redis."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from cluster.store.breaker import Breaker
from cluster.store.redis import BulkConnection, RedisAddress, packed, reason_of
from cluster.store.scripts import LOOK, LOOK_UP, REMOVE_VALUES, USE, tenant_prefix, value_name
from cluster.store.value import (
    HEADER_BYTES,
    BadValue,
    DamagedValue,
    ForeignValue,
    hasher,
    parse_header,
)

AHEAD = 2  # values asked for at once on a connection; the server holds a copy of each
KEYS_AT_ONCE = 1000  # in a look-up: the server does nothing else meanwhile


class Lookup:
    """Which keys are there. Poll `done`, then take `result`; any thread may."""

    def __init__(self, tenant: str, keys: Sequence[bytes], *, is_use: bool) -> None:
        self.tenant = tenant
        self.is_use = is_use
        self.keys = keys
        self._finished = threading.Event()
        self._sizes: list[int | None] = [None] * len(keys)

    def done(self) -> bool:
        """Whether the answer is there; never blocks."""
        return self._finished.is_set()

    def result(self, timeout_s: float | None = None) -> list[int | None]:
        """Bytes of each key's payload, None where it is absent or Redis didn't answer."""
        if not self._finished.wait(timeout_s):
            raise TimeoutError
        return self._sizes

    def finish(self, sizes: list[int | None] | None) -> None:
        """For the reading thread: the answer; None where there was none."""
        self._sizes = sizes or self._sizes
        self._finished.set()


class Read:
    """Values on their way into the caller's memory. Any thread may poll.

    Until `done`, the memory belongs to the store, after `cancel` too.
    """

    def __init__(
        self,
        tenant: str,
        wanted: Sequence[tuple[bytes, Sequence[memoryview]]],
        on_done: Callable[[Read], None],
    ) -> None:
        self.tenant = tenant
        self.wanted = wanted
        self.started_s = time.perf_counter()
        self.outcomes = ["unreachable"] * len(wanted)
        self.is_cancelled = False
        self._on_done = on_done
        self._lock = threading.Lock()
        self._next = 0
        self._num_under_way = 0
        self._finished = threading.Event()

    @property
    def num_bytes(self) -> int:
        """Bytes of payload that came and are right."""
        return sum(
            sum(len(view) for view in views)
            for (_, views), outcome in zip(self.wanted, self.outcomes, strict=True)
            if outcome == "ok"
        )

    def done(self) -> bool:
        """Whether nothing more will be written to the memory; never blocks."""
        return self._finished.is_set()

    def result(self, timeout_s: float | None = None) -> list[bool]:
        """For each wanted key, whether its exact bytes are in the memory now."""
        if not self._finished.wait(timeout_s):
            raise TimeoutError
        return [outcome == "ok" for outcome in self.outcomes]

    def cancel(self) -> None:
        """Ask for nothing more. What is under way still comes: wait for `done`."""
        self.is_cancelled = True
        self.stop()

    def take(self) -> int | None:
        """For a reading thread: the next index to ask for."""
        with self._lock:
            if self._next >= len(self.wanted):
                return None
            self._next += 1
            self._num_under_way += 1
            return self._next - 1

    def settle(self, index: int, outcome: str) -> None:
        """For a reading thread: what became of an index it took."""
        with self._lock:
            self.outcomes[index] = outcome
            self._num_under_way -= 1
        self._finish_if_over()

    def stop(self) -> None:
        """Let no index be taken any more."""
        with self._lock:
            self._next = len(self.wanted)
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        with self._lock:
            is_over = self._next >= len(self.wanted) and self._num_under_way == 0
            if not is_over or self._finished.is_set():
                return
            self._finished.set()
        self._on_done(self)


class Reader:
    """The threads. A value that is no good is removed from Redis, so that it can come anew."""

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
        self._address = address
        self._fingerprint = fingerprint
        self._reach = reach
        self._ttl_ms = ttl_ms
        self._on_lookup_s = on_lookup_s
        self._jobs: SimpleQueue[Lookup | Read | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"kv-reader-{i}", daemon=True)
            for i in range(num_connections)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Lookup | Read) -> None:
        """Begin a job; it ends at once where Redis is known to be away."""
        if not self._reach.is_closed:
            _give_up(job)
        elif isinstance(job, Lookup):
            self._jobs.put(job)
        else:
            for _ in self._threads:  # each takes what the others haven't
                self._jobs.put(job)

    def close(self) -> None:
        """End the threads; jobs that wait come to nothing."""
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
            except Exception as error:  # the thread's border: a bug would end its reads for good
                if connection is not None:
                    connection.close()
                connection = None
                self._reach.failed(*reason_of(error))
                _give_up(job)
        if connection is not None:
            connection.close()

    def _do(self, connection: BulkConnection, job: Lookup | Read) -> None:
        if isinstance(job, Lookup):
            job.finish(self._look_up(connection, job))
        else:
            bad_keys = self._read(connection, job)
            if bad_keys:
                connection.command(*self._script(REMOVE_VALUES, job.tenant), *bad_keys)
        self._reach.succeeded()

    def _look_up(self, connection: BulkConnection, job: Lookup) -> list[int | None]:
        start_s = time.perf_counter()
        lengths: list[int] = []
        for at in range(0, len(job.keys), KEYS_AT_ONCE):
            keys = job.keys[at : at + KEYS_AT_ONCE]
            script = self._script(LOOK_UP, job.tenant)
            found: bytes = connection.command(*script, USE if job.is_use else LOOK, *keys)
            lengths += map(int, found.split())
        self._on_lookup_s(time.perf_counter() - start_s)
        return [length - HEADER_BYTES if length > HEADER_BYTES else None for length in lengths]

    def _script(self, script: str, tenant: str) -> tuple[bytes | str, ...]:
        return ("EVAL", script, "1", tenant_prefix(tenant), str(self._ttl_ms))

    def _read(self, connection: BulkConnection, job: Read) -> list[bytes]:
        """Take part in a read until nothing is left to take; the keys whose values are no good."""
        bad_keys: list[bytes] = []
        under_way: deque[int] = deque()
        try:
            while True:
                while len(under_way) < AHEAD and (index := job.take()) is not None:
                    under_way.append(index)
                    key, _ = job.wanted[index]
                    connection.send([packed([b"GET", value_name(job.tenant, key)])])
                if not under_way:
                    return bad_keys
                key, views = job.wanted[under_way[0]]
                outcome = self._receive(connection, value_name(job.tenant, key), views)
                if outcome in ("damaged", "foreign"):
                    bad_keys.append(key)
                job.settle(under_way.popleft(), outcome)
        finally:
            for index in under_way:
                job.settle(index, "unreachable")

    def _receive(self, connection: BulkConnection, name: bytes, views: Sequence[memoryview]) -> str:
        """Read the reply to a GET into the views: the outcome."""
        length = connection.open_bulk()
        if length is None:
            return "missing"
        head = connection.read(min(length, HEADER_BYTES))
        try:
            header = parse_header(head, length, self._fingerprint)
            if header.payload_bytes != sum(len(view) for view in views):
                raise DamagedValue("of another length than expected")
        except BadValue as error:
            connection.skip(length - len(head))
            connection.end_bulk()
            return "foreign" if isinstance(error, ForeignValue) else "damaged"
        checksum = hasher(header.prefix, name)
        for view in views:
            connection.read_into(view, checksum.update)
        connection.end_bulk()
        return "ok" if checksum.digest() == header.checksum else "damaged"


def _give_up(job: Lookup | Read) -> None:
    if isinstance(job, Lookup):
        job.finish(None)
    else:
        job.stop()
