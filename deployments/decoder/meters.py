"""What each part tells Prometheus: the decoder of requests and expert calls, a host of its load."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import Histogram

from cluster.metric_families import TenantGauge
from cluster.metrics import Metrics
from cluster.placement import ExpertPlacement
from engine.outputs import RequestOutput
from engine.request import Request
from engine.scheduling.policy import TenantShare
from experts.stats import CallStats
from protos.briolette.v1.admin_pb2 import EngineLoad, TenantLoad


@dataclass(slots=True)
class _Clock:
    tenant: str
    arrived: float
    gaps: Histogram  # of the tenant: looked up once, observed for every token
    is_running: bool = False
    last_token: float | None = None


class EngineMeter:
    """Counts and times every request of the decoder; called by the step loop only."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._clocks: dict[str, _Clock] = {}
        self._waiting = TenantGauge(metrics.tenant_requests_waiting, model)
        self._running = TenantGauge(metrics.tenant_requests_running, model)
        self._kv_bytes = TenantGauge(metrics.tenant_kv_bytes, model)
        self._tenants: set[str] = set()  # that were seen
        self._service: dict[str, float] = {}  # by tenant
        self._computed = {"prefill": 0, "decode": 0}
        self._preemptions = 0
        self._evicted: dict[str, int] = {}

    def accepted(self, request: Request) -> None:
        """A request entered the queue."""
        labels = (self._model, request.tenant)
        gaps = self._metrics.inter_token_latency_seconds(*labels)
        self._clocks[request.request_id] = _Clock(request.tenant, request.arrived_at, gaps)
        self._tenants.add(request.tenant)

    def started(self, request: Request, queue_s: float, saved_prefill_s: float) -> None:
        """A request had its first step; what it found cached saved so many seconds."""
        labels = (self._model, request.tenant)
        if (clock := self._clocks.get(request.request_id)) is not None:
            clock.is_running = True
        self._metrics.queue_time_seconds(*labels).observe(queue_s)
        self._metrics.prefix_queries_total(*labels).inc()
        self._metrics.prefix_hits_total(*labels).inc(request.num_cached_tokens > 0)
        # At the same moment, so that never more is cached than asked.
        self._metrics.prompt_tokens_total(*labels).inc(len(request.prompt_ids))
        self._metrics.cached_tokens_total(*labels).inc(request.num_cached_tokens)
        self._metrics.saved_prefill_seconds_total(*labels).inc(saved_prefill_s)

    def step(self, outputs: Sequence[RequestOutput], started: float) -> None:
        """A step that began at `started` (time.monotonic) is done."""
        now = time.monotonic()
        self._metrics.step_duration_seconds(self._model).observe(now - started)
        num_tokens: Counter[str] = Counter()  # by tenant
        for output in outputs:
            clock = self._clocks.get(output.request_id)
            if clock is None:
                continue
            if output.new_token_ids:
                num_tokens[clock.tenant] += len(output.new_token_ids)
                self._token(clock, len(output.new_token_ids), now)
            if output.finish_reason is not None:
                del self._clocks[output.request_id]
                labels = (self._model, clock.tenant)
                self._metrics.requests_total(*labels, output.finish_reason.value).inc()
                self._metrics.request_duration_seconds(*labels).observe(now - clock.arrived)
        for tenant, count in num_tokens.items():
            self._metrics.generated_tokens_total(self._model, tenant).inc(count)

    def load(self, load: EngineLoad) -> None:
        """The engine's gauges and counters, once a second."""
        metrics, model = self._metrics, self._model
        metrics.requests_waiting(model).set(load.num_waiting)
        metrics.requests_running(model).set(load.num_running)
        for group in load.kv_blocks:
            metrics.kv_blocks(model, group.group, "used").set(group.used)
            num_unused = group.total - group.used - group.cached
            metrics.kv_blocks(model, group.group, "cached").set(group.cached)
            metrics.kv_blocks(model, group.group, "unused").set(num_unused)
            num_new = group.evicted - self._evicted.get(group.group, 0)
            metrics.kv_evictions_total(model, group.group).inc(num_new)
            self._evicted[group.group] = group.evicted
        totals = {"prefill": load.prefill_tokens, "decode": load.decode_tokens}
        for phase, total in totals.items():
            metrics.computed_tokens_total(model, phase).inc(total - self._computed[phase])
        self._computed = totals
        metrics.preemptions_total(model).inc(load.preemptions - self._preemptions)
        self._preemptions = load.preemptions
        self._load_by_tenant()

    def held(self, loads: Iterable[TenantLoad]) -> None:
        """What each tenant holds of the KV cache, once a second."""
        for load in loads:
            self._kv_bytes.set(load.tenant, load.kv_bytes)

    def shares(self, shares: Mapping[str, TenantShare]) -> None:
        """What each tenant has received of the engine, once a second."""
        for tenant, share in shares.items():
            grown = share.service - self._service.get(tenant, 0.0)
            self._metrics.tenant_service_total(self._model, tenant).inc(grown)
            self._service[tenant] = share.service

    def _load_by_tenant(self) -> None:
        clocks = self._clocks.values()
        running = Counter(clock.tenant for clock in clocks if clock.is_running)
        waiting = Counter(clock.tenant for clock in clocks if not clock.is_running)
        for tenant in self._tenants:
            self._running.set(tenant, running[tenant])
            self._waiting.set(tenant, waiting[tenant])

    def _token(self, clock: _Clock, num_tokens: int, now: float) -> None:
        if clock.last_token is None:
            labels = (self._model, clock.tenant)
            self._metrics.time_to_first_token_seconds(*labels).observe(now - clock.arrived)
        else:
            clock.gaps.observe((now - clock.last_token) / num_tokens)
        clock.last_token = now


class ExpertMeter:
    """Is told of every expert call by the router, and of the rest once a second."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._waited_s = 0.0
        self._num_fallbacks = 0

    def answered(self, host_id: str, latency_s: float) -> None:
        self._metrics.expert_call_duration_seconds(self._model, host_id).observe(latency_s)

    def failed(self, host_id: str) -> None:
        self._metrics.expert_retries_total(self._model, host_id).inc()

    def update(
        self, placement: ExpertPlacement, stats: CallStats, problems: Mapping[str, str]
    ) -> None:
        """The links, the placement, the fallbacks, and the time that nothing hid."""
        for host_id in placement.host_ids:
            is_up = host_id not in problems
            self._metrics.expert_link_up(self._model, host_id).set(is_up)
            self._metrics.expert_retries_total(self._model, host_id)  # shown from the start
        self._metrics.placement_epoch(self._model).set(placement.epoch)
        waited_s = stats.waited_s
        self._metrics.expert_wait_seconds_total(self._model).inc(waited_s - self._waited_s)
        self._waited_s = waited_s
        num_new = stats.num_fallbacks - self._num_fallbacks
        self._metrics.expert_fallbacks_total(self._model).inc(num_new)
        self._num_fallbacks += num_new
