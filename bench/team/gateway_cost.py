"""What the gateway costs: `python -m bench.team.gateway_cost`, about three minutes.

Of the demo model, all sides in turn in one run:
- what it adds to a token's latency: over gRPC and over OpenAI's HTTP as a client sees it, less the
  same engine's in this process; between the tokens of a stream, where the gateway works while the
  engine takes its next step, and of a request of one token, where nothing hides it;
- requests of one token in a second, over both, beside Ray Serve's own HTTP ingress (the proxy that
  Briolette does without) before an application that returns a constant and computes nothing;
- what others notice of 10,000 connections that say nothing: a request of one token beside them and
  without them, in turn. In the middle it may take a tenth longer.
Whoever asks runs on the same cores as what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from bench.lib.card import Check, pin, report, table
from bench.lib.models import random_prompts
from bench.lib.ours import Cluster, InProcess
from bench.team.gateway_sides import (
    MODEL,
    NUM_CLIENTS,
    PROMPT_TOKENS,
    Engine,
    Ingress,
    Load,
    OverGrpc,
    OverHttp,
    Side,
)
from bench.team.serve_ingress import serve_ingress
from bench.team.silent import num_open, silent_connections
from deployments.process.open_files import GRPC_PART, HTTP_PART, raise_limit

NUM_TOKENS = 200  # of a stream
NUM_SINGLES = 100  # requests of one token, one after another
NUM_BESIDE = 100  # of the same beside silent connections, which stay for ten seconds
NUM_SILENT = 10_000  # connections that say nothing, to each port
PARTS = {"gRPC": GRPC_PART, "HTTP": HTTP_PART}  # of the files that the gateway may open
KINDS = {
    "gap": "between tokens",
    "single": "request of one token",
    "alone": "the same, before and after what follows",
    "silent": "the same beside silent connections",
}
GONE_S = 2.0  # until the gateway has closed so many
MOST_BESIDE = 1.1  # of what it takes without them
ROUNDS = 3  # of everything, in turn: what else the machine does hits all alike


class Beside(NamedTuple):
    """Seconds of requests, beside silent connections and without them."""

    num_held: int
    silent: list[float]
    alone: list[float]

    @property
    def ratio(self) -> float:
        return median(self.silent) / median(self.alone)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    args = _arguments(argv)
    pin(2)
    results, checks = run(args.seconds)
    return report("gateway_cost", results, checks, _card(results), num_threads=1, keep=args.keep)


def run(seconds: float) -> tuple[dict[str, Any], list[Check]]:
    """`seconds` for each load of one-token requests."""
    times: dict[str, dict[str, list[float]]] = {"gap": {}, "single": {}}
    rates: dict[str, list[float]] = {}
    overrides = {"experts.mode": "local", "engine.threads": 1, "gateway.http_port": 0}
    engine, cluster = InProcess(MODEL, num_threads=1), Cluster(MODEL, overrides)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as folder,  # Ray's paths are long
            serve_ingress(Path(folder)) as ingress_port,
            asyncio.Runner() as runner,
        ):
            over_grpc = OverGrpc(str(cluster.running.address))
            over_http = OverHttp(str(cluster.running.base_url), runner)
            sides: dict[str, Side] = {
                "engine": Engine(engine),
                "gRPC": over_grpc,
                "HTTP": over_http,
            }
            loads: dict[str, Load] = {
                "gRPC": over_grpc,
                "HTTP": over_http,
                "Serve's ingress": Ingress(ingress_port),
            }
            for turn in range(ROUNDS):
                for name, side in sides.items():
                    _measure_latency(name, side, times, turn)
                for name, load in loads.items():
                    rates.setdefault(name, []).append(runner.run(load.requests_per_s(seconds)))
            beside = {
                name: [_beside_silent(side) for _ in range(ROUNDS)]
                for name, side in (("gRPC", over_grpc), ("HTTP", over_http))
            }
    finally:
        cluster.close()
        engine.close()
    return latency_results(times, rates) | silent_results(beside), make_checks(rates, beside)


def _beside_silent(side: OverGrpc | OverHttp) -> Beside:
    """One-token requests while silent connections are held to the same port, and without them."""
    (prompt,) = random_prompts(MODEL, 1, PROMPT_TOKENS, seed=0)

    def ask(num: int) -> list[float]:
        return [side.stream(prompt, 1)[0] for _ in range(num)]

    alone = ask(NUM_BESIDE // 2)
    with silent_connections(*side.address, NUM_SILENT) as held:
        silent = ask(NUM_BESIDE)
        num_held = num_open(held)
    time.sleep(GONE_S)
    return Beside(num_held, silent, alone + ask(NUM_BESIDE // 2))


def _measure_latency(
    name: str, side: Side, times: dict[str, dict[str, list[float]]], turn: int
) -> None:
    (prompt,) = random_prompts(MODEL, 1, PROMPT_TOKENS, seed=turn)
    side.stream(prompt, 2)  # from here on its prefix is cached, on every side
    gaps = times["gap"].setdefault(name, [])
    gaps += [after - before for before, after in pairwise(side.stream(prompt, NUM_TOKENS))]
    times["single"].setdefault(name, []).extend(
        side.stream(prompt, 1)[0] for _ in range(NUM_SINGLES)
    )


def latency_results(
    times: dict[str, dict[str, list[float]]], rates: dict[str, list[float]]
) -> dict[str, Any]:
    """Return the percentiles by side, what a dialect adds to the engine's, and requests/s."""
    shown: dict[str, Any] = {
        kind: {name: _percentiles(values) for name, values in by_side.items()}
        for kind, by_side in times.items()
    }
    for by_side in (shown["gap"], shown["single"]):
        for name in ("gRPC", "HTTP"):
            for key in ("p50_us", "p99_us"):
                by_side[name][f"added_{key}"] = by_side[name][key] - by_side["engine"][key]
    shown["requests_per_s"] = {name: round(median(values), 1) for name, values in rates.items()}
    return shown


