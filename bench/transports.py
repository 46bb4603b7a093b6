"""What Ray's own calls cost at 5.6 KB each way, beside our links: run by hand, for docs/LOG.md.

`python -m bench.transports` starts Ray on this machine, measures a call of an actor method, of a
compiled graph and of a Serve handle with numpy arrays, and stops Ray again. Each is what Ray offers
for the job of an expert call, and none is on Briolette's path.
"""

from __future__ import annotations

import argparse
import os
import secrets
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any

import numpy as np

from bench.lib.card import pin, report, table

NUM_BYTES = 5632  # one token's hidden state of the 26B in bf16
TIMEOUT_S = 60.0


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    args = _arguments(argv)
    pin(2)
    # Ray's node stays on the loopback address, and asks nobody for usage statistics.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one to ~/.ray
    import ray

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        _node_ip_address="127.0.0.1",
    )
    results: dict[str, Any] = {"bytes": NUM_BYTES}
    try:
        for name, measure in (
            ("Ray actor call", _actor),
            ("compiled graph", _compiled_graph),
            ("Serve handle call", _serve_handle),
        ):
            try:
                results[name] = measure(args.calls)
            except Exception as error:  # one that can't run here mustn't hide the others
                results[name] = {"not_measured": f"{type(error).__name__}: {error}"[:300]}
    finally:
        ray.shutdown()
    return report("transports", results, [], _card(results), num_threads=1, keep=args.keep)


def _actor(num_calls: int) -> dict[str, float]:
    import ray

    @ray.remote(num_cpus=0)
    class Echo:
        def echo(self, rows: Any) -> Any:
            return rows

    actor = Echo.remote()  # type: ignore[attr-defined]  # what the decorator adds
    try:
        return _time(lambda rows: ray.get(actor.echo.remote(rows), timeout=TIMEOUT_S), num_calls)
    finally:
        ray.kill(actor)


def _compiled_graph(num_calls: int) -> dict[str, float]:
    import ray
    from ray.dag import InputNode

    @ray.remote(num_cpus=0)
    class Echo:
        def echo(self, rows: Any) -> Any:
            return rows

    actor = Echo.remote()  # type: ignore[attr-defined]  # what the decorator adds
    with InputNode() as rows:
        graph: Any = actor.echo.bind(rows)
    compiled = graph.experimental_compile()
    try:
        return _time(lambda rows: ray.get(compiled.execute(rows), timeout=TIMEOUT_S), num_calls)
    finally:
        compiled.teardown()
        ray.kill(actor)


def _serve_handle(num_calls: int) -> dict[str, float]:
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Echo:
        def echo(self, rows: Any) -> Any:
            return rows

    serve.start(proxy_location="Disabled")
    handle: Any = serve.run(Echo.bind(), name="transports", route_prefix=None)  # type: ignore[attr-defined]
    try:
        return _time(lambda rows: handle.echo.remote(rows).result(timeout_s=TIMEOUT_S), num_calls)
    finally:
        serve.shutdown()


def _time(call: Callable[[Any], Any], num_calls: int) -> dict[str, float]:
    """Microseconds of one round trip; the first tenth of the calls is warm-up."""
    rows = np.random.default_rng(0).random(NUM_BYTES // 8)
    times = []
    for _ in range(num_calls + num_calls // 10):
        start = time.perf_counter()
        answer = call(rows)
        times.append(1e6 * (time.perf_counter() - start))
    assert np.array_equal(answer, rows)
    kept = times[num_calls // 10 :]
    return {"p50_us": round(median(kept), 1), "p99_us": round(quantiles(kept, n=100)[98], 1)}


def _card(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, numbers in results.items():
        if isinstance(numbers, dict):
            missing = numbers.get("not_measured")
            cells = [f"not measured: {missing}", ""]
            if missing is None:
                cells = [f"{numbers['p50_us']:.0f}", f"{numbers['p99_us']:.0f}"]
            rows.append([name, *cells])
    return table([f"µs for {NUM_BYTES / 1000:.1f} KB each way", "p50", "p99"], rows)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.transports", description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
