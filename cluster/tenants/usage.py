"""What each tenant used on each day, kept in Redis.

    briolette:usage:{2026-11-24}          set of the tenants that used anything that day
    briolette:usage:{2026-11-24}:tenant   hash: the fields of `Used`, and the last batch of each
                                          writer, so that one sent twice counts once

They stand apart from all else of a tenant's, and outlive it. Days are UTC's. A gateway counts in
memory and writes once a second; what Redis doesn't take stays in memory until it does.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime, timedelta
from typing import Any

from cluster.errors import Unavailable
from cluster.store.breaker import Breaker
from cluster.store.redis import REDIS_ERRORS, RedisAddress
from cluster.tenants.scripts import ADD_USAGE

KEPT_S = 400 * 86400  # after a day's last request
FLUSH_S = 1.0
MAX_WAITING = 20_000  # tenants' days in memory while Redis is away; then the oldest go

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Used:
    """What requests have cost together."""

    requests: int = 0
    prompt_tokens: int = 0  # cached ones too
    output_tokens: int = 0
    cached_tokens: int = 0
    saved_prefill_s: float = 0.0  # what computing the cached ones would have taken

    def add(self, other: Used) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True, slots=True)
class DayUsed:
    """One row of a report."""

    day: date
    tenant: str
    used: Used


_Books = dict[tuple[date, str], Used]


class UsageBooks:
    """Counts what tenants use. Any thread may call; only `count` never waits."""

    def __init__(self, address: RedisAddress | None) -> None:
        """Without an address the books are lost with this object."""
        self._address = address
        self._client = None if address is None else address.client()
        self._lock = threading.Lock()
        self._waiting: _Books = {}
        self._batch: _Books = {}  # of them, what is being written
        self._batch_id = 0
        self._writer_id = uuid.uuid4().hex[:12]
        self._flushing = threading.Lock()
        self._reach = Breaker(f"Usage at {address}")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        if self._client is not None:
            self._thread.start()

    def count(self, tenant: str, used: Used, day: date | None = None) -> None:
        """Add to a tenant's day, by default today."""
        with self._lock:
            self._waiting.setdefault((day or today(), tenant), Used()).add(used)
            if len(self._waiting) > MAX_WAITING:
                oldest = min(self._waiting)
                log.error("What %s used on %s is lost: Redis is away too long.", *oldest[::-1])
                del self._waiting[oldest]

    def flush(self) -> None:
        """Write all that waits. Raises Unavailable, and then nothing is lost."""
        if self._client is None:
            return
        with self._flushing:
            if self._batch:  # what failed goes again as it was, so that it counts once
                self._write_batch()
            with self._lock:
                self._batch, self._waiting = self._waiting, {}
            self._batch_id += 1
            self._write_batch()

    def read(
        self, since: date, until: date, tenants: Collection[str] | None = None
    ) -> list[DayUsed]:
        """The days from one to another, both included, of some tenants or of all, by day and
        tenant. Raises Unavailable.
        """
        self.flush()
        days = [since + timedelta(days=i) for i in range((until - since).days + 1)]
        found = self._stored(days, tenants) if self._client is not None else dict(self._waiting)
        return [
            DayUsed(day, tenant, used)
            for (day, tenant), used in sorted(found.items(), key=lambda item: item[0])
            if since <= day <= until and (tenants is None or tenant in tenants)
        ]

    def close(self) -> None:
        """Write what waits, if Redis is there, and end."""
        self._end.set()
        if self._client is not None:
            self._thread.join()
            self._client.close()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._end.wait(max(FLUSH_S, self._reach.retry_in_s))
            try:
                self.flush()
            except Unavailable as error:
                if is_last and (self._waiting or self._batch):
                    log.error("What was used lately is lost: %s", error)

    def _write_batch(self) -> None:
        assert self._address is not None
        try:
            self._write(self._batch)
        except REDIS_ERRORS as error:
            self._reach.failed(f"can't be written: {error}")
            raise self._address.unavailable(error) from None
        self._reach.succeeded()
        self._batch = {}

    def _write(self, batch: _Books) -> None:
        assert self._client is not None
        pipeline = self._client.pipeline(transaction=False)
        for (day, tenant), used in batch.items():
            grown = [str(item) for pair in asdict(used).items() for item in pair]
            head = (tenant, self._writer_id, str(self._batch_id), str(KEPT_S))
            pipeline.eval(ADD_USAGE, 2, _tenants(day), _book(day, tenant), *head, *grown)
        pipeline.execute()

    def _stored(self, days: Sequence[date], tenants: Collection[str] | None) -> _Books:
        assert self._address is not None
        try:
            if tenants is None:
                names = self._pipelined("smembers", [_tenants(day) for day in days])
                by_day = [[name.decode() for name in of_day] for of_day in names]
            else:
                by_day = [list(tenants)] * len(days)
            rows = [
                (day, name) for day, of_day in zip(days, by_day, strict=True) for name in of_day
            ]
            books = self._pipelined("hgetall", [_book(*row) for row in rows])
        except REDIS_ERRORS as error:
            raise self._address.unavailable(error) from None
        return {row: _to_used(book) for row, book in zip(rows, books, strict=True) if book}

    def _pipelined(self, command: str, keys: Sequence[str]) -> list[Any]:
        assert self._client is not None
        pipeline = self._client.pipeline(transaction=False)
        for key in keys:
            getattr(pipeline, command)(key)
        replies: list[Any] = pipeline.execute()
        return replies


def today() -> date:
    """In UTC."""
    return datetime.now(UTC).date()


def _tenants(day: date) -> str:
    return f"briolette:usage:{{{day.isoformat()}}}"  # braces: in a Redis Cluster, one slot


def _book(day: date, tenant: str) -> str:
    return f"{_tenants(day)}:{tenant}"


def _to_used(book: dict[bytes, bytes]) -> Used:
    kept = {field.name: float(book.get(field.name.encode(), 0)) for field in fields(Used)}
    saved_s = kept.pop("saved_prefill_s")
    return Used(**{name: round(value) for name, value in kept.items()}, saved_prefill_s=saved_s)
