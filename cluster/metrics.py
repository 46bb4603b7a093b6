"""Every metric of the product, declared once, and the HTTP server that shows them to Prometheus."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)

from cluster.errors import ConfigError, PortTaken
from cluster.metric_families import MAX_NAMED_TENANTS, OTHERS, MetricSpec, TenantNames

# Upper bounds in seconds: from a short prompt that was cached to 256K tokens that were not.
REQUEST_BUCKETS = (
    *(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0),
)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 10)
CALL_BUCKETS = (
    *(step * 10.0**exponent for exponent in range(-5, -1) for step in (1, 1.5, 2, 3, 5, 7)),
    *(0.1, 0.2, 0.5, 1, 5, 25),
)

LABELS = {
    "choice": "fetch or recompute",
    "direction": "read or written",
    "error": "its kind, as `overloaded`, `quota_exceeded` or `unauthenticated`",
    "expert_group": "its number, from 0",
    "group": "of the KV cache: global or sliding",
    "host": "an expert host's id",
    "layer": "its position in the model, from 0",
    "method": "an RPC's name, or the path of an HTTP route",
    "model": "the served model's id",
    "outcome": "of a write to the KV store: written, present (it was there), queue_full, "
    "unreachable, server_full, over_budget; of a read: ok, missing, damaged, foreign, unreachable",
    "phase": "prefill or decode",
    "reason": "why it ended: of a request stop, length, abort, deadline or error; of a call that "
    "the gateway gave up client, deadline or stalled",
    "state": "of a block: used, cached or unused",
    "status": "a gRPC status code's name",
    "tenant": "its name; (none) for calls without a valid key; a process shows the first "
    f"{MAX_NAMED_TENANTS} tenants by name, all others as {OTHERS}",
}


def _counter(help_text: str, *labels: str) -> MetricSpec[Counter]:
    return MetricSpec(Counter, help_text, labels, ())


def _gauge(help_text: str, *labels: str) -> MetricSpec[Gauge]:
    return MetricSpec(Gauge, help_text, labels, ())


def _histogram(help_text: str, buckets: tuple[float, ...], *labels: str) -> MetricSpec[Histogram]:
    return MetricSpec(Histogram, help_text, labels, buckets)


class Metrics:
    """The metrics of one process, on a registry of its own.

    Each part of the cluster touches some of them. All have labels, so that a process shows nothing
    of what other parts measure.
    """

    # Gateway.
    gateway_streams = _gauge("Calls that are being answered", "tenant", "method")
    gateway_requests_total = _counter("Calls that ended", "tenant", "method", "status")
    gateway_aborted_total = _counter("Calls given up early", "tenant", "method", "reason")
    gateway_errors_total = _counter(
        "Calls that were refused or failed", "tenant", "method", "error"
    )
    gateway_ready = _gauge("1 while a token can be produced", "model")

    # Requests, as the decoder sees them.
    requests_waiting = _gauge("Requests in the queue", "model")
    requests_running = _gauge("Requests that hold KV blocks", "model")
    tenant_requests_waiting = _gauge("Of a tenant, in the queue", "model", "tenant")
    tenant_requests_running = _gauge("Of a tenant, that had a first step", "model", "tenant")
    tenant_kv_bytes = _gauge(
        "Of the KV cache in memory, that a tenant's unfinished requests hold", "model", "tenant"
    )
    tenant_service_total = _counter(
        "Of the engine, in the cost of a prompt's first token (fair share)", "model", "tenant"
    )
    requests_total = _counter("Requests that ended", "model", "tenant", "reason")
    prompt_tokens_total = _counter(
        "Prompt tokens of requests that had a first step, cached ones too", "model", "tenant"
    )
    generated_tokens_total = _counter("Tokens sampled", "model", "tenant")
    queue_time_seconds = _histogram(
        "From arrival to the first step", REQUEST_BUCKETS, "model", "tenant"
    )
    time_to_first_token_seconds = _histogram(
        "From arrival to the first token (TTFT)", REQUEST_BUCKETS, "model", "tenant"
    )
    inter_token_latency_seconds = _histogram(
        "From a token to the next one (ITL)", STEP_BUCKETS, "model", "tenant"
    )
    request_duration_seconds = _histogram(
        "From arrival to the end (E2E)", REQUEST_BUCKETS, "model", "tenant"
    )

    prefix_queries_total = _counter("Requests started", "model", "tenant")
    prefix_hits_total = _counter("Of them, those that found a prefix cached", "model", "tenant")
    cached_tokens_total = _counter(
        "Tokens that requests found cached and didn't compute", "model", "tenant"
    )
    saved_prefill_seconds_total = _counter(
        "What computing them would have taken, as estimated", "model", "tenant"
    )

    # Steps of the engine.
    step_duration_seconds = _histogram("One step of the engine", STEP_BUCKETS, "model")
    computed_tokens_total = _counter("Tokens run through the model", "model", "phase")
    kv_blocks = _gauge("Blocks of the KV cache", "model", "group", "state")
    kv_evictions_total = _counter("Cached blocks given to others", "model", "group")
    preemptions_total = _counter("Requests sent back to the queue for lack of blocks", "model")

    # Of an expert host itself.
    expert_tokens_total = _counter(
        "Token slots that a host computed: a token counts once for each of its experts there",
        "model",
        "host",
        "layer",
    )

    expert_group_tokens_total = _counter(
        "The same of all layers, by group of experts", "model", "host", "expert_group"
    )

    # Expert calls, as the ExpertRouter sees them.
    expert_call_duration_seconds = _histogram(
        "From sending to the answer; of one that came before it was asked for, the host's own time "
        "and taking it in",
        CALL_BUCKETS,
        "model",
        "host",
    )
    expert_wait_seconds_total = _counter(
        "Time in combine that nothing else hid, waiting for hosts", "model"
    )
    expert_retries_total = _counter("Calls that failed at this host", "model", "host")
    expert_fallbacks_total = _counter(
        "Dispatches of which the decoder computed a part, for want of a host", "model"
    )
    expert_link_up = _gauge("1 while the link to a host works", "model", "host")
    placement_epoch = _gauge("Epoch of the expert placement in use", "model")

    # The KV store.
    kv_store_up = _gauge("1 while Redis answers", "model")
    kv_store_writable = _gauge("0 while Redis refuses what somebody writes, as when full", "model")
    kv_store_writes_total = _counter("Values given to the store", "model", "outcome")
    kv_store_reads_total = _counter("Values asked of the store", "model", "outcome")
    kv_store_bytes_total = _counter("Bytes of values moved", "model", "direction")
    kv_store_queue_bytes = _gauge("Bytes that wait to be written", "model")
    kv_store_used_bytes = _gauge("Bytes in Redis, as last seen", "model", "tenant")
    kv_store_memory_bytes = _gauge("Of the whole Redis server, as last seen", "model")
    kv_store_max_bytes = _gauge("That it may use, 0 for no limit, as last seen", "model")
    kv_store_read_bytes_per_second = _gauge(
        "What reads reached lately; 0 before the first", "model"
    )
    kv_store_decisions_total = _counter(
        "Prefixes found in the store; choice: fetch, recompute or given_up (while on its way)",
        "model",
        "choice",
    )

    def __init__(self, registry: CollectorRegistry) -> None:
        tenants = TenantNames()
        for spec in METRICS:
            self.__dict__[spec.attribute] = spec.create(registry, tenants)


METRICS: tuple[MetricSpec[Any], ...] = tuple(
    value for value in vars(Metrics).values() if isinstance(value, MetricSpec)
)


def part_registry() -> CollectorRegistry:
    """A registry for one process, which shows its memory, CPU time and open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


@dataclass(frozen=True)
class MetricsServer:
    """A running /metrics server; closes at the end of a `with` block."""

    host: str
    port: int
    _server: Any
    _thread: Any

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_metrics_server(host: str, port: int, registry: CollectorRegistry) -> MetricsServer:
    """Serve `/metrics` of a registry from a thread, on this address only; port 0 takes a free one.

    Raises PortTaken when another process listens there, ConfigError when the address can't be used.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except socket.gaierror:
        raise ConfigError(
            f"gateway.metrics_host: {host!r} is not an address of this machine."
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"{host}:{port}, where /metrics should be, is taken; set another metrics_port."
            ) from None
        raise ConfigError(f"/metrics can't listen on {host}:{port}: {error.strerror}.") from None
    return MetricsServer(host, server.server_port, server, thread)
