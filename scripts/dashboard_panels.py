"""What the Grafana dashboards show: a title, a unit and queries for each panel.

`M` selects the chosen models, `T` the chosen tenants. Counts and rates are 0 before anything has
happened; ratios and quantiles have no value then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

M, T, MT = 'model=~"$model"', 'tenant=~"$tenant"', 'model=~"$model", tenant=~"$tenant"'
GENERATING = 'method=~"Chat|ChatOnce|Complete|CompleteOnce|/v1/chat/completions|/v1/completions"'
PART = 'part!=""'  # the label that prometheus_targets.json gives each part
OR_ZERO = " or on() vector(0)"


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: queries by their legends; a legend may name labels, like `{{host}}`."""

    title: str
    unit: str  # Grafana's name of it
    queries: dict[str, str]
    help: str = ""
    kind: Literal["timeseries", "stat", "bargauge"] = "timeseries"
    is_stacked: bool = False


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard: rows of panels by title, and the labels that a reader can choose by."""

    name: str
    title: str
    variables: tuple[str, ...]
    rows: dict[str, tuple[Panel, ...]]


def stat(title: str, unit: str, query: str, help: str = "") -> Panel:
    """A panel with one present number."""
    return Panel(title, unit, {"": query}, help, "stat")


def quantiles(title: str, histogram: str, select: str) -> Panel:
    """A panel with p50, p90 and p99 of a duration."""
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return Panel(
        title, "s", {name: quantile(share, histogram, select) for name, share in shares.items()}
    )


def p99(title: str, histogram: str, select: str, by: str) -> Panel:
    """A panel with the p99 of a duration, a line for each value of a label."""
    return Panel(title, "s", {f"{{{{{by}}}}}": quantile(0.99, histogram, select, by)})


def rates(title: str, counter: str, select: str, *by: str, unit: str = "short") -> Panel:
    """A panel with a counter's rate, a line for each combination of labels."""
    return Panel(title, unit, {_legend(by): rate(counter, select, *by) + OR_ZERO})


def gauges(title: str, unit: str, gauge: str, select: str, *by: str) -> Panel:
    """A panel with a gauge, a line for each combination of labels."""
    return Panel(title, unit, {_legend(by): total(gauge, select, *by) + OR_ZERO})


def rate(metric: str, select: str, *by: str) -> str:
    """The sum of a counter's rates per second."""
    return f"sum{_by(by)} (rate(briolette_{metric}{{{select}}}[$__rate_interval]))"


def total(metric: str, select: str, *by: str) -> str:
    """The sum of a gauge."""
    return f"sum{_by(by)} (briolette_{metric}{{{select}}})"


def quantile(share: float, histogram: str, select: str, *by: str) -> str:
    """A quantile of a recent duration."""
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', select, 'le', *by)})"


def share(part: str, whole: str) -> str:
    return f"{part} / {whole}"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


def _legend(labels: tuple[str, ...]) -> str:
    return ": ".join(f"{{{{{label}}}}}" for label in labels)


READY = stat(
    "Ready",
    "bool_yes_no",
    f"max(briolette_gateway_ready{{{M}}})",
    "Yes while the cluster can produce a token.",
)
STORE = stat("KV store", "bool_yes_no", f"min(briolette_kv_store_up{{{M}}})" + OR_ZERO)
SAVED = stat(
    "Prefill saved",
    "short",
    rate("saved_prefill_seconds_total", MT),
    "Estimated seconds of prefill that caching saves per second.",
)
TOKENS = Panel(
    "Tokens per second",
    "short",
    {
        "out": rate("generated_tokens_total", MT),
        "in, computed": f"{rate('prompt_tokens_total', MT)} - {rate('cached_tokens_total', MT)}",
        "in, cached": rate("cached_tokens_total", MT),
    },
    is_stacked=True,
)
PROCESS_MEMORY = Panel("Memory", "bytes", {"{{part}}": f"process_resident_memory_bytes{{{PART}}}"})

