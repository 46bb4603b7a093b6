"""Sending values to Redis: those that aren't there yet, each with its entry in the books."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import redis

from cluster.store.redis import BulkConnection, RedisAddress, packed
from cluster.store.scripts import (
    BOOK_VALUE,
    LOOK_UP,
    MAKE_ROOM,
    OVERHEAD_BYTES,
    REMOVE_VALUES,
    TOUCH,
    tenant_prefix,
    value_name,
)
from cluster.store.value import HEADER_BYTES, StoredValue, header_of

Outcomes = dict[StoredValue, str]


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """Memory of the Redis server, as reported by INFO."""

    used_bytes: int
    max_bytes: int  # 0: no limit


class Sender:
    """A connection for writing, made when it is needed; for one thread.

    Every method raises one of REDIS_ERRORS if the connection breaks.
    """

    def __init__(
        self,
        address: RedisAddress,
        fingerprint: bytes,
        *,
        ttl_ms: int,
        budget_of: Callable[[str], int],
        on_used: Callable[[str, int], None],
        on_memory: Callable[[ServerMemory], None],
    ) -> None:
        """Connect to nothing yet.

        Args:
            address: The Redis server.
            fingerprint: 16 bytes that stand for the model and its layout of values.
            ttl_ms: Time to live of an unused value in milliseconds.
            budget_of: Returns a tenant's budget in bytes.
            on_used: Called with a tenant and the bytes that it uses after a write.
            on_memory: Called with what the server says of its memory.
        """
        self.address = address
        self._fingerprint = fingerprint
        self._ttl_ms = ttl_ms
        self._budget_of = budget_of
        self._on_used = on_used
        self._on_memory = on_memory
        self._connection: BulkConnection | None = None

    def send(self, values: Sequence[StoredValue], outcomes: Outcomes) -> redis.ResponseError | None:
        """Send values. On a full server, evict values of their tenants and send them once more.

        Args:
            values: The values; those that Redis has already are not sent.
            outcomes: Gets the outcome of each value as soon as it is known.

        Returns:
            Why the server refused one of them at first; None if it took all.
        """
        connection = self._connected()
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

    def remove(self, tenant: str, keys: Sequence[bytes]) -> None:
        """Remove values, unless the server refuses to."""
        script = self._script(REMOVE_VALUES, tenant)
        self._connected().command_or_error(*script, *keys)

    def probe(self) -> None:
        """Find out over a new connection whether the server answers."""
        self.hang_up()
        self._connected().command("PING")
        self.look_at_memory()

    def look_at_memory(self) -> None:
        """Report how full the server is, if it allows INFO."""
        answer = self._connected().command_or_error("INFO", "memory")
        if isinstance(answer, bytes):
            lines = [line.partition(b":") for line in answer.split(b"\r\n")]
            info = {name: value for name, _, value in lines}
            used, limit = info.get(b"used_memory", b"0"), info.get(b"maxmemory", b"0")
            self._on_memory(ServerMemory(int(used), int(limit)))

    def hang_up(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _connected(self) -> BulkConnection:
        if self._connection is not None and self._connection.is_stale():
            self.hang_up()
        if self._connection is None:
            self._connection = self.address.connect()
        return self._connection

    def _send_all(
        self, connection: BulkConnection, values: Iterable[StoredValue], outcomes: Outcomes
    ) -> redis.ResponseError | None:
        """Send values, one ahead of the replies; return why the server refused one."""
        refusal = None
        under_way: deque[StoredValue] = deque()
        for value in [*values, None]:
            if value is not None:
                connection.send(self._transaction(value))
                under_way.append(value)
            while under_way and (value is None or len(under_way) > 1):
                done = under_way.popleft()
                outcomes[done], error = self._read_outcome(connection, done)
                refusal = refusal or error
        return refusal

    def _present(
        self, connection: BulkConnection, values: Sequence[StoredValue]
    ) -> list[StoredValue]:
        """Return the values that Redis has already, as far as their lengths tell."""
        by_tenant: dict[str, list[StoredValue]] = {}
        for value in values:
            by_tenant.setdefault(value.tenant, []).append(value)
        present = []
        for tenant, of_tenant in by_tenant.items():
            keys = (value.key for value in of_tenant)
            found: bytes = connection.command(*self._script(LOOK_UP, tenant), TOUCH, *keys)
            present += [
                value
                for value, length in zip(of_tenant, found.split(), strict=True)
                if int(length) == value.num_bytes + HEADER_BYTES
            ]
        return present

    def _make_room(self, connection: BulkConnection, values: Iterable[StoredValue]) -> set[str]:
        """Evict values of the tenants of these values; return the tenants that had any."""
        by_tenant: dict[str, int] = {}
        for value in values:
            num_bytes = value.num_bytes + HEADER_BYTES + OVERHEAD_BYTES
            by_tenant[value.tenant] = by_tenant.get(value.tenant, 0) + num_bytes
        return {
            tenant
            for tenant, num_bytes in by_tenant.items()
            if connection.command(*self._script(MAKE_ROOM, tenant), num_bytes)
        }

    def _transaction(self, value: StoredValue) -> list[bytes | memoryview]:
        """Return the commands that set a value and book it, both or neither; copies no payload."""
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
        self, connection: BulkConnection, value: StoredValue
    ) -> tuple[str, redis.ResponseError | None]:
        """Read the four replies to a transaction: the value's outcome, and why it was refused."""
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
