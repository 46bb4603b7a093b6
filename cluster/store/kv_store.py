"""The long-context store: KV values in Redis, written behind the step and read beside it.

Redis may be full, slow, or gone, and what it holds may be damaged: then prefixes are computed
again, but no request fails and no exception leaves this module. The calls that a decoder's step
makes (`put`, `look_up`, `read`, `worth_fetching`) don't wait for the network.
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
from cluster.store.reader import PendingLookup, PendingRead, Reader
from cluster.store.redis import RedisAddress
from cluster.store.sender import Sender, ServerMemory
from cluster.store.value import Buffer, StoredValue, short_fingerprint
from cluster.store.writer import Writer

MAX_LOST = 1 << 16  # keys kept for `take_lost`; then the oldest are forgotten
WRITE_OUTCOMES = ("written", "present", "queue_full", "unreachable", "server_full", "over_budget")
READ_OUTCOMES = ("ok", "missing", "damaged", "foreign", "unreachable")
CHOICES = ("fetch", "recompute", "given_up")


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """The state of the store for an operator, as last seen."""

    address: str
    is_up: bool
    is_writable: bool
    used_bytes: int  # of the server's memory
    max_bytes: int  # its limit; 0: none, or not known yet
    queue_bytes: int  # queued or in flight
    num_decided: Mapping[str, int]  # prefixes found in the store, by choice as in the metric


class KVStore:
    """The store of one model, as one process sees it. Any thread may call."""

    def __init__(
        self,
        address: RedisAddress,
        fingerprint: bytes,
        model: str,
        metrics: Metrics,
        config: StoreConfig | None = None,
        budget_of: Callable[[str], int] | None = None,
    ) -> None:
        """Start the threads, which connect when they can: a server that is away is no error.

        Args:
            address: The Redis server.
            fingerprint: Stands for all that decides what a value's bytes mean (model, dtype,
                layout); of any length.
            model: The model's id, for metrics.
            metrics: This process's metrics.
            config: The configuration of the store.
            budget_of: Returns a tenant's budget in bytes; by default `config.tenant_bytes`.

        Raises:
            ConfigError: If the address can't be used.
        """
        address.check()
        config = config or StoreConfig()
        self._address, self._model, self._metrics = address, model, metrics
        self._meter = RateMeter()
        self._memory = ServerMemory(used_bytes=0, max_bytes=0)
        self._num_decided = dict.fromkeys(CHOICES, 0)
        self._lost: deque[tuple[str, bytes]] = deque(maxlen=MAX_LOST)
        self._show_from_the_start()
        self._reach = Breaker(
            f"The KV store at {address}", on_change=metrics.kv_store_up(model).set
        )
        ttl_ms, fingerprint = round(config.ttl_s * 1000), short_fingerprint(fingerprint)
        sender = Sender(
            address,
            fingerprint,
            ttl_ms=ttl_ms,
            budget_of=budget_of or (lambda tenant: config.tenant_bytes),
            on_used=TenantGauge(metrics.kv_store_used_bytes, model).set,
            on_memory=self._note_memory,
        )
        self._writer = Writer(
            sender,
            self._reach,
            max_queue_bytes=config.queue_bytes,
            on_outcome=self._count_write,
        )
        self._reader = Reader(
            address,
            fingerprint,
            self._reach,
            num_connections=config.connections,
            ttl_ms=ttl_ms,
            on_lookup_s=self._meter.saw_lookup,
        )

    @property
    def is_up(self) -> bool:
        """True if Redis answered when it was last asked."""
        return self._reach.is_closed

    @property
    def status(self) -> StoreStatus:
        """The store's state for an operator, as last seen."""
        return StoreStatus(
            address=str(self._address),
            is_up=self.is_up,
            is_writable=self._writer.is_writable,
            used_bytes=self._memory.used_bytes,
            max_bytes=self._memory.max_bytes,
            queue_bytes=self._writer.queue_bytes,
            num_decided=dict(self._num_decided),
        )

    @property
    def rates(self) -> Rates:
        """Bandwidth and latency that reads reached lately."""
        return self._meter.rates

    def takes(self, tenant: str, num_bytes: int) -> bool:
        """Return whether a `put` of this size would be queued now: ask before making a copy."""
        return self._writer.refusal(tenant, num_bytes) is None

    def put(self, tenant: str, key: bytes, parts: Sequence[Buffer]) -> bool:
        """Queue a value to be written.

        Args:
            tenant: The tenant whose value it is, and whose budget it counts against.
            key: Stands for the content: a value that Redis has under this key is not sent again.
            parts: The payload, one part after the other. It is not copied and must not change.

        Returns:
            False if it was dropped, which is counted.
        """
        views = [memoryview(part).cast("B") for part in parts]
        return self._writer.put(StoredValue(tenant, key, views, sum(map(len, views))))

    def remove(self, tenant: str, keys: Sequence[bytes]) -> None:
        """Queue the removal of values, those that were put before included. Sessions that need them
        go on needing them. If Redis is away, it happens when Redis is back.
        """
        self._writer.remove(tenant, keys)

    def take_lost(self) -> list[tuple[str, bytes]]:
        """Return tenants and keys of values that were put and didn't get to Redis, each once."""
        lost = []
        with suppress(IndexError):  # another thread may take some, too
            while True:
                lost.append(self._lost.popleft())
        return lost

    def look_up(self, tenant: str, keys: Sequence[bytes], *, touch: bool = False) -> PendingLookup:
        """Ask which keys are there and how long their payloads are.

        Args:
            tenant: The tenant whose values they are.
            keys: The keys of the values.
            touch: Refresh the values' times of last use (LRU), which reading them doesn't.
        """
        lookup = PendingLookup(tenant, keys, touch=touch)
        self._reader.submit(lookup)
        return lookup

    def read(self, tenant: str, wanted: Sequence[tuple[bytes, Sequence[Buffer]]]) -> PendingRead:
        """Read values straight into the caller's memory.

        Args:
            tenant: The tenant whose values they are.
            wanted: For each value, in the order to read them, its key and writable memory as long
                as its payload. Memory of a value that is absent or damaged is left undefined.
        """
        views = [(key, [memoryview(part).cast("B") for part in parts]) for key, parts in wanted]
        read = PendingRead(tenant, views, self._count_read)
        if views:
            self._reader.submit(read)
        else:
            read.stop()
        return read

    def worth_fetching(self, num_bytes: int, compute_s: float | None) -> bool:
        """Decide by the measured rates whether to fetch a prefix or to recompute it.

        Args:
            num_bytes: Payload bytes to fetch.
            compute_s: Seconds to recompute it; None if unknown, which speaks for fetching.

        Returns:
            True to fetch it. The decision is counted.
        """
        rates = self._meter.rates
        fetch = worth_fetching(num_bytes, compute_s, rates.read_bytes_per_s, rates.latency_s)
        self._count_decision("fetch" if fetch else "recompute")
        return fetch

    def count_given_up(self) -> None:
        """Count a prefix that took longer to fetch than to recompute."""
        self._count_decision("given_up")

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was put before is written or given up; return whether that came in
        time.
        """
        return self._writer.flush(timeout_s)

    def close(self) -> None:
        """End the threads and give up what is queued; `flush` first to keep it."""
        self._writer.close()
        self._reader.close()

    def __enter__(self) -> KVStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show_from_the_start(self) -> None:
        """Create all metrics with 0: an alert on their growth would miss a first value."""
        metrics, model = self._metrics, self._model
        for choice in CHOICES:
            metrics.kv_store_decisions_total(model, choice)
        for outcome in WRITE_OUTCOMES:
            metrics.kv_store_writes_total(model, outcome)
        for outcome in READ_OUTCOMES:
            metrics.kv_store_reads_total(model, outcome)
        for direction in ("read", "written"):
            metrics.kv_store_bytes_total(model, direction)
        metrics.kv_store_read_bytes_per_second(model)
        metrics.kv_store_up(model).set(1)
        metrics.kv_store_writable(model).set_function(lambda: self._writer.is_writable)
        metrics.kv_store_queue_bytes(model).set_function(lambda: self._writer.queue_bytes)

    def _count_decision(self, choice: str) -> None:
        self._num_decided[choice] += 1
        self._metrics.kv_store_decisions_total(self._model, choice).inc()

    def _note_memory(self, memory: ServerMemory) -> None:
        self._memory = memory
        self._metrics.kv_store_memory_bytes(self._model).set(memory.used_bytes)
        self._metrics.kv_store_max_bytes(self._model).set(memory.max_bytes)

    def _count_write(self, outcome: str, value: StoredValue) -> None:
        self._metrics.kv_store_writes_total(self._model, outcome).inc()
        if outcome == "written":
            self._metrics.kv_store_bytes_total(self._model, "written").inc(value.num_bytes)
        elif outcome not in ("present", "over_budget"):  # over the budget it would be again
            self._lost.append((value.tenant, value.key))

    def _count_read(self, read: PendingRead) -> None:
        for outcome in read.outcomes:
            self._metrics.kv_store_reads_total(self._model, outcome).inc()
        self._metrics.kv_store_bytes_total(self._model, "read").inc(read.num_bytes)
        if read.is_cancelled or all(outcome == "ok" for outcome in read.outcomes):
            self._meter.saw_read(read.num_bytes, time.perf_counter() - read.started_at)
        rate = self._meter.rates.read_bytes_per_s
        if rate is not None:
            self._metrics.kv_store_read_bytes_per_second(self._model).set(rate)
