"""What writing behind costs the steps: runs of one engine that saves its blocks or not, in turn.

`python -m bench.memory.write_behind` keeps the decoder on one core, and the store's threads and
Redis (our own server, with its file) on the other. Each run computes prompts that nobody has seen
and decodes; the writer sends what becomes full meanwhile. It is one engine since two in one process
differ by more than what is measured, with nothing written by either: their memory lies elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from bench.lib.card import Check, pin, report, table
from bench.lib.drive import drive
from bench.lib.models import BenchModel, load_models, random_prompts
from bench.memory.stored import Stored, stored_engine
from cluster.store.redis_server import RedisServer
from engine.cache.block_store import StoredBlock
from engine.core import EngineCore
from engine.request import Request

MODEL = "moe-50m"
NUM_STREAMS, PROMPT_LEN, NUM_TOKENS = 8, 128, 192
NUM_ROUNDS = 7
STORE_BYTES = 2 << 30
WITHOUT, WITH = "without writing", "with writing"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help="decoded by each stream")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(2)
    [model] = load_models([MODEL])
    with tempfile.TemporaryDirectory(prefix="briolette-") as directory:
        results = measure(model, Path(directory), args.rounds, args.tokens)
    return report(
        "write_behind", results, checks(results), card(results), num_threads=1, keep=args.keep
    )


def measure(model: BenchModel, data_dir: Path, num_rounds: int, num_tokens: int) -> dict[str, Any]:
    """Milliseconds of a step in each run of each kind, and the bytes that were written."""
    step_ms: dict[str, list[float]] = {WITHOUT: [], WITH: []}
    num_bytes = []
    with contextlib.ExitStack() as stack:
        first, *others = sorted(os.sched_getaffinity(0))
        with on_cores(others or [first]):  # threads and processes stay where they were started
            server = stack.enter_context(RedisServer(data_dir, STORE_BYTES))
            stored = stack.enter_context(stored_engine(model, 1, server.address))
        stack.enter_context(on_cores([first]))
        for number in range(-1, num_rounds):  # the first is to get warm
            for name in (WITHOUT, WITH)[:: 1 if number % 2 else -1]:
                seed = 2 * number + (name == WITH) + 10
                prompts = random_prompts(model, NUM_STREAMS, PROMPT_LEN, seed)
                before = stored.bytes_moved("written")
                with saving(stored, name == WITH):
                    milliseconds = run(stored.engine, prompts, num_tokens)
                stored.flush()
                if number >= 0:
                    step_ms[name].append(milliseconds)
                if number >= 0 and name == WITH:
                    num_bytes.append(stored.bytes_moved("written") - before)
    return {"step_ms": step_ms, "bytes_per_run": num_bytes}


@contextlib.contextmanager
def saving(stored: Stored, is_on: bool) -> Iterator[None]:
    """Whether the store is given what the engine computes."""
    with contextlib.nullcontext() if is_on else patch.object(stored.blocks, "save", ignore):
        yield


def ignore(request: Request, blocks: Sequence[StoredBlock]) -> None:
    """Stand in for `BlockStore.save`; saves nothing."""


def run(engine: EngineCore, prompts: list[list[int]], num_tokens: int) -> float:
    """Milliseconds of the mean step, prefill's and decode's alike."""
    num_steps, start = engine.stats().num_steps, time.perf_counter()
    drive(engine, prompts, num_tokens)
    return (time.perf_counter() - start) * 1e3 / (engine.stats().num_steps - num_steps)


@contextlib.contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Keep this thread, and what it starts meanwhile, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def growth(results: dict[str, Any]) -> float:
    """Per cent, the median over the pairs of runs."""
    pairs = zip(results["step_ms"][WITH], results["step_ms"][WITHOUT], strict=True)
    quotient: float = median(with_ / without for with_, without in pairs)
    return (quotient - 1) * 100


def checks(results: dict[str, Any]) -> list[Check]:
    """What the design promises of writing behind."""
    return [Check("step time under write-behind grows", growth(results), "%", 3, at_least=False)]


def card(results: dict[str, Any]) -> list[str]:
    rows = [
        [name, f"{median(times):.2f}", f"{min(times):.2f}", f"{max(times):.2f}"]
        for name, times in results["step_ms"].items()
    ]
    size = f"{median(results['bytes_per_run']) / 1e6:.1f} MB written in a run"
    runs = f"{NUM_STREAMS} streams of {PROMPT_LEN} tokens and what they decode, {MODEL}, one thread"
    return [
        f"A step in ms, over runs in turn: {runs}",
        *table(["", "median", "least", "most"], rows),
        f"{size}; growth {growth(results):.1f} %",
        "",
    ]


if __name__ == "__main__":
    main()
