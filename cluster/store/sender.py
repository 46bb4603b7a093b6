"""How values go to Redis over a connection: those that aren't there yet, each with its entry in the
books.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import redis

from cluster.store.redis import BulkConnection, packed
from cluster.store.scripts import (
    BOOK_VALUE,
    LOOK_UP,
    MAKE_ROOM,
    OVERHEAD_BYTES,
    REMOVE_VALUES,
    USE,
    tenant_prefix,
    value_name,
)
from cluster.store.value import HEADER_BYTES, header_of
from cluster.store.write_queue import Removal, Value

Outcomes = dict[Value, str]


class Sender:
    """Every method raises one of REDIS_ERRORS when the connection breaks.

    `budget_of` gives a tenant's budget in bytes; `on_used(tenant, bytes)` is told what a tenant
    uses after a write.
    """

    def __init__(
        self,
        fingerprint: bytes,
        ttl_ms: int,
        budget_of: Callable[[str], int],
        on_used: Callable[[str, int], None],
    ) -> None:
        self._fingerprint = fingerprint
        self._ttl_ms = ttl_ms
        self._budget_of = budget_of
        self._on_used = on_used

    def send(
        self, connection: BulkConnection, values: Sequence[Value], outcomes: Outcomes
    ) -> redis.ResponseError | None:
        """Send the values, and note the outcome of each one as it is known. Returns why the server
        refused one; what it refused since it is full it was asked for twice, the second time where
        the tenant could make room.
        """
        for value in self._present(connection, values):
            outcomes[value] = "present"
        absent = [value for value in values if outcomes[value] != "present"]
        refusal = self._send_all(connection, absent, outcomes)
        if isinstance(refusal, redis.OutOfMemoryError):
            refused = [value for value in absent if outcomes[value] == "server_full"]
            with_room = self._make_room(connection, refused)
            again = [value for value in refused if value.tenant in with_room]
            self._send_all(connection, again, outcomes)
        return refusal

    def remove(self, connection: BulkConnection, removal: Removal) -> None:
        """Remove values, where the server lets us."""
        script = self._script(REMOVE_VALUES, removal.tenant)
        connection.command_or_error(*script, *removal.keys)

    def _send_all(
        self, connection: BulkConnection, values: Iterable[Value], outcomes: Outcomes
    ) -> redis.ResponseError | None:
        """Send values, one ahead of the replies. Returns why the server refused one."""
        refusal = None
        under_way: deque[Value] = deque()
        for value in [*values, None]:
            if value is not None:
                connection.send(self._transaction(value))
                under_way.append(value)
            while under_way and (value is None or len(under_way) > 1):
                done = under_way.popleft()
                outcomes[done], error = self._read_outcome(connection, done)
                refusal = refusal or error
        return refusal

    def _present(self, connection: BulkConnection, values: Sequence[Value]) -> list[Value]:
        """Which of the values Redis has already, at least by their length."""
        by_tenant: dict[str, list[Value]] = {}
        for value in values:
            by_tenant.setdefault(value.tenant, []).append(value)
        present = []
        for tenant, of_tenant in by_tenant.items():
            keys = (value.key for value in of_tenant)
            found: bytes = connection.command(*self._script(LOOK_UP, tenant), USE, *keys)
            present += [
                value
                for value, length in zip(of_tenant, found.split(), strict=True)
                if int(length) == value.num_bytes + HEADER_BYTES
            ]
        return present

    def _make_room(self, connection: BulkConnection, values: Iterable[Value]) -> set[str]:
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

    def _transaction(self, value: Value) -> list[bytes | memoryview]:
        """SET and its entry in the books, both or neither; the payload is not copied."""
        name = value_name(value.tenant, value.key)
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
        replies = [connection.reply_or_error() for _ in range(4)]
        for reply in replies:  # the first has the reason; EXEC only says that there was one
            if isinstance(reply, redis.ResponseError):
                return "server_full", reply
        _, booked = replies[3]
        if isinstance(booked, redis.ResponseError):
            return "server_full", booked
        used, is_kept = booked
        self._on_used(value.tenant, used)
        return ("written" if is_kept else "over_budget"), None

    def _script(self, script: str, tenant: str) -> tuple[bytes, ...]:
        ttl = str(self._ttl_ms).encode()
        return (b"EVAL", script.encode(), b"1", tenant_prefix(tenant), ttl)
