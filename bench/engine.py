"""Decode speed and throughput beside the peers, in one run: `python -m bench.engine`.

Two phases for each model. First everything but the cluster, each system in a process of its own:
they take turns, in an order that is reversed each time, so that a machine that slows down slows
them all. Then the whole cluster and the in-process engine take turns in the same way.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

from bench.lib.card import Check, pin, report, table
from bench.lib.isolated import Isolated
from bench.lib.models import BenchModel, load_models, random_prompts
from bench.lib.peers import NotMeasured
from bench.lib.timing import System, Timing

PROMPT_LEN = 128
NUM_TOKENS = 64

IN_PROCESS, INVARIANT = "in-process", "in-process, invariant"
CLUSTER, LLAMA_CPP = "whole cluster", "llama.cpp"
STATIC_BATCH, ONE_AT_A_TIME = "transformers, static batch", "transformers, one at a time"
BESIDE_CLUSTER = "in-process beside the cluster"
# One at a time, n requests take n times as long as one: it is enough to show that once.
ONLY_AT = {ONE_AT_A_TIME: 16}
EXPLANATIONS = {
    STATIC_BATCH: "all prompts, equally long, in one call of generate",
    ONE_AT_A_TIME: "a call of generate for each prompt, one after the other",
}

# timings[system][number of streams]: one Timing for each repetition
Timings = dict[str, dict[int, list[Timing]]]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    args = _arguments(argv)
    pin(args.threads)
    results: dict[str, Any] = {}
    checks: list[Check] = []
    card: list[str] = []
    for model in load_models(args.models):
        deadline = time.monotonic() + args.minutes * 60 / len(args.models)
        timings, failures = measure(
            model, args.systems, args.streams, args.repeats, deadline, args.threads
        )
        results[model.name] = {"speeds": to_results(timings), "not_measured": failures}
        checks += checks_of(model.name, timings)
        card += card_of(model.name, timings, failures)
    return report("engine", results, checks, card, num_threads=args.threads, keep=args.keep)


def measure(
    model: BenchModel,
    system_names: Sequence[str],
    streams: Sequence[int],
    repeats: int,
    deadline: float,
    num_threads: int = 2,
) -> tuple[Timings, dict[str, str]]:
    """Both phases. Also returns why systems that are missing could not be measured."""
    failures: dict[str, str] = {}
    makers = _makers(model, num_threads)
    alone = [name for name in system_names if name != CLUSTER]
    timings = _phase({n: makers[n] for n in alone}, model, streams, repeats, deadline, failures)
    if CLUSTER in system_names:
        pair = {CLUSTER: makers[CLUSTER], BESIDE_CLUSTER: makers[IN_PROCESS]}
        timings |= _phase(pair, model, streams, repeats, deadline, failures)
    return timings, failures


def checks_of(model_name: str, timings: Timings) -> list[Check]:
    """The promised ratios. At one stream decode speed counts, else the whole run's."""
    promises = [
        (IN_PROCESS, STATIC_BATCH, 1, 2.5),
        (IN_PROCESS, STATIC_BATCH, 16, 6.0),
        (IN_PROCESS, ONE_AT_A_TIME, 16, 6.0),
        (IN_PROCESS, LLAMA_CPP, 8, 1.0),
        (IN_PROCESS, LLAMA_CPP, 16, 1.0),
        (CLUSTER, BESIDE_CLUSTER, 16, 0.6),
    ]
    return [
        Check(
            f"{model_name}: {ours} / {other} at {num_streams}",
            ratio(timings, ours, other, num_streams),
            "x",
            target,
        )
        for ours, other, num_streams, target in promises
    ]


def ratio(timings: Timings, ours: str, other: str, num_streams: int) -> float | None:
    """Median over the repetitions of the two speeds' quotient; None where one is missing."""
    pairs = zip(
        timings.get(ours, {}).get(num_streams, []),
        timings.get(other, {}).get(num_streams, []),
        strict=False,
    )
    quotients = [_speed(a, num_streams) / _speed(b, num_streams) for a, b in pairs]
    return median(quotients) if quotients else None


def to_results(timings: Timings) -> dict[str, Any]:
    return {
        system: {
            str(num_streams): {
                "decode_tok_s": round(median(t.decode_tok_s for t in repeats), 1),
                "output_tok_s": round(median(t.output_tok_s for t in repeats), 1),
                "ttft_s": round(median(t.ttft_s for t in repeats), 4),
                "repeats": len(repeats),
            }
            for num_streams, repeats in by_streams.items()
        }
        for system, by_streams in timings.items()
    }