OVERVIEW = Dashboard(
    "overview",
    "Briolette: overview",
    ("model", "tenant"),
    {
        "Now": (
            READY,
            stat("Running", "short", total("requests_running", M)),
            stat("Waiting", "short", total("requests_waiting", M)),
            stat("Tokens per second", "short", rate("generated_tokens_total", MT)),
            stat("Expert hosts linked", "short", total("expert_link_up", M) + OR_ZERO),
            STORE,
        ),
        "Speed": (
            quantiles("Time to first token", "time_to_first_token_seconds", MT),
            quantiles("Inter-token latency", "inter_token_latency_seconds", MT),
            quantiles("Time in the queue", "queue_time_seconds", MT),
            quantiles("Request duration", "request_duration_seconds", MT),
        ),
        "Traffic": (
            rates(
                "Calls that generate, by status",
                "gateway_requests_total",
                f"{T}, {GENERATING}",
                "status",
                unit="reqps",
            ),
            rates("Refused and failed", "gateway_errors_total", T, "error", unit="reqps"),
            rates("Aborted", "gateway_aborted_total", T, "reason", unit="reqps"),
            TOKENS,
        ),
        "Engine": (
            quantiles("Steps", "step_duration_seconds", M),
            rates("Tokens computed per second", "computed_tokens_total", M, "phase"),
            Panel(
                "Requests",
                "short",
                {"running": total("requests_running", M), "waiting": total("requests_waiting", M)},
                is_stacked=True,
            ),
            gauges("Calls being answered", "short", "gateway_streams", T, "method"),
        ),
        "Parts": (
            Panel("Scraped", "bool_yes_no", {"{{part}}": f"up{{{PART}}}"}),
            PROCESS_MEMORY,
            Panel(
                "CPU",
                "percentunit",
                {"{{part}}": f"rate(process_cpu_seconds_total{{{PART}}}[$__rate_interval])"},
            ),
            Panel("Open files", "short", {"{{part}}": f"process_open_fds{{{PART}}}"}),
        ),
    },
)

TENANTS = Dashboard(
    "tenants",
    "Briolette: tenants",
    ("model", "tenant"),
    {
        "Requests": (
            gauges("Running", "short", "tenant_requests_running", MT, "tenant"),
            gauges("Waiting", "short", "tenant_requests_waiting", MT, "tenant"),
            Panel(
                "Share of the engine",
                "percentunit",
                {
                    "{{tenant}}": f"{rate('tenant_service_total', MT, 'tenant')}"
                    f" / on() group_left() {rate('tenant_service_total', M)}"
                },
            ),
            rates("Ended", "requests_total", MT, "tenant", "reason", unit="reqps"),
            rates("Refused and failed", "gateway_errors_total", T, "tenant", "error", unit="reqps"),
        ),
        "Tokens per second": (
            rates("Out", "generated_tokens_total", MT, "tenant"),
            rates("In", "prompt_tokens_total", MT, "tenant"),
            rates("In, cached", "cached_tokens_total", MT, "tenant"),
            rates("Seconds of prefill saved", "saved_prefill_seconds_total", MT, "tenant"),
        ),
        "Speed": (
            p99("Time to first token, p99", "time_to_first_token_seconds", MT, "tenant"),
            p99("Inter-token latency, p99", "inter_token_latency_seconds", MT, "tenant"),
            p99("Time in the queue, p99", "queue_time_seconds", MT, "tenant"),
            p99("Request duration, p99", "request_duration_seconds", MT, "tenant"),
        ),
        "Memory": (
            Panel(
                "Prompt tokens cached",
                "percentunit",
                {
                    "{{tenant}}": share(
                        rate("cached_tokens_total", MT, "tenant"),
                        rate("prompt_tokens_total", MT, "tenant"),
                    )
                },
            ),
            gauges("KV cache held by requests", "bytes", "tenant_kv_bytes", MT, "tenant"),
            gauges("In Redis", "bytes", "kv_store_used_bytes", MT, "tenant"),
        ),
    },
)

