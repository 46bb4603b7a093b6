"""The JSON that the page reads."""

from __future__ import annotations

import asyncio

import numpy as np

from cluster.placement import ExpertGroups
from cluster.tenants.admission import OpenLease
from cluster.tenants.tenancy import Tenant
from cluster.tenants.usage import UsageBooks
from deployments.decoder.status import TenantLoads
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.http.page_api import to_json
from deployments.gateway.services.admin import Admin
from deployments.gateway.services.usage import UsageService
from deployments.messages import to_group_load
from engine.request import Request, RequestState, SamplingParams
from experts.stats import ExpertLoad
from protos.briolette.v1.admin_pb2 import ClusterStatus, GetStatusRequest, GroupLoad, TenantLoad
from protos.briolette.v1.sessions_pb2 import Session


def test_json_has_all_fields_and_numbers_that_are_numbers() -> None:
    status = to_json(ClusterStatus(group_load=[GroupLoad(group_id=1, choices=2**40)]))
    assert status["group_load"] == [{"group_id": 1, "choices": 2**40}]
    assert status["load"]["kv_blocks"] == [] and status["decoder"]["pid"] == 0
    assert to_json(Session(name="a"))["tokens_in_memory"] is None
    assert to_json(Session(name="a", tokens_in_memory=0))["tokens_in_memory"] == 0


def test_the_heat_of_a_group_is_that_of_its_experts_in_all_layers() -> None:
    load = ExpertLoad(num_layers=2, num_experts=5)
    load.count(0, np.array([0, 1, 4]))
    load.count(1, np.array([4, 4]))
    groups = to_group_load(load, ExpertGroups(5, 2))
    assert [(group.group_id, group.choices) for group in groups] == [(0, 2), (1, 3)]


def test_only_an_operator_sees_other_tenants() -> None:
    status = ClusterStatus(tenants=[TenantLoad(tenant="ann"), TenantLoad(tenant="bob")])
    admin = Admin(lambda: status, None, UsageService(UsageBooks(None)))
    calls = [
        ClientCall(OpenLease(tenant)) for tenant in (Tenant("op", is_admin=True), Tenant("bob"))
    ]
    whole, own = [asyncio.run(admin.get_status(GetStatusRequest(), call)) for call in calls]
    assert whole == status
    assert [load.tenant for load in own.tenants] == ["bob"]
    assert len(status.tenants) == 2


def test_what_a_tenant_asks_for_is_counted() -> None:
    loads = TenantLoads(lambda request: 100 if request.state is RequestState.RUNNING else 0)
    requests = [
        Request(str(i), [1] * 10, SamplingParams(), 0, max_tokens=9, tenant=tenant)
        for i, tenant in enumerate(("bob", "ann", "ann"))
    ]
    for request in requests:
        loads.accepted(request)
    requests[1].state = RequestState.RUNNING
    requests[2].state = RequestState.WAITING_FOR_BLOCKS
    loads.generated(requests[1], 7)
    ann, bob = loads.measure(requests)
    assert (ann.tenant, ann.num_running, ann.num_waiting) == ("ann", 1, 1)
    assert (ann.prompt_tokens, ann.output_tokens, ann.kv_bytes) == (20, 7, 100)
    assert (bob.num_running, bob.num_waiting, bob.prompt_tokens, bob.kv_bytes) == (0, 1, 10, 0)
    assert [load.num_running for load in loads.measure([])] == [0, 0]
