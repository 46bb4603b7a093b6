"""Meters: what a host tells Prometheus is as new as the scrape."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

from prometheus_client import CollectorRegistry

from cluster.metrics import Metrics
from cluster.placement import ExpertGroups
from deployments.decoder.meters import EngineMeter
from deployments.expert_host.meter import HostMeter
from engine.outputs import RequestOutput
from engine.request import FinishReason, Request, SamplingParams
from engine.scheduling.policy import TenantShare
from experts.host import ExpertHost
from protos.briolette.v1.admin_pb2 import EngineLoad, KvBlocks, TenantLoad

GROUPS = ExpertGroups(num_experts=2, num_groups=2)


@dataclass
class Host:
    """The part of an ExpertHost that is metered."""

    host_id: str = "host0"
    group_ids: tuple[int, ...] = (1,)
    expert_load: list[list[int]] = field(default_factory=lambda: [[0, 0], [0, 0]])

    def stats(self) -> Any:
        return self


def test_a_scrape_shows_the_load_of_now() -> None:
    host = Host()
    registry = HostMeter(cast(ExpertHost, host), GROUPS, "m").registry

    def shown() -> list[float]:
        samples = [sample for family in registry.collect() for sample in family.samples]
        return [s.value for s in samples if s.name == "briolette_expert_tokens_total"]

    assert shown() == [0, 0]
    host.expert_load = [[3, 1], [0, 2]]
    assert shown() == [4, 2]
    assert shown() == [4, 2]
    group = {"model": "m", "host": "host0", "expert_group": "1"}
    assert registry.get_sample_value("briolette_expert_group_tokens_total", group) == 1 + 2


def test_a_scrape_that_another_overtakes_shows_what_it_read() -> None:
    class SlowHost(Host):
        """Another scrape comes and goes between the first one's look at the load and its answer."""

        def stats(self) -> Any:
            read = Host(expert_load=self.expert_load)
            if self.expert_load[0][0] == 10:
                self.expert_load = [[20, 0], [0, 0]]
                with ThreadPoolExecutor(1) as pool:
                    overtaking.append(pool.submit(shown).result())
            return read

    host, overtaking = SlowHost(expert_load=[[10, 0], [0, 0]]), list[float | None]()
    registry = HostMeter(cast(ExpertHost, host), GROUPS, "m").registry

    def shown() -> float | None:
        layer = {"model": "m", "host": "host0", "layer": "0"}
        return registry.get_sample_value("briolette_expert_tokens_total", layer)

    assert (shown(), overtaking, shown()) == (10, [20], 20)


def test_what_was_found_cached_is_counted_by_tenant() -> None:
    registry = CollectorRegistry()
    meter = EngineMeter(Metrics(registry), "m")
    for tenant, num_cached in (("ann", 0), ("ann", 48), ("bob", 0)):
        request = Request("r", [1] * 50, SamplingParams(), 0, max_tokens=1, tenant=tenant)
        request.num_cached_tokens = num_cached
        meter.started(request, 0.0, 0.5 if num_cached else 0.0)

    def shown(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"briolette_{name}", {"model": "m", **labels})

    for tenant, counts in (("ann", (2, 1, 100, 48)), ("bob", (1, 0, 50, 0))):
        names = (
            *("prefix_queries_total", "prefix_hits_total"),
            *("prompt_tokens_total", "cached_tokens_total"),
        )
        assert tuple(shown(name, tenant=tenant) for name in names) == counts
    assert shown("saved_prefill_seconds_total", tenant="ann") == 0.5
    for evicted in (3, 7):
        blocks = KvBlocks(group="sliding", used=2, total=20, cached=5, evicted=evicted)
        meter.load(EngineLoad(kv_blocks=[blocks]))
        assert shown("kv_evictions_total", group="sliding") == evicted
    states = [shown("kv_blocks", group="sliding", state=s) for s in ("used", "cached", "unused")]
    assert states == [2, 5, 13]


def test_who_waits_and_runs_is_shown_by_tenant() -> None:
    registry = CollectorRegistry()
    meter = EngineMeter(Metrics(registry), "m")
    requests = [
        Request(f"r{i}", [1], SamplingParams(), 0, max_tokens=1, tenant=tenant)
        for i, tenant in enumerate(("ann", "ann", "bob"))
    ]

    def shown(state: str) -> list[float | None]:
        meter.load(EngineLoad())
        name = f"briolette_tenant_requests_{state}"
        return [
            registry.get_sample_value(name, {"model": "m", "tenant": tenant})
            for tenant in ("ann", "bob")
        ]

    for request in requests:
        meter.accepted(request)
    assert (shown("waiting"), shown("running")) == ([2, 1], [0, 0])
    for request in requests[1:]:
        meter.started(request, 0.0, 0.0)
    assert (shown("waiting"), shown("running")) == ([1, 0], [1, 1])
    meter.step([ended(request) for request in requests], 0.0)
    assert (shown("waiting"), shown("running")) == ([0, 0], [0, 0])


def ended(request: Request) -> RequestOutput:
    return RequestOutput(
        request_id=request.request_id,
        new_token_ids=[],
        text="",
        thought="",
        tool_calls=[],
        logprobs=None,
        finish_reason=FinishReason.STOP,
        error=None,
        error_status=None,
        num_prompt_tokens=1,
        num_output_tokens=0,
        num_thought_tokens=0,
        num_cached_tokens=0,
        num_fetched_tokens=0,
        matched_stop=None,
    )


def test_memory_is_shown_by_tenant() -> None:
    registry = CollectorRegistry()
    meter = EngineMeter(Metrics(registry), "m")
    for held in (4096, 0):
        meter.held([TenantLoad(tenant="ann", kv_bytes=held), TenantLoad(tenant="bob", kv_bytes=7)])
        for tenant, num_bytes in (("ann", held), ("bob", 7)):
            labels = {"model": "m", "tenant": tenant}
            assert registry.get_sample_value("briolette_tenant_kv_bytes", labels) == num_bytes


def test_service_is_counted_by_tenant() -> None:
    registry = CollectorRegistry()
    meter = EngineMeter(Metrics(registry), "m")
    for service in (10.0, 25.0):
        meter.shares({"ann": TenantShare(1.0, service, service)})
        labels = {"model": "m", "tenant": "ann"}
        assert registry.get_sample_value("briolette_tenant_service_total", labels) == service
