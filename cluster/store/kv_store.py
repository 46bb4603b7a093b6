"""The long-context store: KV values in Redis, written behind the step and read beside it.

Redis may be full, slow, or gone, and what it holds may be damaged: that costs warmth, never an
answer, and never an exception from here. The calls that a decoder's step makes (`put`, `look_up`,
`read`, `worth_fetching`) don't wait for the network.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cluster.config import StoreConfig
from cluster.metric_families import TenantGauge
from cluster.metrics import Metrics
from cluster.store.breaker import Breaker
from cluster.store.rates import RateMeter, Rates, worth_fetching
from cluster.store.reader import Lookup, Read, Reader
from cluster.store.redis import RedisAddress
from cluster.store.value import Buffer, short_fingerprint
from cluster.store.write_queue import Value
from cluster.store.writer import Memory, Writer

MAX_LOST = 1 << 16  # keys that are kept for a caller of `take_lost`
WRITE_OUTCOMES = ("written", "present", "queue_full", "unreachable", "server_full", "over_budget")
READ_OUTCOMES = ("ok", "missing", "damaged", "foreign", "unreachable")


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """What an operator wants to know at a glance."""

    address: str
    is_up: bool
    is_writable: bool
    used_bytes: int  # of the server's memory
    max_bytes: int  # its limit; 0: none, or not known yet
    queue_bytes: int  # that wait to be written
    num_decided: Mapping[str, int]  # prefixes by choice, as in the metric


class KVStore:
    """The store of one model, as one process sees it. Any thread may call.

    `fingerprint` stands for all that decides what a value's bytes mean (model, dtype, layout).
    `budget_of` gives a tenant's budget in bytes where it isn't `config.tenant_bytes`. Raises
    ConfigError for an address that can't be used; a server that isn't there is no error.
    """

    def __init__(
        self,
        address: RedisAddress,
        fingerprint: bytes,
        model: str,
        metrics: Metrics,
        config: StoreConfig | None = None,
        budget_of: Callable[[str], int] | None = None,
    ) -> None:
        address.check()
        config = config or StoreConfig()
        self._model, self._metrics = model, metrics
        self._meter = RateMeter()
        self._num_decided = dict.fromkeys(("fetch", "recompute", "given_up"), 0)
        # All are shown from the start, as 0: an alert on what grows would miss the first ones.
        for choice in self._num_decided:
            metrics.kv_store_decisions_total(model, choice)
        for outcome in WRITE_OUTCOMES:
            metrics.kv_store_writes_total(model, outcome)
        for outcome in READ_OUTCOMES:
            metrics.kv_store_reads_total(model, outcome)
        for direction in ("read", "written"):
            metrics.kv_store_bytes_total(model, direction)
        metrics.kv_store_read_bytes_per_second(model)
        ttl_ms, fingerprint = round(config.ttl_s * 1000), short_fingerprint(fingerprint)
        metrics.kv_store_up(model).set(1)
        metrics.kv_store_writable(model).set_function(lambda: self._writer.is_writable)
        metrics.kv_store_queue_bytes(model).set_function(lambda: self._writer.queue_bytes)
        reach = Breaker(f"The KV store at {address}", metrics.kv_store_up(model).set)
        self._address = address
        self._reach = reach
        self._memory = Memory(0, 0)
        self._lost: deque[tuple[str, bytes]] = deque(maxlen=MAX_LOST)
        self._writer = Writer(
            address,
            fingerprint,
            reach,
            queue_bytes=config.queue_bytes,
            ttl_ms=ttl_ms,
            budget_of=budget_of or (lambda tenant: config.tenant_bytes),
            on_outcome=self._count_write,
            on_used=TenantGauge(metrics.kv_store_used_bytes, model).set,
            on_memory=self._note_memory,
        )
        self._reader = Reader(
            address,
            fingerprint,
            reach,
            num_connections=config.connections,
            ttl_ms=ttl_ms,
            on_lookup_s=self._meter.saw_lookup,
        )

    @property
    def is_up(self) -> bool:
        """Whether Redis answered when it was last asked."""
        return self._reach.is_closed

    @property
    def status(self) -> StoreStatus:
        """How it is doing, as last seen."""
        return StoreStatus(
            str(self._address),
            self.is_up,
            self._writer.is_writable,
            self._memory.used_bytes,
            self._memory.max_bytes,
            self._writer.queue_bytes,
            dict(self._num_decided),
        )

    @property
    def rates(self) -> Rates:
        """What reads reached lately."""
        return self._meter.rates

    def takes(self, tenant: str, num_bytes: int) -> bool:
        """Whether a `put` of this size would be queued now: to ask before making a copy."""
        return self._writer.refusal(tenant, num_bytes) is None

    def put(self, tenant: str, key: bytes, parts: Sequence[Buffer]) -> bool:
        """Queue a value to be written; False where it is dropped instead, and counted.

        The parts are not copied: they belong to the store from now on and must not change. A value
        that Redis has under this key is not sent again, so a key must stand for its content.
        """
        views = [memoryview(part).cast("B") for part in parts]
        return self._writer.put(Value(tenant, key, views, sum(map(len, views))))

    def remove(self, tenant: str, keys: Sequence[bytes]) -> None:
        """Let Redis have none of these values, once those put before are written; sessions that
        need them go on needing them. Where it is away, this happens when it is back.
        """
        self._writer.remove(tenant, keys)

    def take_lost(self) -> list[tuple[str, bytes]]:
        """Tenants and keys of values that were put and didn't get to Redis, each told once."""
        lost = []
        with suppress(IndexError):  # another thread may take some, too
            while True:
                lost.append(self._lost.popleft())
        return lost

    def look_up(self, tenant: str, keys: Sequence[bytes], *, is_use: bool = False) -> Lookup:
        """Ask which keys are there and how long their payloads are. With `is_use` they count as
        used; reading values doesn't.
        """
        lookup = Lookup(tenant, keys, is_use=is_use)
        self._reader.submit(lookup)
        return lookup

    def read(self, tenant: str, wanted: Sequence[tuple[bytes, Sequence[Buffer]]]) -> Read:
        """Read values, in this order, each straight into writable memory as long as its payload.

        The memory of a value that didn't come, or came damaged, holds anything at all.
        """
        views = [(key, [memoryview(part).cast("B") for part in parts]) for key, parts in wanted]
        read = Read(tenant, views, self._count_read)
        if views:
            self._reader.submit(read)
        else:
            read.stop()
        return read

    def worth_fetching(self, num_bytes: int, compute_s: float | None) -> bool:
        """Decide, by the measured rates, between reading these bytes and computing for so long;
        None where nobody knows how long.
        """
        rates = self._meter.rates
        fetch = worth_fetching(num_bytes, compute_s, rates.read_bytes_per_s, rates.latency_s)
        self._count_decision("fetch" if fetch else "recompute")
        return fetch

    def gave_up(self) -> None:
        """Count a prefix that took longer to come than computing it would have taken."""
        self._count_decision("given_up")

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was put before is written or given up; whether that came in time."""
        return self._writer.flush(timeout_s)

    def close(self) -> None:
        """End the threads and give up what still waits; `flush` first to keep it."""
        self._writer.close()
        self._reader.close()

    def __enter__(self) -> KVStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count_decision(self, choice: str) -> None:
        self._num_decided[choice] += 1
        self._metrics.kv_store_decisions_total(self._model, choice).inc()

    def _note_memory(self, memory: Memory) -> None:
        self._memory = memory
        self._metrics.kv_store_memory_bytes(self._model).set(memory.used_bytes)
        self._metrics.kv_store_max_bytes(self._model).set(memory.max_bytes)

    def _count_write(self, outcome: str, value: Value) -> None:
        self._metrics.kv_store_writes_total(self._model, outcome).inc()
        if outcome == "written":
            self._metrics.kv_store_bytes_total(self._model, "written").inc(value.num_bytes)
        elif outcome not in ("present", "over_budget"):  # the latter would be refused again
            self._lost.append((value.tenant, value.key))

    def _count_read(self, read: Read) -> None:
        for outcome in read.outcomes:
            self._metrics.kv_store_reads_total(self._model, outcome).inc()
        self._metrics.kv_store_bytes_total(self._model, "read").inc(read.num_bytes)
        if read.is_cancelled or all(outcome == "ok" for outcome in read.outcomes):
            self._meter.saw_read(read.num_bytes, time.perf_counter() - read.started_s)
        rate = self._meter.rates.read_bytes_per_s
        if rate is not None:
            self._metrics.kv_store_read_bytes_per_second(self._model).set(rate)
