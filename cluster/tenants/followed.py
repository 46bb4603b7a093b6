"""A copy of the tenants that follows Redis and survives it.

A thread asks Redis a few times a second whether anything has changed. What it learns is used at
once and written to disk, so that known keys work while Redis is away and after a restart meanwhile.
A Redis that comes back without its data is given what the copy has; where it has other tenants
instead, the copy of those before is kept beside the new one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cluster.errors import BrioletteError
from cluster.files import write_private
from cluster.store.breaker import Breaker
from cluster.store.redis import RedisAddress
from cluster.tenants.directory import TenantDirectory
from cluster.tenants.records import TenantSnapshot
from cluster.tenants.tenancy import DEFAULT_TENANT, deleted

POLL_S = 0.25  # changes must act within a second

log = logging.getLogger(__name__)


class FollowedTenants:
    """The tenants as this process knows them. Any thread may call.

    Attributes:
        directory: The tenants in Redis, for changes; call `follow` after one, to see it at once.
        snapshot: All tenants as last read.
    """

    def __init__(
        self,
        address: RedisAddress,
        copy: Path,
        on_change: Callable[[TenantSnapshot], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        """Read the copy, ask Redis once, and start the thread.

        Args:
            address: The Redis server that keeps the tenants.
            copy: The file that keeps the copy.
            on_change: Called with every new snapshot, the first one before this returns; one call
                at a time.
            now: The time of day.
        """
        self._copy = copy
        self._on_change = on_change
        self.snapshot = _read_copy(copy)
        self.directory = TenantDirectory(
            address, now, known=self.snapshot, on_replaced=self._keep_replaced
        )
        self._reach = Breaker("The tenants in Redis")
        self._refreshing = threading.Lock()
        self._is_closing = threading.Event()
        on_change(self.snapshot)
        self.follow()
        self._thread = threading.Thread(target=self._watch, name="tenants", daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """True if Redis answered when it was last asked."""
        return self._reach.is_closed

    def kv_bytes(self, tenant: str) -> int | None:
        """Return a tenant's own budget in the store, None if it has none of its own.

        Raises:
            PermissionDenied: If the tenant was deleted.
        """
        record = self.snapshot.records.get(tenant)
        if record is None and tenant != DEFAULT_TENANT:
            raise deleted(tenant)
        return None if record is None else record.tenant.kv_bytes

    def refresh(self) -> None:
        """Read now what has changed; waits for Redis. Raises Unavailable."""
        with self._refreshing:
            found = self.directory.refresh()
            if found.head != self.snapshot.head:
                self.snapshot = found
                self._on_change(found)
                self._write_copy(self._copy, found)

    def follow(self) -> None:
        """Refresh, but only log it if Redis is away: the thread will try again soon."""
        try:
            self.refresh()
            self._reach.succeeded()
        except BrioletteError as error:
            self._reach.failed(f"{error}; known keys still work.")

    def close(self) -> None:
        """End the thread and the connections."""
        self._is_closing.set()
        self._thread.join()
        self.directory.close()

    def _watch(self) -> None:
        while not self._is_closing.wait(POLL_S):
            self.follow()

    def _keep_replaced(self, snapshot: TenantSnapshot) -> None:
        path = self._copy.with_name(f"{self._copy.name}.bak")
        log.error(
            "Redis has other tenants than before and they are used from now on; the %d that were "
            "known until now are in %s.",
            len(snapshot.records),
            path,
        )
        self._write_copy(path, snapshot)

    def _write_copy(self, path: Path, snapshot: TenantSnapshot) -> None:
        try:
            write_private(path, snapshot.to_json())
        except OSError as error:
            log.error("%s can't be written: %s.", path, error.strerror)


def _read_copy(path: Path) -> TenantSnapshot:
    try:
        return TenantSnapshot.from_json(path.read_text())
    except FileNotFoundError:
        return TenantSnapshot()
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.error("The copy of the tenants, %s, can't be read: %s.", path, error)
        return TenantSnapshot()