def card_of(model_name: str, timings: Timings, failures: dict[str, str]) -> list[str]:
    """One row a system: decode and whole-run tokens/s for each number of streams."""
    streams = sorted({n for by_streams in timings.values() for n in by_streams})
    rows = []
    for system, by_streams in timings.items():
        cells = []
        for num_streams in streams:
            repeats = by_streams.get(num_streams)
            if not repeats:
                cells.append("-")
                continue
            decode = median(t.decode_tok_s for t in repeats)
            cells.append(f"{decode:.0f} / {median(t.output_tok_s for t in repeats):.0f}")
        rows.append([system, *cells])
    title = f"{model_name}: tokens/s while decoding / of the whole run, {PROMPT_LEN}+{NUM_TOKENS}"
    header = ["streams", *map(str, streams)]
    notes = [f"{system}: {text}" for system, text in EXPLANATIONS.items() if system in timings]
    notes += [f"{system}: not measured. {reason}" for system, reason in failures.items()]
    return [title, *table(header, rows), *notes, ""]


def _phase(
    makers: dict[str, Callable[[], System]],
    model: BenchModel,
    streams: Sequence[int],
    repeats: int,
    deadline: float,
    failures: dict[str, str],
) -> Timings:
    systems: dict[str, System] = {}
    timings: Timings = {name: {} for name in makers}
    try:
        for name, make in makers.items():
            try:
                systems[name] = make()
            except NotMeasured as reason:
                failures[name] = str(reason)
        for num_streams in streams:
            _measure_streams(systems, timings, model, num_streams, repeats, deadline, failures)
    finally:
        for system in systems.values():
            system.close()
        gc.collect()
    return timings


def _measure_streams(
    systems: dict[str, System],
    timings: Timings,
    model: BenchModel,
    num_streams: int,
    repeats: int,
    deadline: float,
    failures: dict[str, str],
) -> None:
    """A warm-up, then the systems in turn; the order is reversed each time."""
    names = []
    for name in [name for name in systems if ONLY_AT.get(name, num_streams) == num_streams]:
        try:
            systems[name].generate(random_prompts(model, num_streams, PROMPT_LEN, seed=0), 4)
            names.append(name)
        except NotMeasured as reason:
            failures[name] = str(reason)
            systems.pop(name).close()
    for repeat in range(repeats):
        if repeat and time.monotonic() > deadline:
            break  # what was measured so far stands, with its number of repetitions
        prompts = random_prompts(model, num_streams, PROMPT_LEN, seed=100 * num_streams + repeat)
        for name in names if repeat % 2 == 0 else names[::-1]:
            gc.collect()
            timing = systems[name].generate(prompts, NUM_TOKENS)
            timings[name].setdefault(num_streams, []).append(timing)
            _note(f"{model.name}, {num_streams} streams, {name}: {timing.output_tok_s:.0f} tok/s")


def _makers(model: BenchModel, num_threads: int) -> dict[str, Callable[[], System]]:
    from bench.lib.ours import Cluster, InProcess
    from bench.lib.peers import LlamaCpp, OneAtATime, Transformers

    systems: dict[str, Callable[[], System]] = {
        IN_PROCESS: partial(InProcess, model, num_threads),
        INVARIANT: partial(InProcess, model, num_threads, batch_invariant=True),
        STATIC_BATCH: partial(Transformers, model, num_threads),
        ONE_AT_A_TIME: partial(OneAtATime, model, num_threads),
        LLAMA_CPP: partial(LlamaCpp, model, num_threads),
    }
    isolated = {name: partial(Isolated, name, make) for name, make in systems.items()}
    return {**isolated, CLUSTER: partial(Cluster, model)}


def _speed(timing: Timing, num_streams: int) -> float:
    return timing.decode_tok_s if num_streams == 1 else timing.output_tok_s


def _note(text: str) -> None:
    """Progress goes to stderr: stdout ends with the JSON line."""
    print(text, file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    systems = [IN_PROCESS, INVARIANT, STATIC_BATCH, ONE_AT_A_TIME, LLAMA_CPP, CLUSTER]
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["moe-50m", "demo"])
    parser.add_argument("--systems", nargs="+", default=systems, choices=systems)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="and cores to stay on")
    parser.add_argument("--minutes", type=float, default=12.0, help="then no more repetitions")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
