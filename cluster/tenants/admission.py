"""Admission: every call shows its key and gets a lease, before any work is done for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from cluster.errors import BrioletteError, PermissionDenied, Unauthenticated, Unavailable
from cluster.store.redis import RedisAddress
from cluster.tenants.followed import FollowedTenants
from cluster.tenants.keys import KeyHash, split_key
from cluster.tenants.quota import Quota
from cluster.tenants.records import TenantSnapshot
from cluster.tenants.tenancy import Tenant


class Lease(Protocol):
    """The right to one call. A call that generates holds it in a `with` block, which counts one
    request in flight and raises QuotaExceeded if there are too many.
    """

    @property
    def tenant(self) -> Tenant: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def charge(self, num_tokens: int) -> None:
        """Charge the tokens of a prompt, before any work is done for it. Raises QuotaExceeded, or
        InvalidRequest where waiting doesn't help.
        """

    def refund(self, num_tokens: int) -> None:
        """Return the tokens of a prompt that was charged and not computed."""

    def charge_output(self, num_tokens: int) -> None:
        """Charge generated tokens as they come; they may leave a debt."""


class Admission(Protocol):
    """Admits calls by their keys."""

    @property
    def is_open(self) -> bool:
        """True if calls need no key: all of them are the default tenant's."""

    @property
    def tenants(self) -> FollowedTenants | None:
        """The tenants that have keys; None if the cluster is open."""

    def admit(self, key: str | None) -> Lease:
        """Authenticate a key and return its lease. Raises Unauthenticated, PermissionDenied."""

    def close(self) -> None:
        """End threads and connections."""


OPERATOR = Tenant(is_admin=True)


@dataclass(frozen=True, slots=True)
class OpenLease:
    """A lease without limits: for open clusters, and for the operator."""

    tenant: Tenant = OPERATOR

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def charge(self, num_tokens: int) -> None:
        pass

    def refund(self, num_tokens: int) -> None:
        pass

    def charge_output(self, num_tokens: int) -> None:
        pass


class OpenAdmission:
    """The admission of an open cluster: every call is the default tenant's, without limits."""

    is_open = True
    tenants: FollowedTenants | None = None

    def admit(self, key: str | None) -> Lease:
        return OpenLease()

    def close(self) -> None:
        pass


class _KeyOwner(NamedTuple):
    tenant: Tenant
    key: KeyHash
    quota: Quota


class KeyAdmission:
    """Admits calls that show a tenant's key, or the local key of this machine's operator."""

    is_open = False

    def __init__(
        self,
        address: RedisAddress,
        copy: Path,
        local_key: KeyHash,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Read the tenants and start to follow them.

        Args:
            address: The Redis server that keeps the tenants.
            copy: The file that keeps a copy of them, for when Redis is away.
            local_key: The operator's own key.
            clock: The clock by which quotas refill.
            now: The time of day, by which keys and tenants expire.
        """
        self._local_key = local_key
        self._clock = clock
        self._now = now
        self._quotas: dict[str, Quota] = {}
        self._owners: dict[str, _KeyOwner] = {}  # by the key's id
        self.tenants = FollowedTenants(address, copy, on_change=self._use, now=now)

    def admit(self, key: str | None) -> Lease:
        """Authenticate a key and return its lease.

        Raises:
            Unauthenticated: If the key is missing, unknown or replaced.
            PermissionDenied: If its tenant is disabled or has expired.
            Unavailable: If Redis is away and no tenants were ever read.
        """
        if not key:
            raise Unauthenticated("This cluster asks for a key; send authorization: Bearer KEY.")
        key_id, secret = split_key(key) or ("", "")
        if key_id == self._local_key.key_id and self._local_key.matches(secret):
            return OpenLease()
        owner = self._owners.get(key_id)
        if owner is None or not owner.key.matches(secret):
            raise self._unknown_key()
        now, tenant = self._now(), owner.tenant
        if owner.key.expires is not None and owner.key.expires <= now:
            raise Unauthenticated("This key was replaced by another one and has expired.")
        if tenant.is_disabled:
            raise PermissionDenied(f"The tenant {tenant.name} is disabled.")
        if tenant.expires is not None and tenant.expires <= now:
            raise PermissionDenied(f"Tenant {tenant.name} has expired.")
        return owner.quota

    def close(self) -> None:
        """Stop following the tenants."""
        self.tenants.close()

    def _use(self, snapshot: TenantSnapshot) -> None:
        owners: dict[str, _KeyOwner] = {}
        quotas: dict[str, Quota] = {}
        for name, record in snapshot.records.items():
            quota = quotas[name] = self._quotas.get(name) or Quota(record.tenant, self._clock)
            quota.update(record.tenant)
            owners |= {key.key_id: _KeyOwner(record.tenant, key, quota) for key in record.keys}
        self._quotas, self._owners = quotas, owners

    def _unknown_key(self) -> BrioletteError:
        if self.tenants.is_current:
            return Unauthenticated("This key is unknown.")
        if not self.tenants.snapshot.lineage:
            return Unavailable("Redis, which keeps the keys, doesn't answer; retry later.")
        return Unauthenticated("This key is unknown; new keys aren't read while Redis is away.")