EXPERTS = Dashboard(
    "experts",
    "Briolette: experts",
    ("model",),
    {
        "Now": (
            stat("Linked", "short", total("expert_link_up", M)),
            stat(
                "Waiting for experts",
                "percentunit",
                share(rate("expert_wait_seconds_total", M), rate("step_duration_seconds_sum", M)),
                "Share of the step time spent waiting for expert hosts.",
            ),
            stat(
                "Balance",
                "short",
                f"max({rate('expert_tokens_total', M, 'host')})"
                f" / avg({rate('expert_tokens_total', M, 'host')})",
                "Tokens of the busiest host divided by the mean; 1 is even.",
            ),
            stat("Placement epoch", "short", f"max(briolette_placement_epoch{{{M}}})"),
        ),
        "Calls": (
            p99("Call duration, p99", "expert_call_duration_seconds", M, "host"),
            rates("Calls per second", "expert_call_duration_seconds_count", M, "host"),
            gauges("Link", "bool_yes_no", "expert_link_up", M, "host"),
            quantiles("Call duration", "expert_call_duration_seconds", M),
        ),
        "Faults": (
            rates("Failed calls per second", "expert_retries_total", M, "host"),
            rates("Dispatches computed by the decoder, per second", "expert_fallbacks_total", M),
        ),
        "Token slots per second": (
            rates("By host", "expert_tokens_total", M, "host"),
            Panel(
                "By group of experts",
                "short",
                {
                    "{{expert_group}} on {{host}}": rate(
                        "expert_group_tokens_total", M, "host", "expert_group"
                    )
                },
                kind="bargauge",
            ),
        ),
    },
)

MEMORY = Dashboard(
    "memory",
    "Briolette: memory",
    ("model", "tenant"),
    {
        "Now": (
            stat(
                "Prompts that found a prefix",
                "percentunit",
                share(rate("prefix_hits_total", MT), rate("prefix_queries_total", MT)),
            ),
            stat(
                "Prompt tokens cached",
                "percentunit",
                share(rate("cached_tokens_total", MT), rate("prompt_tokens_total", MT)),
            ),
            SAVED,
            STORE,
            stat("Accepts writes", "bool_yes_no", f"min(briolette_kv_store_writable{{{M}}})"),
        ),
        "KV cache": (
            gauges("Blocks", "short", "kv_blocks", M, "group", "state"),
            Panel(
                "Blocks in use",
                "percentunit",
                {
                    "{{group}}": share(
                        total("kv_blocks", f'{M}, state="used"', "group"),
                        total("kv_blocks", M, "group"),
                    )
                },
            ),
            rates("Evicted blocks per second", "kv_evictions_total", M, "group"),
            rates("Preemptions per second", "preemptions_total", M),
        ),
        "Redis": (
            Panel(
                "Memory of the server",
                "bytes",
                {
                    "used": total("kv_store_memory_bytes", M),
                    "limit (0: none)": total("kv_store_max_bytes", M),
                },
            ),
            gauges("By tenant", "bytes", "kv_store_used_bytes", MT, "tenant"),
            rates("Bytes moved", "kv_store_bytes_total", M, "direction", unit="Bps"),
            gauges("Write queue", "bytes", "kv_store_queue_bytes", M),
            rates("Writes per second, by outcome", "kv_store_writes_total", M, "outcome"),
            rates("Reads per second, by outcome", "kv_store_reads_total", M, "outcome"),
            rates("Fetch or recompute, per second", "kv_store_decisions_total", M, "choice"),
            gauges("Recent read rate", "Bps", "kv_store_read_bytes_per_second", M),
        ),
        "Processes": (PROCESS_MEMORY,),
    },
)

DASHBOARDS = (OVERVIEW, TENANTS, EXPERTS, MEMORY)
