"""The records of tenants in Redis: made, changed and deleted there, never expiring.

They lie in one hash, `briolette:tenants`: a record for each name, a version that grows with every
change, a mark, drawn with every change, and a lineage, drawn when the first tenant is made. So a
reader asks one short question to learn that nothing has changed, and a copy that is ahead of a
Redis which lost its data is known to be one. Nobody changes what they haven't seen: a change names
the state that it is made to, and a Redis in any other is read again, or given back what it lost.

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

from cluster.errors import BrioletteError, InvalidRequest, Unavailable
from cluster.store.redis import REDIS_ERRORS, RedisAddress
from cluster.store.scripts import tenant_prefix
from cluster.tenants.keys import new_key
from cluster.tenants.records import Directory, Record
from cluster.tenants.tenancy import DEFAULT_TENANT, Tenant

MAX_TENANTS = 1000  # each is a label in the metrics
MAX_KEYS = 4  # of a tenant that rotates them with a grace period, again and again
MAX_TRIES = 20  # of a change that others get ahead of

log = logging.getLogger(__name__)


class UnknownTenant(BrioletteError):
    """There is no tenant of that name."""

    status = "NOT_FOUND"


class TenantExists(BrioletteError):
    """There is a tenant of that name already."""

    status = "ALREADY_EXISTS"


class Tenants:
    """The tenants of a cluster. Any thread may call; every call raises Unavailable where Redis
    doesn't answer.
    """

    def __init__(self, address: RedisAddress, now: Callable[[], float] = time.time) -> None:
        self.known = Directory()  # as seen last, here or by a copy; Redis gets back what it loses
        self.on_replaced: Callable[[Directory], None] = lambda directory: None
        self._address = address
        self._client = address.client()
        self._now = now
        self._lock = threading.RLock()

    def create(self, tenant: Tenant) -> str:
        """A new tenant's key, to be shown once; it finds nothing of an earlier one of that name.
        Raises InvalidRequest, TenantExists.
        """
        key, kept = new_key(self._now())
        tenant.check()

        def create(record: Record | None) -> Record:
            if record is not None:
                raise TenantExists(f"There is a tenant {tenant.name} already.")
            return Record(tenant, (kept,), self._now())

        self.refresh()
        if self._run(self._client.hget, TENANTS, tenant.name) is None:
            # Requests of another one of that name may have gone on after its deletion.
            self._run(self._remove_values, tenant.name)
        self._change(tenant.name, create)
        return key

    def update(self, name: str, change: Callable[[Tenant], Tenant]) -> Record:
        """Other terms from now on. Raises UnknownTenant, InvalidRequest."""
        return self._change_known(name, lambda r: replace(r, tenant=change(r.tenant).check()))

    def rotate(self, name: str, grace_s: float = 0.0) -> str:
        """Another key, to be shown once; the ones before work for `grace_s` more. Raises
        UnknownTenant.
        """
        now = self._now()
        key, kept = new_key(now)

        def rotate(record: Record) -> Record:
            old = [replace(k, expires=_sooner(k.expires, now + grace_s)) for k in record.keys]
            live = [k for k in old if k.expires is not None and k.expires > now]
            return replace(record, keys=(kept, *live)[:MAX_KEYS])

        self._change_known(name, rotate)
        return key

    def delete(self, name: str) -> None:
        """Remove a tenant with its sessions and values. Raises UnknownTenant, once nothing is left
        of one whose deletion broke off: so it can be asked for again.
        """
        try:
            self.update(name, lambda tenant: replace(tenant, is_disabled=True))
        except UnknownTenant:
            if name != DEFAULT_TENANT:  # which never has a record
                self._run(self._remove_values, name)
            raise
        self._run(self._remove_values, name)
        self._change(name, lambda record: None)
        self._run(self._remove_values, name)  # of turns that ended meanwhile; no more are kept now

    def refresh(self) -> Directory:
        """What there is now; a Redis that lost changes is given them back. What is lost for good,
        since others are there instead, goes to `on_replaced`.
        """
        with self._lock:
            found = self.read(self.known)
            if found is None:
                return self.known
            if not self.known.is_ahead_of(found):
                if self.known.is_replaced_by(found):
                    self.on_replaced(self.known)
                self.known = found
            elif self.put_back(self.known):
                log.warning("Redis had lost changes of tenants; it has them again.")
            return self.known

    def read(self, known: Directory) -> Directory | None:
        """What there is now; None where that is what is known already."""
        fields = self._run(self._client.eval, READ, 1, TENANTS, *known.head)
        return None if fields is None else _directory(fields)

    def put_back(self, directory: Directory) -> bool:
        """Give a Redis that lost its data what it had; False where it has it, or other tenants."""
        records = [(name, record.to_json()) for name, record in directory.records.items()]
        words = chain(directory.head, *records)
        return bool(self._run(self._client.eval, PUT_BACK, 1, TENANTS, *words))

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def _change_known(self, name: str, change: Callable[[Record], Record]) -> Record:
        changed: list[Record] = []

        def change_known(record: Record | None) -> Record:
            if record is None:
                raise UnknownTenant(f"There is no tenant {name!r}; briolette keys lists them.")
            changed[:] = [change(record)]
            return changed[0]

        self._change(name, change_known)
        return changed[0]

    def _change(self, name: str, change: Callable[[Record | None], Record | None]) -> None:
        """Put what `change` makes of a record in its place; None is no record."""
        with self._lock:
            for _ in range(MAX_TRIES):
                known = self.refresh()
                record = change(known.records.get(name))
                changed = known.changed(name, record)
                if len(changed.records) > max(MAX_TENANTS, len(known.records)):
                    raise InvalidRequest(f"There are {MAX_TENANTS} tenants already: delete some.")
                new = "" if record is None else record.to_json()
                words = (*known.head, *changed.head, name, new)
                if self._run(self._client.eval, CHANGE, 1, TENANTS, *words):
                    self.known = changed
                    return
        raise Unavailable("Others change tenants all the time; try again later.")

    def _remove_values(self, name: str) -> None:
        for key in self._client.scan_iter(match=tenant_prefix(name) + b"*", count=1000):
            self._client.unlink(key)

    def _run(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except REDIS_ERRORS as error:
            raise self._address.unavailable(error) from None


def eviction_policy(address: RedisAddress) -> str:
    """The server's maxmemory-policy. Raises one of REDIS_ERRORS, also where INFO is forbidden."""
    client = address.client()
    try:
        return str(client.info("memory")["maxmemory_policy"])
    finally:
        client.close()


