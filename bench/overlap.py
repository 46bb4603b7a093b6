"""What hides the network: the dense MLP, and two micro-batches. `python -m bench.overlap`.

One decoder here and one expert host in a process of its own (`bench/lib/injected_host.py`), each
with a thread and a core. The host answers at once; delayed, some time after the call came; or
paced, a fixed time for each row, one call at a time.

Each step goes to another way of computing it, in turn:
serial      ask the host, wait, then the dense MLP
overlap     ask the host, the dense MLP meanwhile, then wait: what the decoder does
ping-pong   the same with two micro-batches: one computes while the other waits

Let c be the decoder's work for a layer of half of the streams, all that isn't waiting included, and
f the dense MLP's share of it. Two halves keep the decoder busy for 2 c, and no order of work is
faster. The delay is c, and the pace makes a full answer take 2 c, as busy a host as the decoder.
Overlap alone then takes (3 - 2 f) c with the delay and (4 - 2 f) c with the pace, if halving the
rows halves the work: two micro-batches can gain less than 1.5x with the delay, for a constant delay
weighs half as much on a whole batch, and up to (2 - f)x with the pace, which the promise is about.
Both use a model with light experts, so that an answer takes the time that was injected; "at once"
is the 50 M model, and says what overlap and ping-pong bring on this machine.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.lib.card import Check, pin, report, table
from bench.lib.injected_host import injected_router
from bench.lib.models import BenchModel, load_models, random_prompts
from bench.lib.ours import bench_config
from cluster.config import Config
from deployments.loading import ModelSource, load_engine
from engine.request import SamplingParams
from engine.runner import ModelRunner
from experts.router import DispatchHandle, ExpertRouter

WAYS = ("serial", "overlap", "ping-pong")
NUM_WARM_UP = 2  # steps of each way


@dataclass(frozen=True, slots=True)
class Step:
    """A step in seconds, summed over its layers; or the medians of many."""

    total_s: float
    dense_s: float  # between dispatch and combine: the dense MLP
    waited_s: float  # inside combine

    @property
    def work_s(self) -> float:
        """The decoder's own work: what is left if nothing is waited for. A little too short, for
        it lacks what combine does with an answer.
        """
        return self.total_s - self.waited_s


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    args = _arguments(argv)
    pin(2)
    torch.set_num_threads(1)
    real, light = load_models(["moe-50m", "light-experts"])
    num_layers = ModelSource.open(bench_config(light, {})).spec.num_layers
    half_s = measure(light, args)["ping-pong"].work_s / (2 * num_layers)
    steps = {
        "at once": measure(real, args),
        "delayed": measure(light, args, delay_s=half_s),
        "paced": measure(light, args, s_per_row=2 * half_s / args.streams),
    }
    results = {
        "streams": args.streams,
        "half_layer_s": half_s,
        "steps": {host: _to_ms(ways) for host, ways in steps.items()},
        "hidden_share": hidden_share(steps["delayed"]),
        "gains": {host: gains(ways) for host, ways in steps.items()},
    }
    card = card_of(args.streams, half_s, steps)
    return report("overlap", results, checks_of(steps), card, num_threads=1, keep=args.keep)


def hidden_share(ways: dict[str, Step]) -> float:
    """The time that overlap saves, of the most that it could: the shorter of the dense MLP and the
    wait for the host.
    """
    shorter_s = min(ways["overlap"].dense_s, ways["serial"].waited_s)
    return (ways["serial"].total_s - ways["overlap"].total_s) / shorter_s


def gains(ways: dict[str, Step]) -> dict[str, float]:
    """How many times faster than the way before; and than ping-pong would be without any wait."""
    serial, overlap, ping_pong = (ways[way].total_s for way in WAYS)
    return {
        "overlap": serial / overlap,
        "ping-pong": overlap / ping_pong,
        "at best": overlap / ways["ping-pong"].work_s,
    }


def checks_of(steps: dict[str, dict[str, Step]]) -> list[Check]:
    configured = Config().experts.micro_batches  # what a user gets who configures nothing
    gain = gains(steps["at once"])["ping-pong"]
    return [
        Check("delayed: hidden by the dense MLP", hidden_share(steps["delayed"]), "of it", 0.8),
        Check("paced: two micro-batches", gains(steps["paced"])["ping-pong"], "x", 1.5),
        Check(
            f"at once: {configured} micro-batch(es), as configured, against the other",
            gain if configured == 2 else 1 / gain,
            "x",
            1.0,
        ),
    ]


def card_of(num_streams: int, half_s: float, steps: dict[str, dict[str, Step]]) -> list[str]:
    rows = []
    for host, ways in steps.items():
        cells = [f"{1e3 * ways[way].total_s:.1f}" for way in WAYS]
        rows.append([host, *cells, *(f"{gain:.2f}x" for gain in gains(ways).values())])
    title = f"ms per step of {num_streams} streams; c is {1e3 * half_s:.2f} ms"
    columns = ["host answers", *WAYS, "overlap gains", "ping-pong gains", "at best"]
    return [title, *table(columns, rows)]


def measure(
    model: BenchModel, args: argparse.Namespace, delay_s: float = 0.0, s_per_row: float = 0.0
) -> dict[str, Step]:
    """The median step of each way, taken in turn, with one host."""
    *_, our_core, host_core = sorted(os.sched_getaffinity(0))
    steps: dict[str, list[Step]] = {way: [] for way in WAYS}
    num_steps = (args.steps + NUM_WARM_UP) * len(WAYS)
    with injected_router(model, host_core, delay_s, s_per_row) as router:
        os.sched_setaffinity(0, {our_core})
        engine = load_engine(
            config := bench_config(model, {"engine.max_num_seqs": args.streams}),
            ModelSource.open(config),
            router,
        )
        assert isinstance(engine.runner, ModelRunner)
        sampling = SamplingParams(temperature=0.0, max_tokens=num_steps + 8, ignore_eos=True)
        for index, prompt in enumerate(random_prompts(model, args.streams, 16, seed=1)):
            engine.add(request_id=f"stream-{index}", prompt_ids=prompt, sampling=sampling)
        while engine.stats().num_decode_tokens == 0:
            engine.step()
        for index in range(num_steps):
            way = WAYS[index % len(WAYS)]
            experts = _Serial(router) if way == "serial" else _Timed(router)
            engine.runner.experts = experts
            engine.runner.num_micro_batches = 2 if way == "ping-pong" else 1
            waited_s, start = router.stats().waited_s, time.perf_counter()
            engine.step()
            total_s, waited_s = time.perf_counter() - start, router.stats().waited_s - waited_s
            if index >= NUM_WARM_UP * len(WAYS):
                steps[way].append(Step(total_s, experts.between_s, waited_s))
        assert router.stats().num_failures == 0, "a call was repeated: its time says nothing"
    os.sched_setaffinity(0, {our_core, host_core})
    return {way: _median(runs) for way, runs in steps.items()}


class _Timed:
    """The router, and the time that passes between dispatch and combine."""

    is_remote = True

    def __init__(self, router: ExpertRouter) -> None:
        self._router = router
        self.between_s = 0.0

    def dispatch(
        self, layer_idx: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> DispatchHandle:
        return self._router.dispatch(layer_idx, hidden_states, topk_ids, topk_weights)

    def combine(self, handle: DispatchHandle) -> Tensor:
        self.between_s += time.perf_counter() - handle.dispatched_at
        return self._router.combine(handle)

    def abandon(self, handle: DispatchHandle) -> None:
        self._router.abandon(handle)


class _Serial:
    """Waits at once: what would be without overlap."""

    is_remote = False
    between_s = 0.0

    def __init__(self, router: ExpertRouter) -> None:
        self._router = router

    def dispatch(
        self, layer_idx: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        handle = self._router.dispatch(layer_idx, hidden_states, topk_ids, topk_weights)
        return self._router.combine(handle)

    def combine(self, handle: Tensor) -> Tensor:
        return handle

    def abandon(self, handle: Tensor) -> None: ...


def _median(steps: list[Step]) -> Step:
    return Step(
        median(step.total_s for step in steps),
        median(step.dense_s for step in steps),
        median(step.waited_s for step in steps),
    )


def _to_ms(ways: dict[str, Step]) -> dict[str, dict[str, float]]:
    return {
        way: {
            "step_ms": round(1e3 * step.total_s, 3),
            "dense_ms": round(1e3 * step.dense_s, 3),
            "waited_ms": round(1e3 * step.waited_s, 3),
        }
        for way, step in ways.items()
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overlap", description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="of each way with each host")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
