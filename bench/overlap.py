"""What hides the network: the dense MLP, and two micro-batches. `python -m bench.overlap`.

One expert host in a process of its own, one decoder here, a thread each. The host answers
at once;
delayed, some time after the call came: a far network, where calls don't wait for each other; or
paced, a fixed time for each row, one call at a time: a slow card or a thin wire.

Each step goes to another way of computing it, in turn:
serial      ask the host, wait, then the dense MLP
overlap     ask the host, the dense MLP meanwhile, then wait: what the decoder does
ping-pong   the same with two micro-batches: one computes while the other waits

Let c be the decoder's own work of a layer for half of the streams. The delay is c, and the pace
makes a full answer take 2 c: there the decoder and the host are equally busy, and most is to gain.
With a delay that is at most 1.5x (3 c against 2 c), for halving the rows doesn't halve it; with a
pace 2x (4 c against 2 c), so that is the case that the promise is about. Both use a model with
light experts, so that an answer takes the time that was injected; "at once" is the 50 M model, and
says what overlap and ping-pong bring on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.card import Check, pin, report, table
from bench.models import BenchModel, load_models, random_prompts
from bench.ours import bench_config
from cluster.checkpoint import Checkpoint
from cluster.config import Config
from cluster.links import Endpoint
from cluster.placement import ExpertGroups, ExpertPlacement
from cluster.spec import ModelSpec
from deployments.loading import Source, load_engine
from engine.core import EngineCore
from engine.model import Experts
from engine.request import SamplingParams
from engine.runner import ModelRunner
from experts.host import ExpertHost
from experts.router import ExpertRouter

HOST_ID = "host0"
WAYS = ("serial", "overlap", "ping-pong")
START_S = 60.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step, in seconds."""

    total_s: float
    dense_s: float  # between dispatch and combine, over all layers: the dense MLP
    waited_s: float  # inside combine


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    args = _arguments(argv)
    pin(2)
    torch.set_num_threads(1)
    real, model = load_models(["moe-50m", "light-experts"])
    half_s = own_layer_s(model, args.streams // 2, args.steps)
    steps = {
        "at once": measure(real, args, _Host(real)),
        "delayed": measure(model, args, _Host(model, delay_s=half_s)),
        "paced": measure(model, args, _Host(model, s_per_row=2 * half_s / args.streams)),
    }
    medians = {
        host: {way: _median(runs) for way, runs in ways.items()} for host, ways in steps.items()
    }
    results = {"streams": args.streams, "half_layer_s": half_s, "steps": _to_results(medians)}
    results["hidden_share"] = hidden_share(medians["delayed"])
    results["gains"] = {host: gains(ways) for host, ways in medians.items()}
    card = card_of(args.streams, half_s, medians)
    return report("overlap", results, checks_of(medians), card, num_threads=1, keep=args.keep)


def hidden_share(ways: dict[str, Step]) -> float:
    """The time that overlap saves, of the most that it could: the shorter of the dense MLP and the
    wait for the host.
    """
    shorter_s = min(ways["overlap"].dense_s, ways["serial"].waited_s)
    return (ways["serial"].total_s - ways["overlap"].total_s) / shorter_s


def gains(ways: dict[str, Step]) -> dict[str, float]:
    """How many times faster than the way before."""
    serial, overlap, ping_pong = (ways[way].total_s for way in WAYS)
    return {"overlap": serial / overlap, "ping-pong": overlap / ping_pong}


def checks_of(medians: dict[str, dict[str, Step]]) -> list[Check]:
    configured = Config().experts.micro_batches  # what a user gets who configures nothing
    gain = gains(medians["at once"])["ping-pong"]
    return [
        Check("delayed: hidden by the dense MLP", hidden_share(medians["delayed"]), "of it", 0.8),
        Check("paced: two micro-batches", gains(medians["paced"])["ping-pong"], "x", 1.5),
        Check(
            f"at once: {configured} micro-batch(es), as configured, against the other",
            gain if configured == 2 else 1 / gain,
            "x",
            1.0,
        ),
    ]


def card_of(num_streams: int, half_s: float, medians: dict[str, dict[str, Step]]) -> list[str]:
    rows = []
    for host, ways in medians.items():
        gain = gains(ways)
        cells = [f"{1e3 * ways[way].total_s:.1f}" for way in WAYS]
        rows.append([host, *cells, f"{gain['overlap']:.2f}x", f"{gain['ping-pong']:.2f}x"])
    title = f"ms per step of {num_streams} streams; c is {1e3 * half_s:.2f} ms"
    return [title, *table(["host answers", *WAYS, "overlap gains", "ping-pong gains"], rows)]


def own_layer_s(model: BenchModel, num_streams: int, num_steps: int) -> float:
    """The decoder's own work of a layer: a step without experts, by the number of layers."""
    engine, runner = _engine(model, _NoExperts(), num_streams)
    num_layers = runner.model.spec.num_layers
    times = [_timed(engine.step) for _ in _decode(engine, model, num_streams, num_steps)]
    return median(times) / num_layers


def measure(model: BenchModel, args: argparse.Namespace, host: _Host) -> dict[str, list[Step]]:
    """Steps of each way, in turn, with one host."""
    steps: dict[str, list[Step]] = {way: [] for way in WAYS}
    with host.router() as router:
        engine, runner = _engine(model, router, args.streams)
        num_steps = (args.steps + 2) * len(WAYS)
        for index in _decode(engine, model, args.streams, num_steps):
            way = WAYS[index % len(WAYS)]
            runner.experts = _Serial(router) if way == "serial" else router
            runner.num_micro_batches = 2 if way == "ping-pong" else 1
            stats = router.stats()
            hidden_s, waited_s = stats.hidden_s, stats.waited_s
            total_s = _timed(engine.step)
            step = Step(total_s, stats.hidden_s - hidden_s, stats.waited_s - waited_s)
            if index >= 2 * len(WAYS):  # the first ones are warm-up
                steps[way].append(step)
        assert stats.num_failures == 0, "a call was repeated: its time says nothing"
    return steps


class _Host:
    """An expert host in a process of its own that holds every group."""

    def __init__(self, model: BenchModel, delay_s: float = 0.0, s_per_row: float = 0.0) -> None:
        self._model_dir = model.model_dir
        self._spec = ModelSpec.load(model.model_dir)
        groups = ExpertGroups(self._spec.num_experts, 4)
        self._placement = ExpertPlacement.spread(groups, [HOST_ID])
        self._pace = (delay_s, s_per_row)

    @contextlib.contextmanager
    def router(self) -> Iterator[ExpertRouter]:
        """Run the host for as long as the block, behind a router."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        secret = secrets.token_bytes(16)
        arguments = (theirs, self._model_dir, self._placement, secret, *self._pace)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        try:
            if not ours.poll(START_S):
                raise TimeoutError("the expert host didn't start")
            endpoint = Endpoint.from_dict(ours.recv())
            fingerprint = Checkpoint(self._model_dir).fingerprint
            with ExpertRouter(
                self._spec, self._placement, {HOST_ID: endpoint}, secret, fingerprint, deadline_s=10
            ) as router:
                router.wait_ready(START_S)
                yield router
        finally:
            ours.close()  # the host ends with it
            process.join(10.0)
            if process.is_alive():
                process.kill()


class _PacedHost(ExpertHost):
    """Answers a call not before `s_per_row` for each of its rows has passed; one at a time."""

    s_per_row = 0.0
    row_bytes = 1

    def answer(self, frame: memoryview) -> list[memoryview]:
        due = time.monotonic() + self.s_per_row * (len(frame) // self.row_bytes)
        parts = super().answer(frame)
        time.sleep(max(0.0, due - time.monotonic()))
        return parts


def _serve(
    control: Connection,
    model_dir: Path,
    placement: ExpertPlacement,
    secret: bytes,
    delay_s: float,
    s_per_row: float,
) -> None:
    spec = ModelSpec.load(model_dir)
    host = _PacedHost(
        HOST_ID,
        spec,
        Checkpoint(model_dir),
        placement,
        torch.float32,
        "cpu",
        secret,
        num_threads=1,
        answer_delay_s=delay_s,
    )
    host.s_per_row = s_per_row
    host.row_bytes = 4 * spec.hidden_size
    with host:
        control.send(host.endpoint.to_dict())
        with contextlib.suppress(EOFError):
            control.recv()


class _Serial:
    """Waits at once: what would be without overlap."""

    is_remote = False

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


class _NoExperts:
    """Routed experts that give nothing and take no time."""

    is_remote = False

    def dispatch(
        self, layer_idx: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        return torch.zeros_like(hidden_states)

    def combine(self, handle: Tensor) -> Tensor:
        return handle

    def abandon(self, handle: Tensor) -> None: ...


def _engine(
    model: BenchModel, experts: Experts, num_streams: int
) -> tuple[EngineCore, ModelRunner]:
    config = bench_config(model, {"engine.max_num_seqs": num_streams})
    engine = load_engine(config, Source.open(config), experts)
    assert isinstance(engine.runner, ModelRunner)
    return engine, engine.runner


def _decode(
    engine: EngineCore, model: BenchModel, num_streams: int, num_steps: int
) -> Iterator[int]:
    """Prefill, then count steps in which every stream decodes one token."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_steps + 8, ignore_eos=True)
    for index, prompt in enumerate(random_prompts(model, num_streams, 16, seed=1)):
        engine.add(request_id=f"stream-{index}", prompt_ids=prompt, sampling=sampling)
    while engine.stats().num_decode_tokens == 0:
        engine.step()
    yield from range(num_steps)


def _timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _median(steps: list[Step]) -> Step:
    return Step(
        median(step.total_s for step in steps),
        median(step.dense_s for step in steps),
        median(step.waited_s for step in steps),
    )


def _to_results(medians: dict[str, dict[str, Step]]) -> dict[str, Any]:
    return {
        host: {
            way: {
                "step_ms": round(1e3 * step.total_s, 3),
                "dense_ms": round(1e3 * step.dense_s, 3),
                "waited_ms": round(1e3 * step.waited_s, 3),
            }
            for way, step in ways.items()
        }
        for host, ways in medians.items()
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overlap", description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="of each way with each host")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
