"""The tenant directory: records of all tenants in Redis, which never expire.

They lie in one hash, `briolette:tenants`: a record for each name, and a head: a version that grows
with every change, a mark that is drawn with every change, and a lineage that is drawn when the
first tenant is created. A reader that knows the head learns with one short question that nothing
has changed, and can tell that a Redis has lost data. Changes are optimistic: each names the head
that it was made to; if Redis has another one, the records are read again, or restored to a Redis
that lost them, and the change is tried again.

These calls wait for Redis: they belong to a thread, never to an asyncio loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

from cluster.errors import InvalidRequest, TenantExists, Unavailable, UnknownTenant
from cluster.store.redis import REDIS_ERRORS, RedisAddress
from cluster.store.scripts import tenant_prefix
from cluster.tenants.keys import new_key
from cluster.tenants.records import TenantRecord, TenantSnapshot
from cluster.tenants.scripts import CHANGE_DIRECTORY, READ_DIRECTORY, RESTORE_DIRECTORY
from cluster.tenants.tenancy import DEFAULT_TENANT, Tenant

TENANTS = "briolette:tenants"
MAX_RECORDS = 1000  # tenants: all of them are read at once, and kept in every gateway's memory
MAX_KEYS = 4  # of a tenant that rotates them with a grace period, again and again
MAX_TRIES = 20  # of a change, while other processes make changes before it

log = logging.getLogger(__name__)


class TenantDirectory:
    """The tenants of a cluster, in Redis. Any thread may call.

    Every call raises Unavailable if Redis doesn't answer.
    """

    def __init__(
        self,
        address: RedisAddress,
        now: Callable[[], float] = time.time,
        *,
        known: TenantSnapshot | None = None,
        on_replaced: Callable[[TenantSnapshot], None] = lambda snapshot: None,
    ) -> None:
        """Prepare a client; it connects when first needed.

        Args:
            address: The Redis server.
            now: The time of day.
            known: The tenants as last seen; a Redis that lost them is given them back.
            on_replaced: Called with the known tenants when other ones take their place: another
                cluster's, or some that were changed by a process that didn't know them.
        """
        self._known = known or TenantSnapshot()
        self._on_replaced = on_replaced
        self._address = address
        self._client = address.client()
        self._now = now
        self._lock = threading.RLock()

    def create(self, tenant: Tenant) -> str:
        """Create a tenant, which finds nothing of a deleted one of that name.

        Returns:
            Its key, which is kept nowhere: show it once.

        Raises:
            InvalidRequest: If its terms are out of range, or there are too many tenants.
            TenantExists: If there is a tenant of that name.
        """
        key, key_hash = new_key(self._now())
        tenant.check()

        def create(record: TenantRecord | None) -> TenantRecord:
            if record is not None:
                raise TenantExists(f"There is a tenant {tenant.name} already.")
            return TenantRecord(tenant, (key_hash,), self._now())

        self.refresh()
        if self._run(self._client.hget, TENANTS, tenant.name) is None:
            # Requests of a deleted tenant of that name may have gone on after its deletion.
            self._run(self._remove_values, tenant.name)
        self._change(tenant.name, create)
        return key

    def update(self, name: str, change: Callable[[Tenant], Tenant]) -> TenantRecord:
        """Change a tenant's terms; `change` may be called several times. Raises UnknownTenant,
        InvalidRequest.
        """
        return self._change_known(name, lambda r: replace(r, tenant=change(r.tenant).check()))

    def rotate(self, name: str, grace_s: float = 0.0) -> str:
        """Replace a tenant's keys by a new one, which is returned and kept nowhere; the old ones
        work for `grace_s` more. Raises UnknownTenant.
        """
        now = self._now()
        key, key_hash = new_key(now)

        def rotate(record: TenantRecord) -> TenantRecord:
            old = [replace(k, expires=_sooner(k.expires, now + grace_s)) for k in record.keys]
            live = [k for k in old if k.expires is not None and k.expires > now]
            return replace(record, keys=(key_hash, *live)[:MAX_KEYS])

        self._change_known(name, rotate)
        return key

    def delete(self, name: str) -> None:
        """Delete a tenant with its sessions and values. A deletion that broke off can be repeated.

        Raises:
            UnknownTenant: If it has no record; what is left of its sessions and values is deleted.
        """
        try:
            self.update(name, lambda tenant: replace(tenant, is_disabled=True))
        except UnknownTenant:
            if name != DEFAULT_TENANT:  # it never has a record
                self._run(self._remove_values, name)
            raise
        self._run(self._remove_values, name)
        self._change(name, lambda record: None)
        self._run(self._remove_values, name)  # of requests that ended meanwhile: the last ones

    def refresh(self) -> TenantSnapshot:
        """Return the tenants as they are now; restore them first to a Redis that lost changes."""
        with self._lock:
            found = self.read(self._known)
            if found is None:
                return self._known
            if not self._known.is_ahead_of(found):
                if self._known.is_replaced_by(found):
                    self._on_replaced(self._known)
                self._known = found
            elif self._restore(self._known):
                log.warning("Redis had lost changes of tenants; they have been restored.")
            return self._known

    def read(self, known: TenantSnapshot) -> TenantSnapshot | None:
        """Return the tenants in Redis; None if they are the known ones."""
        fields = self._eval(READ_DIRECTORY, *known.head)
        return None if fields is None else _to_snapshot(fields)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _restore(self, snapshot: TenantSnapshot) -> bool:
        """Give Redis what it lost; False if it has that already, or other tenants."""
        records = [(name, record.to_json()) for name, record in snapshot.records.items()]
        return bool(self._eval(RESTORE_DIRECTORY, *chain(snapshot.head, *records)))

    def _change_known(
        self, name: str, change: Callable[[TenantRecord], TenantRecord]
    ) -> TenantRecord:
        """Change the record of a tenant that must exist, and return it."""
        changed: list[TenantRecord] = []

        def change_known(record: TenantRecord | None) -> TenantRecord:
            if record is None:
                raise UnknownTenant(f"There is no tenant {name!r}; briolette keys lists them.")
            changed[:] = [change(record)]
            return changed[0]

        self._change(name, change_known)
        return changed[0]

    def _change(
        self, name: str, change: Callable[[TenantRecord | None], TenantRecord | None]
    ) -> None:
        """Replace a tenant's record by what `change` makes of it; None stands for no record."""
        with self._lock:
            for _ in range(MAX_TRIES):
                known = self.refresh()
                record = change(known.records.get(name))
                changed = known.changed(name, record)
                if len(changed.records) > max(MAX_RECORDS, len(known.records)):
                    raise InvalidRequest(f"{MAX_RECORDS} tenants exist, the limit; delete some.")
                new = "" if record is None else record.to_json()
                if self._eval(CHANGE_DIRECTORY, *known.head, *changed.head, name, new):
                    self._known = changed
                    return
        raise Unavailable("Other processes change tenants all the time; retry later.")

    def _remove_values(self, name: str) -> None:
        for key in self._client.scan_iter(match=tenant_prefix(name) + b"*", count=1000):
            self._client.unlink(key)

    def _eval(self, script: str, *args: Any) -> Any:
        return self._run(self._client.eval, script, 1, TENANTS, *args)

    def _run(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except REDIS_ERRORS as error:
            raise self._address.unavailable(error) from None


def eviction_policy(address: RedisAddress) -> str:
    """Return the server's maxmemory-policy. Raises one of REDIS_ERRORS, also if it forbids INFO."""
    client = address.client()
    try:
        return str(client.info("memory")["maxmemory_policy"])
    finally:
        client.close()


def keeps_tenants(policy: str) -> bool:
    """Return whether a full server with this maxmemory-policy evicts no key without expiry."""
    return policy == "noeviction" or policy.startswith("volatile-")


def _sooner(first: float | None, second: float) -> float:
    return second if first is None else min(first, second)


def _to_snapshot(fields: list[bytes]) -> TenantSnapshot:
    """Decode the hash, as Redis lists it: names and values in turn."""
    found = {name.decode(): text for name, text in zip(fields[::2], fields[1::2], strict=True)}
    lineage, version = found.pop("=lineage", b"").decode(), int(found.pop("=version", b"0"))
    mark = found.pop("=mark", b"").decode()
    read = {name: _to_record(name, text) for name, text in found.items()}
    records = {name: record for name, record in read.items() if record is not None}
    return TenantSnapshot(lineage, version, mark, records)


def _to_record(name: str, text: bytes) -> TenantRecord | None:
    """Decode a record; None if it is damaged: others must not suffer, and it may be made anew."""
    try:
        return TenantRecord.from_json(text)
    except (ValueError, TypeError, KeyError):
        log.error("The record of the tenant %s in Redis can't be read.", name)
        return None
