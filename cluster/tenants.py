"""The records of tenants in Redis: made, changed and deleted there, never expiring.

They lie in one hash, `briolette:tenants`: a record for each name, a version that grows with every
change, and a lineage, drawn when the first tenant is made. So a reader asks one short question to
learn that nothing has changed, and a copy that is ahead of a Redis which lost its data is known to
be one.

These calls wait for Redis: they belong to a thread, never to an asyncio loop.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

from cluster.errors import BrioletteError, InvalidRequest, Unavailable
from cluster.keys import KeyHash, new_key
from cluster.kv_keys import tenant_prefix
from cluster.redis import REDIS_ERRORS, RedisAddress
from cluster.tenancy import Tenant

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


@dataclass(frozen=True, slots=True)
class Record:
    """What is kept of a tenant. Times are seconds since the epoch."""

    tenant: Tenant
    keys: tuple[KeyHash, ...]  # the newest first
    created: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Record:
        """Raises ValueError, TypeError or KeyError for what is no record."""
        found = json.loads(text)
        terms = found["tenant"]
        return Record(
            tenant=Tenant(**{**terms, "models": tuple(terms["models"])}),
            keys=tuple(KeyHash(**key) for key in found["keys"]),
            created=float(found["created"]),
        )


@dataclass(frozen=True, slots=True)
class Directory:
    """All tenants, as they were at one version."""

    lineage: str = ""  # empty: nobody has ever made a tenant
    version: int = 0
    records: Mapping[str, Record] = field(default_factory=dict)

    def is_ahead_of(self, other: Directory) -> bool:
        """Whether the other one has lost what this one knows. Of another lineage it never has: that
        is another cluster's.
        """
        if not other.lineage:
            return bool(self.lineage)
        return self.lineage == other.lineage and self.version > other.version

    def to_json(self) -> str:
        """For a copy on disk; it has no key, only hashes."""
        records = {name: record.to_json() for name, record in self.records.items()}
        return json.dumps({"lineage": self.lineage, "version": self.version, "records": records})

    @staticmethod
    def from_json(text: str) -> Directory:
        """Raises ValueError, TypeError or KeyError for what is no copy."""
        found = json.loads(text)
        records = {name: Record.from_json(record) for name, record in found["records"].items()}
        return Directory(str(found["lineage"]), int(found["version"]), records)


class Tenants:
    """The tenants of a cluster. Any thread may call; every call raises Unavailable where Redis
    doesn't answer.
    """

    def __init__(self, address: RedisAddress, now: Callable[[], float] = time.time) -> None:
        self._address = address
        self._client = address.client()
        self._now = now

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
        """Remove a tenant with its sessions and values. Raises UnknownTenant; broken off, it can be
        asked for again.
        """
        self.update(name, lambda tenant: replace(tenant, is_disabled=True))
        self._run(self._remove_values, name)
        self._change(name, lambda record: None)

    def read(self, known: Directory) -> Directory | None:
        """What there is now; None where that is what is known already."""
        fields = self._run(self._client.eval, READ, 1, TENANTS, known.lineage, known.version)
        return None if fields is None else _directory(fields)

    def put_back(self, directory: Directory) -> bool:
        """Give a Redis that lost its data what it had; False where it has it, or other tenants."""
        records = [(name, record.to_json()) for name, record in directory.records.items()]
        words = chain((directory.lineage, directory.version), *records)
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
        for _ in range(MAX_TRIES):
            old: bytes = self._run(self._client.hget, TENANTS, name) or b""
            record = change(_record(name, old) if old else None)
            new = "" if record is None else record.to_json()
            words = (name, old, new, secrets.token_hex(8), MAX_TENANTS)
            outcome = self._run(self._client.eval, CHANGE, 1, TENANTS, *words)
            if outcome == b"full":
                raise InvalidRequest(f"There are {MAX_TENANTS} tenants already: delete some.")
            if outcome == b"changed":
                return
        raise Unavailable("Others change this tenant all the time; try again later.")

    def _remove_values(self, name: str) -> None:
        for key in self._client.scan_iter(match=tenant_prefix(name) + b"*", count=1000):
            self._client.unlink(key)

    def _run(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except REDIS_ERRORS as error:
            raise Unavailable(f"Redis at {self._address} doesn't answer: {error}") from None


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
    read = {name: _record(name, text) for name, text in found.items()}
    records = {name: record for name, record in read.items() if record is not None}
    return Directory(lineage, version, records)


def _record(name: str, text: bytes) -> Record | None:
    """None for one that can't be read: it keeps nobody else out, and may be made anew."""
    try:
        return Record.from_json(text)
    except (ValueError, TypeError, KeyError):
        log.error("The record of the tenant %s in Redis can't be read.", name)
        return None


TENANTS = "briolette:tenants"

# No tenant's name begins with "=".
READ = """
local head = redis.call('HMGET', KEYS[1], '=lineage', '=version')
if (head[1] or '') == ARGV[1] and (head[2] or '0') == ARGV[2] then return false end
return redis.call('HGETALL', KEYS[1])
"""

# HDEL comes first: on a full server a script may go on only once it has written something that
# needs no memory, and a tenant must be disabled there too.
CHANGE = """
local name, old, new, lineage, most = unpack(ARGV)
if (redis.call('HGET', KEYS[1], name) or '') ~= old then return 'raced' end
if old == '' and redis.call('HLEN', KEYS[1]) >= tonumber(most) + 2 then return 'full' end
redis.call('HDEL', KEYS[1], name)
if new ~= '' then redis.call('HSET', KEYS[1], name, new) end
redis.call('HSETNX', KEYS[1], '=lineage', lineage)
redis.call('HINCRBY', KEYS[1], '=version', 1)
return 'changed'
"""

PUT_BACK = """
local head = redis.call('HMGET', KEYS[1], '=lineage', '=version')
local is_behind = head[1] == ARGV[1] and tonumber(head[2]) < tonumber(ARGV[2])
if head[1] and not is_behind then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], '=lineage', ARGV[1], '=version', ARGV[2])
for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return 1
"""
