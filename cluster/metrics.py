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
    "choice": "fetch, recompute, or given_up (the fetch took too long)",
    "direction": "read or written",
    "error": "the kind of error, like `overloaded`, `quota_exceeded` or `unauthenticated`",
    "expert_group": "number of the group of experts, from 0",
    "group": "KV cache group: global or sliding",
    "host": "an expert host's id",
    "layer": "position of the layer in the model, from 0",
    "method": "an RPC's name, or the path of an HTTP route",
    "model": "the served model's id",
    "outcome": "for writes to the KV store written, present (it was there already), queue_full, "
    "unreachable, server_full or over_budget; for reads ok, missing, damaged, foreign or "
    "unreachable",
    "phase": "prefill or decode",
    "reason": "why it ended: for requests stop, length, abort, deadline or error; for calls that "
    "the gateway ended early client, deadline or stalled",
    "state": "state of a block: used, cached or unused",
    "status": "a gRPC status code's name",
    "tenant": "the tenant's name; (none) for calls without a valid key; a process shows the first "
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
    gateway_aborted_total = _counter("Calls that ended early", "tenant", "method", "reason")
    gateway_errors_total = _counter(
        "Calls that were refused or failed", "tenant", "method", "error"
    )
    gateway_ready = _gauge("1 while a token can be produced", "model")

    # Requests, as the decoder sees them.
    requests_waiting = _gauge("Requests in the queue", "model")
    requests_running = _gauge("Requests that hold KV blocks", "model")
    tenant_requests_waiting = _gauge("A tenant's requests in the queue", "model", "tenant")
    tenant_requests_running = _gauge("A tenant's requests that had a first step", "model", "tenant")
    tenant_kv_bytes = _gauge(
        "KV cache in memory held by a tenant's unfinished requests", "model", "tenant"
    )
    tenant_service_total = _counter(
        "Service by fair share; 1 is the cost of a prompt's first token", "model", "tenant"
    )
    requests_total = _counter("Requests that ended", "model", "tenant", "reason")
    prompt_tokens_total = _counter(
        "Prompt tokens of requests that had a first step, cached tokens included", "model", "tenant"
    )
    generated_tokens_total = _counter("Sampled tokens", "model", "tenant")
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
    prefix_hits_total = _counter("Started requests that found a cached prefix", "model", "tenant")
    cached_tokens_total = _counter("Prompt tokens found cached and not computed", "model", "tenant")
    saved_prefill_seconds_total = _counter(
        "Estimated time that computing the cached tokens would have taken", "model", "tenant"
    )

    # Steps of the engine.
    step_duration_seconds = _histogram("One step of the engine", STEP_BUCKETS, "model")
    computed_tokens_total = _counter("Tokens run through the model", "model", "phase")
    kv_blocks = _gauge("Blocks of the KV cache", "model", "group", "state")
    kv_evictions_total = _counter("Cached blocks that were evicted", "model", "group")
    preemptions_total = _counter("Requests preempted for lack of blocks", "model")

    # Of an expert host itself.
    expert_tokens_total = _counter(
        "Token slots computed by a host: a token counts once for each of its experts there",
        "model",
        "host",
        "layer",
    )

    expert_group_tokens_total = _counter(
        "Token slots computed by a host in all layers, by group of experts",
        "model",
        "host",
        "expert_group",
    )

    # Expert calls, as the ExpertRouter sees them.
    expert_call_duration_seconds = _histogram(
        "From sending a call to its reply; for a reply that arrived before it was awaited, the "
        "host's own time and the time to take it in",
        CALL_BUCKETS,
        "model",
        "host",
    )
    expert_wait_seconds_total = _counter("Time in combine spent waiting for hosts", "model")
    expert_retries_total = _counter("Calls that failed at this host", "model", "host")
    expert_fallbacks_total = _counter(
        "Dispatches of which the decoder computed a part, because no host held it", "model"
    )
    expert_link_up = _gauge("1 while the link to a host works", "model", "host")
    placement_epoch = _gauge("Epoch of the expert placement in use", "model")

    # The KV store.
    kv_store_up = _gauge("1 while Redis answers", "model")
    kv_store_writable = _gauge("0 while Redis refuses writes, for example when it is full", "model")
    kv_store_writes_total = _counter("Values given to the store", "model", "outcome")
    kv_store_reads_total = _counter("Values read from the store", "model", "outcome")
    kv_store_bytes_total = _counter("Bytes of values written and read", "model", "direction")
    kv_store_queue_bytes = _gauge("Bytes that wait to be written", "model")
    kv_store_used_bytes = _gauge("Bytes in Redis, when last read", "model", "tenant")
    kv_store_memory_bytes = _gauge("Memory used by the Redis server, when last read", "model")
    kv_store_max_bytes = _gauge(
        "Memory limit of the Redis server, 0 for none, when last read", "model"
    )
    kv_store_read_bytes_per_second = _gauge("Recent rate of reads; 0 before the first", "model")
    kv_store_decisions_total = _counter(
        "Prefixes found in the store, by what was done with them",
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
