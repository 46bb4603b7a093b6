"""Named sessions: conversations that a tenant keeps, with the KV values that they need.

A session pins its values: they don't expire and no budget pushes them out, and they count against
the tenant's budget with the session's own content. So a session that doesn't fit is refused when it
is saved, instead of being emptied later. Deleting it removes every value that no other session of
the tenant needs, also one that a running conversation could have used.

These calls wait for Redis: they belong to a gateway's thread, never to a step.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from cluster.errors import InvalidRequest, SessionInUse, StoreFull, UnknownSession
from cluster.store.redis import REDIS_ERRORS, RedisAddress
from cluster.store.scripts import tenant_prefix
from cluster.tenants.directory import TENANTS
from cluster.tenants.scripts import (
    DELETE_SESSION,
    LIST_SESSIONS,
    LOAD_SESSION,
    SAVE_SESSION,
    SESSION_NAMES,
)
from cluster.tenants.tenancy import DEFAULT_TENANT, deleted

MAX_NAME_BYTES = 200
MAX_CONTENT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What a list shows. Times are seconds since the epoch, on the server's clock."""

    name: str
    fingerprint: str  # of the model whose KV values it needs
    num_tokens: int
    num_bytes: int  # of its content and of its values that are there; shared ones count in each
    created: float
    last_used: float
    num_missing: int  # values that it needs and that aren't there


@dataclass(frozen=True, slots=True)
class Session:
    """A session as it was saved. `content` is plain JSON: messages, token ids."""

    name: str
    fingerprint: str
    num_tokens: int
    content: Any
    block_keys: tuple[bytes, ...]
    created: float
    last_used: float  # before this load
    version: str  # another one after each save


