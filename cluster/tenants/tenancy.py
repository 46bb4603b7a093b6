"""Tenants: who may use the cluster, and how much of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.errors import InvalidRequest, PermissionDenied

DEFAULT_TENANT = "default"  # everybody, where there are no keys; else who holds the local key

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # also a label in the metrics
MAX_MODELS = 32
MOST_WEIGHT = 1000.0
MOST_COUNT = 2**32 - 1
LEAST_KV_BYTES, MOST_KV_BYTES = 1 << 20, 1 << 60
END_OF_TIME = 253_402_300_800.0  # the year 10,000, which no calendar writes


@dataclass(frozen=True, slots=True)
class Tenant:
    """One of those who share the cluster, and its terms."""

    name: str = DEFAULT_TENANT
    weight: float = 1.0  # its share of the engine beside others'
    tokens_per_minute: int | None = None  # of prompts and answers; None: no limit
    max_in_flight: int | None = None  # requests; None: no limit
    kv_bytes: int | None = None  # of the store; None: store.tenant_bytes
    models: tuple[str, ...] = ()  # that it may use; none named: all
    expires: float | None = None  # seconds since the epoch; None: never
    is_disabled: bool = False
    is_admin: bool = False  # may change tenants

    def check(self) -> Tenant:
        """Return the tenant itself. Raises InvalidRequest for terms out of range."""
        limits = (self.tokens_per_minute, self.max_in_flight)
        if not NAME.fullmatch(self.name):
            raise InvalidRequest(
                "A tenant's name has 1 to 64 letters, digits, dots, dashes and underscores, and "
                "begins with a letter or a digit."
            )
        if self.name == DEFAULT_TENANT:
            raise InvalidRequest(f"The name {DEFAULT_TENANT!r} is the operator's own.")
        if not 0.001 <= self.weight <= MOST_WEIGHT:  # false for NaN too
            raise InvalidRequest(f"A weight is between 0.001 and {MOST_WEIGHT:g}.")
        if any(limit is not None and not 1 <= limit <= MOST_COUNT for limit in limits):
            raise InvalidRequest(
                f"A quota is from 1 to {MOST_COUNT:,}; to keep a tenant out, disable it."
            )
        if self.kv_bytes is not None and not LEAST_KV_BYTES <= self.kv_bytes <= MOST_KV_BYTES:
            raise InvalidRequest(
                f"A KV budget is between {LEAST_KV_BYTES:,} and {MOST_KV_BYTES:,} bytes."
            )
        if len(self.models) > MAX_MODELS or not all(map(_is_model, self.models)):
            raise InvalidRequest(f"At most {MAX_MODELS} models, each named by 1 to 200 characters.")
        if self.expires is not None and not 0 <= self.expires < END_OF_TIME:
            raise InvalidRequest("An expiry is a time before the year 10,000.")
        return self

    def check_model(self, model: str) -> None:
        """Raises PermissionDenied where the tenant may not use this one."""
        if not self.may_use(model):
            raise PermissionDenied(f"The tenant {self.name} may not use the model {model}.")

    def may_use(self, model: str) -> bool:
        """Return whether the tenant may use a model."""
        return not self.models or model in self.models

    def check_admin(self) -> None:
        """Raises PermissionDenied where the tenant may not change tenants."""
        if not self.is_admin:
            raise PermissionDenied(
                f"The tenant {self.name} may not do this; it takes an operator's key."
            )


def deleted(tenant: str) -> PermissionDenied:
    """Return the error for the last requests of a deleted tenant: nothing may be kept for it."""
    return PermissionDenied(f"The tenant {tenant} was deleted; nothing is kept for it.")


def _is_model(name: str) -> bool:
    return 0 < len(name) <= 200 and name.isprintable()