def keeps_tenants(policy: str) -> bool:
    """Whether a full server never drops a key without expiry."""
    return policy == "noeviction" or policy.startswith("volatile-")


def _sooner(first: float | None, second: float) -> float:
    return second if first is None else min(first, second)


def _directory(fields: list[bytes]) -> Directory:
    """Of a hash as Redis lists it."""
    found = {name.decode(): text for name, text in zip(fields[::2], fields[1::2], strict=True)}
    lineage, version = found.pop("=lineage", b"").decode(), int(found.pop("=version", b"0"))
    mark = found.pop("=mark", b"").decode()
    read = {name: _record(name, text) for name, text in found.items()}
    records = {name: record for name, record in read.items() if record is not None}
    return Directory(lineage, version, mark, records)


def _record(name: str, text: bytes) -> Record | None:
    """None for one that can't be read: it keeps nobody else out, and may be made anew."""
    try:
        return Record.from_json(text)
    except (ValueError, TypeError, KeyError):
        log.error("The record of the tenant %s in Redis can't be read.", name)
        return None


TENANTS = "briolette:tenants"

# No tenant's name begins with "=".
HEAD = """
local function is_at(lineage, version, mark)
  local head = redis.call('HMGET', KEYS[1], '=lineage', '=version', '=mark')
  return (head[1] or '') == lineage and (head[2] or '0') == version and (head[3] or '') == mark
end
local function set_head(lineage, version, mark)
  redis.call('HSET', KEYS[1], '=lineage', lineage, '=version', version, '=mark', mark)
end
"""

READ = f"""{HEAD}
if is_at(ARGV[1], ARGV[2], ARGV[3]) then return false end
return redis.call('HGETALL', KEYS[1])
"""

# HDEL comes first: on a full server a script may go on only once it has written something that
# needs no memory, and a tenant must be disabled there too.
CHANGE = f"""{HEAD}
if not is_at(ARGV[1], ARGV[2], ARGV[3]) then return 0 end
local name, new = ARGV[7], ARGV[8]
redis.call('HDEL', KEYS[1], name)
if new ~= '' then redis.call('HSET', KEYS[1], name, new) end
set_head(ARGV[4], ARGV[5], ARGV[6])
return 1
"""

PUT_BACK = f"""{HEAD}
local head = redis.call('HMGET', KEYS[1], '=lineage', '=version')
local is_behind = head[1] == ARGV[1] and tonumber(head[2]) < tonumber(ARGV[2])
if head[1] and not is_behind then return 0 end
redis.call('DEL', KEYS[1])
set_head(ARGV[1], ARGV[2], ARGV[3])
for i = 4, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return 1
"""