class Sessions:
    """The sessions of all tenants; each call sees one tenant's. Any thread may call.

    Every call raises Unavailable where Redis doesn't answer.
    """

    def __init__(
        self,
        address: RedisAddress,
        ttl_s: float,
        budget_of: Callable[[str], int],
        refresh_tenants: Callable[[], None] | None = None,
    ) -> None:
        """`budget_of` raises for a tenant that was deleted, as far as its copy of them knows;
        `refresh_tenants` brings that copy up to date, where tenants have records.
        """
        self._address = address
        self._client = address.client()
        self._ttl_ms = round(ttl_s * 1000)
        self._budget_of = budget_of
        self._refresh_tenants = refresh_tenants

    def save(
        self,
        tenant: str,
        name: str,
        content: Any,
        block_keys: Sequence[bytes],
        *,
        fingerprint: str,
        num_tokens: int,
        version: str = "",
        traces: Iterable[bytes] = (),
    ) -> list[bytes]:
        """Keep a session, in place of its `version`, or as a new one; what only that version needed
        is no longer pinned. `traces` are keys that it doesn't need, but that are to go with it.
        Returns the keys whose values are not in Redis: put them, they are pinned already.

        Raises, with nothing changed, InvalidRequest for an impossible name or a content too long,
        SessionInUse where another version is there, StoreFull where the tenant's sessions would
        need more than its budget or the server is full, PermissionDenied for a tenant that was
        deleted, and what `budget_of` raises.
        """
        encoded, budget = _encoded(content), self._budget_of(tenant)
        meta = json.dumps({"fingerprint": fingerprint, "num_tokens": num_tokens})
        keys = dict.fromkeys(block_keys)  # each once, in order
        head = (check_name(name), encoded, meta, str(budget), version, tenant)
        words: list[bytes | str] = [*head, str(len(keys)), *keys, *traces]
        has_record = self._refresh_tenants is not None and tenant != DEFAULT_TENANT
        records = TENANTS if has_record else None
        is_saved, *answer = self._run(SAVE_SESSION, tenant, *words, records=records)
        if is_saved == -2 and self._refresh_tenants is not None:
            self._refresh_tenants()  # a Redis that lost its tenants is given them back
            self._budget_of(tenant)
            is_saved, *answer = self._run(SAVE_SESSION, tenant, *words, records=records)
        if is_saved == -2:
            raise deleted(tenant)
        if is_saved == -1:
            raise SessionInUse(f"The session {name!r} was changed meanwhile; ask again.")
        if not is_saved:
            raise StoreFull(
                f"The session {name!r} doesn't fit: all sessions would take {answer[0]:,} bytes, "
                f"and the budget is {budget:,}."
            )
        return list(answer[1])

    def load(self, tenant: str, name: str) -> Session:
        """A session, which counts as used. Raises UnknownSession."""
        found = self._run(LOAD_SESSION, tenant, check_name(name))
        if found is None:
            raise self._unknown(tenant, name)
        content, meta, created, used, version, keys = found
        return Session(
            name,
            **json.loads(meta),
            content=json.loads(content),
            block_keys=tuple(keys),
            created=int(created) / 1000,
            last_used=int(used) / 1000,
            version=version.decode(),
        )

    def info(self, tenant: str, name: str) -> SessionInfo:
        """What the list shows of one session. Raises UnknownSession."""
        found = self._list(tenant, check_name(name))
        if not found:
            raise self._unknown(tenant, name)
        return found[0]

    def list(self, tenant: str) -> list[SessionInfo]:
        """All sessions, the last used one first."""
        return sorted(self._list(tenant), key=lambda session: session.last_used, reverse=True)

    def delete(self, tenant: str, name: str, traces: Iterable[bytes] = ()) -> Sequence[bytes]:
        """Remove a session, its values and its traces, more of them too. Returns the keys of what
        is no longer there. Raises UnknownSession.

        What a decoder still has in its write queue would come again: flush it before.
        """
        removed: Sequence[bytes] | None = self._run(
            DELETE_SESSION, tenant, check_name(name), *traces
        )
        if removed is None:
            raise self._unknown(tenant, name)
        return removed

    def used_bytes(self, tenants: Iterable[str]) -> dict[str, int]:
        """Return the bytes of all values and sessions in Redis, by tenant."""
        names = list(tenants)
        pipeline = self._client.pipeline(transaction=False)
        for name in names:
            pipeline.hget(tenant_prefix(name) + b"usage", "bytes")
        try:
            answers = pipeline.execute()
        except REDIS_ERRORS as error:
            raise self._address.unavailable(error) from None
        return {name: int(used or 0) for name, used in zip(names, answers, strict=True)}

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def _list(self, tenant: str, *names: bytes) -> Sequence[SessionInfo]:
        return [
            SessionInfo(
                name.decode(),
                **json.loads(meta),
                num_bytes=num_bytes,
                created=int(created) / 1000,
                last_used=int(used) / 1000,
                num_missing=num_missing,
            )
            for name, meta, created, used, num_bytes, num_missing in self._run(
                LIST_SESSIONS, tenant, *names
            )
        ]

    def _unknown(self, tenant: str, name: str) -> UnknownSession:
        names = [known.decode() for known in self._run(SESSION_NAMES, tenant)]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return UnknownSession(f"There is no session {name!r}{hint}")

    def _run(self, script: str, tenant: str, *args: bytes | str, records: str | None = None) -> Any:
        """`records` is where the script looks for the tenant's, if it does."""
        keys = (tenant_prefix(tenant),) if records is None else (tenant_prefix(tenant), records)
        try:
            return self._client.eval(script, len(keys), *keys, str(self._ttl_ms), *args)
        except REDIS_ERRORS as error:
            if isinstance(error, redis.ResponseError) and "OOM" in str(error):
                raise StoreFull("Redis is full: delete sessions, or give it more memory.") from None
            raise self._address.unavailable(error) from None


def check_name(name: str) -> bytes:
    """A session's name as Redis has it. Raises InvalidRequest."""
    encoded = name.encode()
    if not 0 < len(encoded) <= MAX_NAME_BYTES or not name.isprintable():
        raise InvalidRequest(
            f"A session's name has 1 to {MAX_NAME_BYTES} bytes, all of them printable."
        )
    return encoded


def _encoded(content: Any) -> bytes:
    encoded = json.dumps(content, separators=(",", ":")).encode()
    if len(encoded) > MAX_CONTENT_BYTES:
        raise InvalidRequest(f"A session's content has at most {MAX_CONTENT_BYTES:,} bytes.")
    return encoded