def silent_results(beside: dict[str, list[Beside]]) -> dict[str, Any]:
    """Return the latencies with and without silent connections, by dialect."""
    shown: dict[str, Any] = {"alone": {}, "silent": {}}
    for name, rounds in beside.items():
        shown["alone"][name] = _percentiles([s for one in rounds for s in one.alone])
        silent = _percentiles([s for one in rounds for s in one.silent])
        shown["silent"][name] = {"held": min(one.num_held for one in rounds), **silent}
    return shown


def _percentiles(seconds: list[float]) -> dict[str, int]:
    return {
        "p50_us": round(median(seconds) * 1e6),
        "p99_us": round(quantiles(seconds, n=100)[98] * 1e6),
    }


def make_checks(rates: dict[str, list[float]], beside: dict[str, list[Beside]]) -> list[Check]:
    """Check each round by itself, for the machine's load changes between them."""
    may_be_open = raise_limit()
    ingress = rates["Serve's ingress"]
    return [
        Check(
            f"requests/s over {name} by those of Serve's ingress",
            median(ours / theirs for ours, theirs in zip(rates[name], ingress, strict=True)),
            "x",
            1.0,
        )
        for name in ("gRPC", "HTTP")
    ] + [
        check
        for name, rounds in beside.items()
        for check in (
            Check(
                f"silent connections held over {name}",
                min(one.num_held for one in rounds),
                "",
                min(NUM_SILENT, int(may_be_open * PARTS[name]) - 1),  # beside the one that asks
            ),
            Check(
                f"a request beside {NUM_SILENT:,} over {name} by one without them, p50",
                median(one.ratio for one in rounds),
                "x",
                MOST_BESIDE,
                at_least=False,
            ),
        )
    ]


def _card(results: dict[str, Any]) -> list[str]:
    rows = []
    for kind, title in KINDS.items():
        for name, numbers in results[kind].items():
            added = [numbers.get(f"added_{key}") for key in ("p50_us", "p99_us")]
            cells = [numbers["p50_us"], numbers["p99_us"], *added]
            rows.append([f"{title}, {name}", *("" if c is None else str(c) for c in cells)])
    header = ["µs", "p50", "p99", "added p50", "added p99"]
    per_s = [[name, f"{rate:.0f}"] for name, rate in results["requests_per_s"].items()]
    clients = f"{NUM_CLIENTS} clients, one token each"
    return [*table(header, rows), "", *table([clients, "requests/s"], per_s)]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.team.gateway_cost", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load; default 5")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
