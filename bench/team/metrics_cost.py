"""What metrics, usage and logs cost: `python -m bench.team.metrics_cost`.

A run of the decoder's real step loop counts the calls that it makes of Prometheus' client, of the
usage books and of the log of requests, from the first prompt to the last token; a loop around each
kind of call says what one costs, and a second run, without counting, how long the steps take. The
share is calls times cost over the time of the steps. Not counted: what the gateway counts as a call
begins, the KV store's metrics, and scrapes.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import prometheus_client as prometheus
from prometheus_client import CollectorRegistry

from bench.lib.card import Check, pin, report, table
from bench.lib.models import BenchModel, load_models, random_prompts
from bench.lib.ours import bench_config
from cluster.checkpoint import Checkpoint
from cluster.links.connect import Endpoint
from cluster.metric_families import Family
from cluster.metrics import Metrics
from cluster.placement import ExpertGroups, ExpertPlacement
from cluster.spec import ModelSpec
from cluster.tenants.admission import OpenLease
from cluster.tenants.usage import UsageBooks
from deployments.decoder.link import GatewayLinks
from deployments.decoder.meters import EngineMeter, ExpertMeter
from deployments.decoder.step_loop import StepLoop
from deployments.gateway.calls.client_call import ClientCall
from deployments.gateway.calls.request_log import RequestLog
from deployments.gateway.services.usage import UsageService
from deployments.loading import ModelSource, load_engine, load_local_experts
from engine.core import EngineCore
from experts.host import ExpertHost
from experts.host_process import serve_host
from experts.router import ExpertRouter
from protos.briolette.v1.admin_pb2 import ClusterStatus
from protos.briolette.v1.inference_pb2 import Sampling, TokenIds
from protos.briolette.v1.stream_pb2 import Add, FromDecoder, Spent, ToDecoder

PROMPT_LEN, NUM_TOKENS = 32, 64
HOST_IDS = ["host0", "host1"]
START_S, RUN_S = 60.0, 120.0
MOST_PERCENT = 1.0
COUNTED: dict[str, tuple[type[Any], str]] = {
    "lookup": (Family, "__call__"),
    "inc": (prometheus.Counter, "inc"),
    "set": (prometheus.Gauge, "set"),
    "observe": (prometheus.Histogram, "observe"),
    "usage": (UsageService, "count"),
    "log": (RequestLog, "ended"),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    args = _arguments(argv)
    pin(2)
    results, checks = run(args.models, args.streams)
    return report("metrics_cost", results, checks, card_of(results), keep=args.keep)


def run(
    models: Sequence[str] = ("demo", "moe-50m"), streams: Sequence[int] = (1, 16)
) -> tuple[dict[str, Any], list[Check]]:
    """Every model, with its experts in two hosts and in-process, at each number of streams."""
    costs = measure_costs()
    cases: dict[str, Any] = {}
    for model in load_models(list(models)):
        for where, make in (("2 hosts", remote_engine), ("local", local_engine)):
            with make(model) as decoder:
                for num_streams in streams:
                    case = f"{model.name}, {where}, {num_streams} streams"
                    cases[case] = measure(decoder, costs, num_streams)
    checks = [
        Check(f"{name}: metrics and logs", case["percent"], "% of a step", MOST_PERCENT, False)
        for name, case in cases.items()
    ]
    us = {name: round(1e6 * cost, 3) for name, cost in costs.items()}
    return {"us_per_call": us, "cases": cases}, checks


def card_of(results: dict[str, Any]) -> list[str]:
    costs = ", ".join(f"{name} {us:g}" for name, us in results["us_per_call"].items())
    rows = [
        [name, *(f"{case[key]:.3g}" for key in ("step_ms", "calls", "us", "percent"))]
        for name, case in results["cases"].items()
    ]
    columns = ["", "step ms", "calls a step", "µs a step", "% of it"]
    uncounted = "Not counted: the gateway's metrics as a call begins, the KV store's, and scrapes."
    return [f"µs a call: {costs}", uncounted, "", *table(columns, rows)]


class Decoder:
    """An engine, and what a decoder and its gateway tell of it."""

    def __init__(self, model: BenchModel, engine: EngineCore, update: Callable[[], None]) -> None:
        """`update` is what a decoder with hosts reports once a second."""
        self.model = model
        self.engine = engine
        self.update = update

    def answer(self, num_streams: int, folder: Path) -> tuple[int, float]:
        """Answer so many prompts at once: the number of steps, and their time in seconds."""
        registry = CollectorRegistry()
        metrics = Metrics(registry)
        gateway = Gateway(num_streams, RequestLog(metrics, folder))
        loop = StepLoop(
            engine=self.engine,
            meter=EngineMeter(metrics, "m"),
            fill_status=lambda status: self._fill(status),
        )
        prompts = random_prompts(self.model, num_streams, PROMPT_LEN, seed=time.monotonic_ns())
        sampling = Sampling(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        adds = [
            Add(request_id=f"r{i}", prompt_ids=TokenIds(ids=p).ids, sampling=sampling, tenant="ann")
            for i, p in enumerate(prompts)
        ]
        for add in adds:
            loop.on_message(0, ToDecoder(adds=[add]))
        loop.start(cast(GatewayLinks, gateway))
        assert gateway.is_done.wait(RUN_S), "the run takes too long"
        loop.close()
        name, labels = "briolette_step_duration_seconds", {"model": "m"}
        num_steps = registry.get_sample_value(f"{name}_count", labels)
        seconds = registry.get_sample_value(f"{name}_sum", labels)
        assert num_steps and seconds
        return round(num_steps), seconds

    def _fill(self, _: ClusterStatus) -> None:
        self.update()


class Gateway:
    """Stands for the link to a gateway: counts usage and logs what ended, as a gateway does."""

    def __init__(self, num_streams: int, log: RequestLog) -> None:
        self._left = num_streams
        self._usage = UsageService(UsageBooks(None))
        self._log = log
        self.is_done = threading.Event()

    def send(self, _: int, message: FromDecoder) -> None:
        for spent in message.spent:
            self._usage.count(spent)
            self._log.ended(_call(), "Chat", "OK")
            self._left -= 1
        if not self._left:
            self.is_done.set()

    def broadcast(self, _: FromDecoder) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def local_engine(model: BenchModel) -> Iterator[Decoder]:
    config = bench_config(model, {"experts.mode": "local"})
    source = ModelSource.open(config)
    engine = load_engine(config, source, load_local_experts(config, source))
    yield Decoder(model, engine, lambda: None)


@contextlib.contextmanager
def remote_engine(model: BenchModel) -> Iterator[Decoder]:
    """The experts in two hosts, each a process with a thread of its own."""
    spec, metrics = ModelSpec.load(model.model_dir), Metrics(CollectorRegistry())
    placement = ExpertPlacement.spread(ExpertGroups(spec.num_experts, 4), HOST_IDS)
    secret, meter = secrets.token_bytes(16), ExpertMeter(metrics, "m")
    with contextlib.ExitStack() as stack:
        endpoints = {
            host_id: stack.enter_context(_host(model, host_id, placement, secret))
            for host_id in HOST_IDS
        }
        fingerprint = Checkpoint(model.model_dir).fingerprint
        router = stack.enter_context(
            ExpertRouter(
                spec,
                placement,
                endpoints,
                secret=secret,
                weights_hash=fingerprint,
                timeout_s=10.0,
                observer=meter,
            )
        )
        router.wait_ready(START_S)
        config = bench_config(model, {})
        engine = load_engine(config, ModelSource.open(config), router)
        yield Decoder(model, engine, lambda: meter.update(placement, router.stats(), {}))


@contextlib.contextmanager
def _host(
    model: BenchModel, host_id: str, placement: ExpertPlacement, secret: bytes
) -> Iterator[Endpoint]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=serve_host,
        args=(ExpertHost, theirs, host_id, model.model_dir, placement, secret),
        kwargs={"num_threads": 1},
        daemon=True,
    )
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_S):
            raise TimeoutError("the expert host didn't start")
        yield Endpoint.from_dict(ours.recv())
    finally:
        ours.close()  # the host ends with it
        process.join(10.0)
        process.kill()


def measure(decoder: Decoder, costs: dict[str, float], num_streams: int) -> dict[str, float]:
    """One case."""
    with tempfile.TemporaryDirectory() as folder:
        answer = partial(decoder.answer, num_streams, Path(folder))
        answer()  # warms up
        with counting() as counts:
            num_counted_steps, _ = answer()
        num_steps, steps_s = answer()
    step_s = steps_s / num_steps
    calls_s = sum(costs[name] * count for name, count in counts.items()) / num_counted_steps
    return {
        "step_ms": round(1e3 * step_s, 3),
        "calls": round(counts.total() / num_counted_steps, 1),
        "us": round(1e6 * calls_s, 2),
        "percent": round(100 * calls_s / step_s, 3),
    }


def measure_costs() -> dict[str, float]:
    """Seconds for one call of each kind: the median of several loops."""
    metrics = Metrics(CollectorRegistry())
    usage = UsageService(UsageBooks(None))
    spent = Spent(tenant="ann")
    with tempfile.TemporaryDirectory() as folder:
        log = RequestLog(metrics, Path(folder))
        calls: dict[str, Callable[[], object]] = {
            "lookup": lambda: metrics.generated_tokens_total("m", "ann"),
            "inc": partial(metrics.generated_tokens_total("m", "ann").inc, 3),
            "set": partial(metrics.requests_running("m").set, 3),
            "observe": partial(metrics.inter_token_latency_seconds("m", "ann").observe, 0.012),
            "usage": lambda: usage.count(spent),
            "log": lambda: log.ended(_call(), "Chat", "OK"),
        }
        costs = {name: _cost(call) for name, call in calls.items()}
        log.close()
    return costs


def _cost(call: Callable[[], object], num_calls: int = 2000, num_loops: int = 9) -> float:
    loops = []
    for _ in range(num_loops):
        started = time.perf_counter()
        for _ in range(num_calls):
            call()
        loops.append((time.perf_counter() - started) / num_calls)
    return median(loops)


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts the calls of each kind in all threads, for the length of a `with` block."""
    counts: Counter[str] = Counter()
    before = {name: getattr(owner, method) for name, (owner, method) in COUNTED.items()}
    for name, (owner, method) in COUNTED.items():
        setattr(owner, method, _counted(counts, name, before[name]))
    try:
        yield counts
    finally:
        for name, (owner, method) in COUNTED.items():
            setattr(owner, method, before[name])


def _counted(counts: Counter[str], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        counts[name] += 1
        return call(*args)

    return counted


def _call() -> ClientCall:
    call = ClientCall(OpenLease())
    call.begin("m", PROMPT_LEN)
    return call


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.team.metrics_cost", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["demo", "moe-50m"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
