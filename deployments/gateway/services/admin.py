"""The service `briolette.v1.Admin`: the status, and tenants with their keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import grpc

from cluster.errors import ConfigError, InvalidRequest
from cluster.tenants import tenancy
from cluster.tenants.followed import FollowedTenants
from cluster.tenants.records import TenantRecord
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.calls.tenant_threads import TenantThreads
from deployments.gateway.services.rpc import Methods
from deployments.gateway.services.usage import UsageService
from protos.briolette.v1 import admin_pb2
from protos.briolette.v1.admin_pb2 import (
    ClusterStatus,
    CreateTenantRequest,
    DeleteTenantRequest,
    DeleteTenantResponse,
    GetStatusRequest,
    GetUsageRequest,
    Key,
    ListTenantsRequest,
    ListTenantsResponse,
    NewKey,
    RotateKeyRequest,
    Tenant,
    UpdateTenantRequest,
)

NAME: str = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name

LONGEST_GRACE_S = 366 * 86400.0

T = TypeVar("T")

# The fields that an admin sets, by what they are called in cluster.tenancy.
TERMS = {
    "weight": "weight",
    "tokens_per_minute": "tokens_per_minute",
    "max_in_flight": "max_in_flight",
    "kv_bytes": "kv_bytes",
    "models": "models",
    "expires": "expires",
    "disabled": "is_disabled",
    "admin": "is_admin",
}


class Admin:
    """The methods, on top of the tenants in Redis; without keys there are none to change."""

    def __init__(
        self,
        status: Callable[[], ClusterStatus],
        tenants: FollowedTenants | None,
        usage: UsageService,
    ) -> None:
        self._status = status
        self._tenants = tenants
        self._usage = usage
        self._threads = TenantThreads("the tenants", num_threads=4, num_each=2, max_waiting=16)

    def handler(self, methods: Methods) -> grpc.GenericRpcHandler:
        """What a gRPC server calls."""
        unary = methods.unary
        by_name = {
            "GetStatus": unary("GetStatus", self.get_status, GetStatusRequest),
            "GetUsage": unary("GetUsage", self._usage.get_usage, GetUsageRequest),
            "ListTenants": unary("ListTenants", self._list, ListTenantsRequest),
            "CreateTenant": unary("CreateTenant", self._create, CreateTenantRequest),
            "UpdateTenant": unary("UpdateTenant", self._update, UpdateTenantRequest),
            "RotateKey": unary("RotateKey", self._rotate, RotateKeyRequest),
            "DeleteTenant": unary("DeleteTenant", self._delete, DeleteTenantRequest),
        }
        return grpc.method_handlers_generic_handler(NAME, by_name)

    def close(self) -> None:
        """Begin no more calls of Redis."""
        self._threads.close()

    async def get_status(self, _: GetStatusRequest, call: ClientCall) -> ClusterStatus:
        """Only an operator sees what other tenants do."""
        status = self._status()
        return status if call.lease.tenant.is_admin else without_others(status, call.tenant)

    async def _list(self, _: ListTenantsRequest, call: ClientCall) -> ListTenantsResponse:
        tenants = self._for_admins(call)
        await self._threads.run(call.tenant, tenants.refresh)
        records = sorted(tenants.snapshot.records.items())
        return ListTenantsResponse(tenants=[to_tenant(record) for _, record in records])

    async def _create(self, request: CreateTenantRequest, call: ClientCall) -> NewKey:
        tenants = self._for_admins(call)
        tenant = with_terms(tenancy.Tenant(request.tenant.name), request.tenant, TERMS)
        return NewKey(key=await self._changed(call, tenants, tenants.directory.create, tenant))

    async def _update(self, request: UpdateTenantRequest, call: ClientCall) -> Tenant:
        tenants, new = self._for_admins(call), request.tenant
        fields = list(request.update_mask.paths)
        if not fields:
            raise InvalidRequest("update_mask must name the fields to change.")

        def change(tenant: tenancy.Tenant) -> tenancy.Tenant:
            return with_terms(tenant, new, fields)

        return to_tenant(
            await self._changed(call, tenants, tenants.directory.update, new.name, change)
        )

    async def _rotate(self, request: RotateKeyRequest, call: ClientCall) -> NewKey:
        tenants = self._for_admins(call)
        if not 0 <= request.grace_s <= LONGEST_GRACE_S:
            raise InvalidRequest("A grace period is at most a year.")
        key = await self._changed(
            call, tenants, tenants.directory.rotate, request.name, request.grace_s
        )
        return NewKey(key=key)

    async def _delete(self, request: DeleteTenantRequest, call: ClientCall) -> DeleteTenantResponse:
        tenants = self._for_admins(call)
        await self._changed(call, tenants, tenants.directory.delete, request.name)
        return DeleteTenantResponse()

    def _for_admins(self, call: ClientCall) -> FollowedTenants:
        call.lease.tenant.check_admin()
        if self._tenants is None:
            raise ConfigError("This cluster has no keys; start it with gateway.auth set to keys.")
        return self._tenants

    async def _changed(
        self, call: ClientCall, tenants: FollowedTenants, change: Callable[..., T], *args: Any
    ) -> T:
        """Do it; here it counts when this returns, in other gateways a moment later."""

        def change_and_follow() -> T:
            answer = change(*args)
            tenants.follow()
            return answer

        return await self._threads.run(call.tenant, change_and_follow)


def without_others(status: ClusterStatus, tenant: str) -> ClusterStatus:
    """Restrict the status to what concerns one tenant."""
    shown = ClusterStatus()
    shown.CopyFrom(status)
    del shown.tenants[:]
    shown.tenants.extend(load for load in status.tenants if load.tenant == tenant)
    return shown


def with_terms(tenant: tenancy.Tenant, new: Tenant, fields: Iterable[str]) -> tenancy.Tenant:
    """A tenant with some fields of a message in place of its own. Raises InvalidRequest."""
    changes: dict[str, Any] = {}
    for field in fields:
        if field not in TERMS:
            raise InvalidRequest(f"{field!r} can't be changed; what can is {', '.join(TERMS)}.")
        value = getattr(new, field)
        changes[TERMS[field]] = value if isinstance(value, bool) else value or None
    changes["models"] = tuple(changes.get("models", tenant.models) or ())
    changes["weight"] = changes.get("weight", tenant.weight) or 1.0
    return replace(tenant, **changes)


def to_tenant(record: TenantRecord) -> Tenant:
    """A record as a message."""
    tenant = record.tenant
    return Tenant(
        name=tenant.name,
        weight=tenant.weight,
        tokens_per_minute=tenant.tokens_per_minute or 0,
        max_in_flight=tenant.max_in_flight or 0,
        kv_bytes=tenant.kv_bytes or 0,
        models=tenant.models,
        expires=tenant.expires or 0.0,
        disabled=tenant.is_disabled,
        admin=tenant.is_admin,
        created=record.created,
        keys=[
            Key(key_id=key.key_id, created=key.created, expires=key.expires or 0.0)
            for key in record.keys
        ],
    )
