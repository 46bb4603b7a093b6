"""Admission by key: every call is held to a copy of the tenants that follows Redis and survives it.

A thread asks Redis a few times a second whether anything has changed. What it learns is used at
once and written to disk, so that known keys work while Redis is away and after a restart meanwhile.
A Redis that comes back without its data is given what the copy has; where it has other tenants
instead, the copy of those before is kept beside the new one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cluster.errors import BrioletteError, PermissionDenied, Unauthenticated, Unavailable
from cluster.files import write_private
from cluster.store.breaker import Breaker
from cluster.tenants.directory import Tenants
from cluster.tenants.keys import KeyHash, split_key
from cluster.tenants.quota import Quota
from cluster.tenants.records import Directory, Record
from cluster.tenants.tenancy import DEFAULT_TENANT, Lease, OpenLease, Tenant, deleted

POLL_S = 0.25  # changes must act within a second

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeyLease:
    """Counts against the tenant's quota."""

    tenant: Tenant
    quota: Quota

    def __enter__(self) -> None:
        self.quota.begin()

    def __exit__(self, *_: object) -> None:
        self.quota.end()

    def charge(self, num_tokens: int) -> None:
        self.quota.charge(num_tokens)

    def owe(self, num_tokens: int) -> None:
        self.quota.owe(num_tokens)


class _Known(NamedTuple):
    """What a key's id leads to."""

    tenant: Tenant
    key: KeyHash
    quota: Quota


class KeyAdmission:
    """Lets in who shows a tenant's key, or the key of whoever runs this machine's gateway."""

    def __init__(
        self,
        tenants: Tenants,
        copy: Path,
        local_key: KeyHash,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`copy` is the file beside Redis. `now` decides what has expired, `clock` fills quotas."""
        self.tenants = tenants
        self._copy = copy
        self._local_key = local_key
        self._clock = clock
        self._now = now
        self._quotas: dict[str, Quota] = {}
        tenants.known = _read_copy(copy)
        tenants.on_replaced = self._keep_replaced
        self._use(tenants.known)
        self._reach = Breaker("The tenants in Redis")
        self._refreshing = threading.Lock()
        self._is_closing = threading.Event()
        self.follow()
        self._thread = threading.Thread(target=self._watch, name="tenants", daemon=True)
        self._thread.start()

    def admit(self, key: str | None) -> Lease:
        """Raises Unauthenticated, PermissionDenied; Unavailable where no tenants were ever seen."""
        if not key:
            raise Unauthenticated("This cluster asks for a key; send authorization: Bearer KEY.")
        key_id, secret = split_key(key) or ("", "")
        if key_id == self._local_key.key_id and self._local_key.matches(secret):
            return OpenLease()
        known = self._known.get(key_id)
        if known is None or not known.key.matches(secret):
            raise self._unknown_key()
        now, tenant = self._now(), known.tenant
        if known.key.expires is not None and known.key.expires <= now:
            raise Unauthenticated("This key was replaced by another one and has expired.")
        if tenant.is_disabled:
            raise PermissionDenied(f"The tenant {tenant.name} is disabled.")
        if tenant.expires is not None and tenant.expires <= now:
            raise PermissionDenied(f"The time of the tenant {tenant.name} is over.")
        return KeyLease(tenant, known.quota)

    def records(self) -> Mapping[str, Record]:
        """All tenants by name, as last seen."""
        return self._directory.records

    def kv_bytes(self, tenant: str) -> int | None:
        """A tenant's budget in the store, where it has one of its own. Raises PermissionDenied for
        one that was deleted.
        """
        record = self._directory.records.get(tenant)
        if record is None and tenant != DEFAULT_TENANT:
            raise deleted(tenant)
        return None if record is None else record.tenant.kv_bytes

    def refresh(self) -> None:
        """See what has changed now, ahead of the next look; waits for Redis. Raises Unavailable."""
        with self._refreshing:
            now = self.tenants.refresh()
            if now.head != self._directory.head:
                self._use(now)
                self._write_copy(self._copy, now)

    def follow(self) -> None:
        """Refresh; a Redis that is away is looked for again soon, and only the log tells of it."""
        try:
            self.refresh()
            self._reach.succeeded()
        except BrioletteError as error:
            self._reach.failed(f"{error}; known keys work on.")

    def close(self) -> None:
        """End the thread and hang up."""
        self._is_closing.set()
        self._thread.join()
        self.tenants.close()

    def _watch(self) -> None:
        while not self._is_closing.wait(POLL_S):
            self.follow()

    def _use(self, directory: Directory) -> None:
        known: dict[str, _Known] = {}
        quotas: dict[str, Quota] = {}
        for name, record in directory.records.items():
            quota = quotas[name] = self._quotas.get(name) or Quota(name, self._clock)
            quota.limit(record.tenant.tokens_per_minute, record.tenant.max_in_flight)
            known |= {key.key_id: _Known(record.tenant, key, quota) for key in record.keys}
        self._directory, self._quotas, self._known = directory, quotas, known

    def _keep_replaced(self, directory: Directory) -> None:
        path = self._copy.with_name(f"{self._copy.name}.bak")
        log.error(
            "Redis has other tenants than before, which are used from now on; the %d that were "
            "known until now are in %s.",
            len(directory.records),
            path,
        )
        self._write_copy(path, directory)

    def _write_copy(self, path: Path, directory: Directory) -> None:
        try:
            write_private(path, directory.to_json())
        except OSError as error:
            log.error("%s can't be written: %s.", path, error.strerror)

    def _unknown_key(self) -> BrioletteError:
        if self._reach.is_closed:
            return Unauthenticated("This key isn't known here.")
        if not self._directory.lineage:
            return Unavailable("Redis, where keys are kept, doesn't answer.")
        return Unauthenticated("This key isn't known here; new ones aren't while Redis is away.")


def _read_copy(path: Path) -> Directory:
    try:
        return Directory.from_json(path.read_text())
    except FileNotFoundError:
        return Directory()
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.error("The copy of the tenants, %s, can't be read: %s.", path, error)
        return Directory()
