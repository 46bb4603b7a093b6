"""Tenants: who may use the cluster, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

DEFAULT_TENANT = "default"  # everybody, where there are no keys


@dataclass(frozen=True, slots=True)
class Tenant:
    """One of those who share the cluster, and its terms."""

    name: str = DEFAULT_TENANT
    weight: float = 1.0  # its share of the engine beside others'
    is_admin: bool = False  # may see and change other tenants


class Lease(Protocol):
    """One admitted call."""

    @property
    def tenant(self) -> Tenant: ...


class Admission(Protocol):
    """Lets a call in before any work is done for it."""

    def admit(self, key: str | None) -> Lease:
        """Whoever shows this key. Raises what keeps it out."""


@dataclass(frozen=True, slots=True)
class OpenLease:
    """Of a cluster without keys: nothing is counted."""

    tenant: Tenant = Tenant(is_admin=True)


class OpenAdmission:
    """Everybody is one tenant."""

    def admit(self, key: str | None) -> Lease:
        return OpenLease()
