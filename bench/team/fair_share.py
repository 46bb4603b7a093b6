"""What fair share buys: `python -m bench.team.fair_share`, the demo model in this process, on and
off.

Two tenants, one of which sends ten times as much: the light one's time to the first token beside
the heavy one, and, both overloaded, the difference in service over time beside VTC's bound. Then
eight tenants of unequal weights that always wait: Jain's index in every window of 10 s.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.lib.by_arrival import ByArrival
from bench.lib.card import Check, pin, report, table
from bench.team.served import Record
from cluster.config import Config
from cluster.errors import Overloaded
from deployments.loading import ModelSource, load_engine, load_local_experts
from engine.request import SamplingParams
from engine.scheduling.fair_share import FairShare
from engine.scheduling.policy import Policy, Work
from engine.scheduling.token_costs import TokenCosts

PROMPT, ANSWER = (8, 64), (4, 16)  # tokens, from and to
MAX_NUM_SEQS = 32
NUM_THREADS = 1  # so that little disturbs a step: the tail of its times is a promise
LIGHT_LOAD, OVERLOAD = 0.15, 1.5  # of what the engine can do; the heavy one sends ten times that
WEIGHTS = (1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 6.0, 8.0)
NUM_KEPT_WAITING = 4  # of each of the eight

Arrivals = Iterator[tuple[float, str, float]]  # when, tenant, weight


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=25.0, help="of each of six runs")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(2)
    torch.set_num_threads(NUM_THREADS)
    results, checks = run(args.seconds)
    return report(
        "fair_share", results, checks, card(results), num_threads=NUM_THREADS, keep=args.keep
    )


def run(seconds: float = 25.0) -> tuple[dict[str, Any], list[Check]]:
    """All measurements; about eight times `seconds` long."""
    bench = Bench()
    capacity = bench.capacity()
    two, eight = two_tenants(bench, capacity, seconds), eight_tenants(bench, seconds)
    results = {"requests_per_s": capacity, "two": two, "eight": eight}
    on = two["on"]
    late_steps = (on["light_ttft_ms"] - two["alone_ttft_ms"]) / on["step_ms"]
    checks = [
        Check("service gap, two tenants", on["gap"] / two["bound"], "of VTC's bound", 1.0, False),
        Check("Jain's index, eight weights, worst 10 s", eight["on"]["jain"], "", 0.95),
        Check("light tenant's p99 TTFT, above alone", late_steps, "p99 steps", 2.0, False),
    ]
    return results, checks


POLICIES: dict[str, Callable[[TokenCosts], Policy]] = {"on": FairShare, "off": ByArrival}


class Bench:
    """The demo model with local experts, and requests of random lengths for it."""

    def __init__(self) -> None:
        config = Config.load(
            None,
            {
                "device": "cpu",
                "dtype": "float32",
                "experts.mode": "local",
                "engine.max_num_seqs": MAX_NUM_SEQS,
                "engine.max_model_len": 512,
                "engine.kv_bytes": 256 << 20,
            },
        )
        source = ModelSource.open(config)
        self.costs = TokenCosts.from_spec(source.spec)
        self.engine = load_engine(config, source, load_local_experts(config, source))
        self._ids = itertools.count()

    def capacity(self) -> float:
        """Requests in a second when there are always enough, after a warm-up."""
        for num in (MAX_NUM_SEQS, 6 * MAX_NUM_SEQS):
            self._reset("on")
            rng, started = random.Random(num), time.perf_counter()
            for index in range(num):
                self._add(f"t{index % 8}", 1.0, rng)
            while self.engine.has_work:
                self.engine.step()
        return num / (time.perf_counter() - started)

    @property
    def bound(self) -> float:
        """VTC's: twice the longest prompt, or what all that run can decode, whichever is more."""
        longest = PROMPT[1] + ANSWER[1]
        prompt = self.costs.cost(Work.PREFILL, 0, PROMPT[1])
        return 2 * max(prompt, MAX_NUM_SEQS * self.costs.cost(Work.DECODE, 0, longest))

    def play(
        self, policy: str, arrivals: Arrivals, seconds: float, kept: dict[str, float] | None = None
    ) -> Record:
        """Requests come when they are due; of each tenant in `kept` (by weight) some always wait.

        Times count from when a request was due, also where a step kept it from being added.
        """
        self._reset(policy)
        record, rng = Record(), random.Random(1)
        due: dict[str, tuple[str, float, int]] = {}  # tenant, when, steps before
        num_preemptions = self.engine.stats().num_preemptions
        started = time.perf_counter()
        next_one = next(arrivals, None)
        while (now := time.perf_counter() - started) < seconds:
            while next_one is not None and next_one[0] <= now:
                due_s, tenant, weight = next_one
                try:
                    due[self._add(tenant, weight, rng)] = tenant, due_s, len(record.times)
                except Overloaded:
                    record.num_refused[tenant] += 1
                next_one = next(arrivals, None)
            for tenant, weight in (kept or {}).items():
                self._fill_queue(tenant, weight, rng)
            if not self.engine.has_work:
                time.sleep(0.0005)
                continue
            began = time.perf_counter()
            outputs = self.engine.step()
            now = time.perf_counter()
            record.times.append(now - started)
            record.step_s.append(now - began)
            for output in outputs:
                if output.new_token_ids and output.request_id in due:
                    tenant, due_s, num_before = due.pop(output.request_id)
                    num_steps = len(record.times) - num_before
                    record.first_token(tenant, now - started - due_s, num_steps)
            shares = self.engine.scheduler.shares
            record.service.append({tenant: share.service for tenant, share in shares.items()})
            record.waiting.append({request.tenant for request in self.engine.scheduler.waiting})
        record.num_preemptions = self.engine.stats().num_preemptions - num_preemptions
        return record

    def _fill_queue(self, tenant: str, weight: float, rng: random.Random) -> None:
        num_waiting = sum(r.tenant == tenant for r in self.engine.scheduler.waiting)
        for _ in range(NUM_KEPT_WAITING - num_waiting):
            self._add(tenant, weight, rng)

    def _add(self, tenant: str, weight: float, rng: random.Random) -> str:
        request_id = f"{tenant}-{next(self._ids)}"
        prompt = [rng.randrange(10, 400) for _ in range(rng.randint(*PROMPT))]
        sampling = SamplingParams(temperature=0.0, max_tokens=rng.randint(*ANSWER), ignore_eos=True)
        self.engine.add(
            request_id=request_id,
            prompt_ids=prompt,
            sampling=sampling,
            tenant=tenant,
            weight=weight,
        )
        return request_id

    def _reset(self, policy: str) -> None:
        """End what runs and count anew."""
        scheduler = self.engine.scheduler
        for request in (*scheduler.running, *scheduler.waiting):
            self.engine.abort(request.request_id)
        self.engine.step()
        scheduler.policy = POLICIES[policy](self.costs)


