"""The decoder's metrics: requests and steps, expert calls and links."""

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
class _RequestTimes:
    tenant: str
    arrived_at: float
    token_gaps: Histogram  # of the tenant: looked up once, observed for every token
    is_running: bool = False
    last_token_at: float | None = None


class EngineMeter:
    """Counts and times every request of the decoder; called by the step thread only."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        """Count into `metrics`, with `model` as a label."""
        self._metrics = metrics
        self._model = model
        self._clocks: dict[str, _RequestTimes] = {}
        self._waiting = TenantGauge(metrics.tenant_requests_waiting, model)
        self._running = TenantGauge(metrics.tenant_requests_running, model)
        self._kv_bytes = TenantGauge(metrics.tenant_kv_bytes, model)
        self._tenants: set[str] = set()  # all since the start
        self._service: dict[str, float] = {}  # by tenant
        self._computed = {"prefill": 0, "decode": 0}
        self._preemptions = 0
        self._evicted: dict[str, int] = {}

    def accepted(self, request: Request) -> None:
        """Start to time a request that entered the queue."""
        labels = (self._model, request.tenant)
        gaps = self._metrics.inter_token_latency_seconds(*labels)
        self._clocks[request.request_id] = _RequestTimes(request.tenant, request.arrived_at, gaps)
        self._tenants.add(request.tenant)

    def started(self, request: Request, queue_s: float, saved_prefill_s: float) -> None:
        """Count a request's first step.

        Args:
            request: Its prompt and its cached tokens are counted.
            queue_s: Seconds from its arrival to this step.
            saved_prefill_s: Estimated seconds of prefill that its cached tokens have saved.
        """
        labels = (self._model, request.tenant)
        if (clock := self._clocks.get(request.request_id)) is not None:
            clock.is_running = True
        self._metrics.queue_time_seconds(*labels).observe(queue_s)
        self._metrics.prefix_queries_total(*labels).inc()
        self._metrics.prefix_hits_total(*labels).inc(request.num_cached_tokens > 0)
        # Together, so that no scrape sees more cached than prompt tokens.
        self._metrics.prompt_tokens_total(*labels).inc(len(request.prompt_ids))
        self._metrics.cached_tokens_total(*labels).inc(request.num_cached_tokens)
        self._metrics.saved_prefill_seconds_total(*labels).inc(saved_prefill_s)

    def step(self, outputs: Sequence[RequestOutput], started_at: float) -> None:
        """Count a step that is done; `started_at` is on time.monotonic's clock."""
        now = time.monotonic()
        self._metrics.step_duration_seconds(self._model).observe(now - started_at)
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
                self._metrics.request_duration_seconds(*labels).observe(now - clock.arrived_at)
        for tenant, count in num_tokens.items():
            self._metrics.generated_tokens_total(self._model, tenant).inc(count)

    def load(self, load: EngineLoad) -> None:
        """Set the engine's gauges and counters; called once a second."""
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
        """Set the bytes of KV cache that each tenant holds; called once a second."""
        for load in loads:
            self._kv_bytes.set(load.tenant, load.kv_bytes)

    def shares(self, shares: Mapping[str, TenantShare]) -> None:
        """Count the service of each tenant, as fair share measures it; called once a second."""
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

    def _token(self, clock: _RequestTimes, num_tokens: int, now: float) -> None:
        if clock.last_token_at is None:
            labels = (self._model, clock.tenant)
            self._metrics.time_to_first_token_seconds(*labels).observe(now - clock.arrived_at)
        else:
            clock.token_gaps.observe((now - clock.last_token_at) / num_tokens)
        clock.last_token_at = now


class ExpertMeter:
    """Counts expert calls, as the router's observer, and the state of its links."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        """Count into `metrics`, with `model` as a label."""
        self._metrics = metrics
        self._model = model
        self._waited_s = 0.0
        self._num_fallbacks = 0

    def answered(self, host_id: str, latency_s: float) -> None:
        """Count a call that a host answered."""
        self._metrics.expert_call_duration_seconds(self._model, host_id).observe(latency_s)

    def failed(self, host_id: str) -> None:
        """Count a call to a host that failed and is retried elsewhere."""
        self._metrics.expert_retries_total(self._model, host_id).inc()

    def update(
        self, placement: ExpertPlacement, stats: CallStats, problems: Mapping[str, str]
    ) -> None:
        """Set what is known once a second.

        Args:
            placement: Its hosts are up, or not; its epoch.
            stats: Fallbacks, and the time that the decoder waited for hosts.
            problems: The hosts without a link.
        """
        for host_id in placement.host_ids:
            is_up = host_id not in problems
            self._metrics.expert_link_up(self._model, host_id).set(is_up)
            self._metrics.expert_retries_total(self._model, host_id)  # so that it is exported as 0
        self._metrics.placement_epoch(self._model).set(placement.epoch)
        waited_s = stats.waited_s
        self._metrics.expert_wait_seconds_total(self._model).inc(waited_s - self._waited_s)
        self._waited_s = waited_s
        num_new = stats.num_fallbacks - self._num_fallbacks
        self._metrics.expert_fallbacks_total(self._model).inc(num_new)
        self._num_fallbacks += num_new