def two_tenants(bench: Bench, capacity: float, seconds: float) -> dict[str, Any]:
    """One sends ten times as much as the other."""
    light = capacity * LIGHT_LOAD
    alone = bench.play("on", poisson({"light": light}), seconds)
    results: dict[str, Any] = {
        "bound": bench.bound,
        "alone_ttft_ms": alone.p99_ttft_ms("light"),
        "num_alone": len(alone.ttft_s["light"]),
    }
    for policy in POLICIES:
        beside = bench.play(policy, poisson({"light": light, "heavy": 10 * light}), seconds)
        over = capacity * OVERLOAD
        both = bench.play(policy, poisson({"light": over, "heavy": 10 * over}), seconds)
        results[policy] = {
            "light_ttft_ms": beside.p99_ttft_ms("light"),
            "light_ttft_steps": beside.p99_ttft_steps("light"),
            "step_ms": beside.p99_step_ms,
            "num_light": len(beside.ttft_s["light"]),
            "light_refused": beside.num_refused["light"],
            "heavy_refused": beside.num_refused["heavy"],
            "num_preemptions": beside.num_preemptions,
            "service_per_s": beside.service_per_s,
            "gap": both.gap("light", "heavy"),
            "overloaded_service": both.service[-1],
        }
        _note(f"two tenants, fair share {policy}: {results[policy]}")
    return results


def eight_tenants(bench: Bench, seconds: float) -> dict[str, Any]:
    """Eight of unequal weights, of each of whom some always wait."""
    weights = {f"tenant {index}": weight for index, weight in enumerate(WEIGHTS, 1)}
    results: dict[str, Any] = {"weights": list(WEIGHTS)}
    for policy, length_s in (("on", 1.5 * seconds), ("off", seconds)):
        record = bench.play(policy, iter(()), length_s, weights)
        served = record.service[-1]
        results[policy] = {
            "jain": record.jain(weights),
            "seconds": length_s,
            "shares": [served[tenant] / sum(served.values()) for tenant in weights],
            "service_per_s": record.service_per_s,
            "num_preemptions": record.num_preemptions,
        }
        _note(f"eight tenants, fair share {policy}: {results[policy]}")
    return results


def poisson(rates: dict[str, float]) -> Arrivals:
    """Random arrivals for ever; those of a tenant are the same whoever comes beside."""
    rngs = {tenant: random.Random(tenant) for tenant in rates}
    due = {tenant: rngs[tenant].expovariate(rate) for tenant, rate in rates.items()}
    while True:
        tenant = min(due, key=lambda name: due[name])
        yield due[tenant], tenant, 1.0
        due[tenant] += rngs[tenant].expovariate(rates[tenant])


def card(results: dict[str, Any]) -> list[str]:
    """Both runs for people."""
    two, eight = results["two"], results["eight"]
    on, off = two["on"], two["off"]
    rows = [
        ["light tenant's p99 TTFT, alone", f"{two['alone_ttft_ms']:.0f} ms", ""],
        [
            "beside ten times its load",
            f"{on['light_ttft_ms']:.0f} ms",
            f"{off['light_ttft_ms']:.0f} ms",
        ],
        ["in steps", f"{on['light_ttft_steps']:.0f}", f"{off['light_ttft_steps']:.0f}"],
        ["p99 step", f"{on['step_ms']:.0f} ms", f"{off['step_ms']:.0f} ms"],
        ["light requests refused", f"{on['light_refused']}", f"{off['light_refused']}"],
        [
            f"service gap, both overloaded (bound {two['bound']:,.0f})",
            f"{on['gap']:,.0f}",
            f"{off['gap']:,.0f}",
        ],
        ["service in a second", f"{on['service_per_s']:,.0f}", f"{off['service_per_s']:,.0f}"],
    ]
    total = sum(WEIGHTS)
    shares = [
        [f"weight {weight:g}", f"{weight / total:.1%}", f"{is_on:.1%}", f"{is_off:.1%}"]
        for weight, is_on, is_off in zip(
            WEIGHTS, eight["on"]["shares"], eight["off"]["shares"], strict=True
        )
    ]
    jain = [
        "Jain's index, worst 10 s",
        "1",
        f"{eight['on']['jain']:.3f}",
        f"{eight['off']['jain']:.3f}",
    ]
    return [
        *table(["two tenants, one with ten times the load", "fair share", "off"], rows),
        *table(
            ["eight tenants, share of all service", "ideal", "fair share", "off"], [*shares, jain]
        ),
    ]


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
