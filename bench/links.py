"""One round trip between processes: our links beside a sync unary call of Python gRPC.

`python -m bench.links` starts echo processes and sends them what an expert call carries: 5.6 KB
(one token's hidden state of the 26B in bf16), 45 KB (eight) and 1.4 MB (a prefill chunk of 256),
the same each way; to one peer, and to two at once. A wait spins where a link's own waits do
(`cluster/links/spin.py`); gRPC's don't.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from multiprocessing.connection import Connection
from statistics import quantiles
from typing import Any, TypeAlias

import grpc

from bench.lib.card import Check, pin, report, table
from cluster.errors import LinkError
from cluster.links.connect import Endpoint, Link, Listener, connect

SIZES = {"5.6 KB": 5632, "45 KB": 8 * 5632, "1.4 MB": 256 * 5632}
OURS = ("shm", "unix", "tcp")
GRPC = "grpc sync unary"
METHOD = "/bench.Echo/Echo"
GRPC_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
NUM_ROUNDS = 3
TIMEOUT_S = 20.0

RoundTrip: TypeAlias = Callable[[bytes], None]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each number")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(2)
    secret = secrets.token_bytes(32)
    times: dict[str, list[float]] = {}
    for num_hosts in (1, 2):
        with echoing(num_hosts, secret) as endpoints, contextlib.ExitStack() as stack:
            ways = {
                name: stack.enter_context(round_trips(name, endpoints, secret))
                for name in (*OURS, GRPC)
            }
            for _ in range(NUM_ROUNDS):  # in turn, so that a busy moment hits all alike
                for (name, way), (size, num_bytes) in itertools.product(
                    ways.items(), SIZES.items()
                ):
                    key = f"{name}, {num_hosts} host{'s' * (num_hosts > 1)}, {size}"
                    times.setdefault(key, []).extend(
                        measure(way, num_bytes, args.seconds / NUM_ROUNDS)
                    )
    results = {key: summarise(values) for key, values in times.items()}
    return report("links", results, checks(results), card(results), num_threads=1, keep=args.keep)


def measure(round_trip: RoundTrip, num_bytes: int, seconds: float) -> list[float]:
    """Seconds of each round trip in a stretch of time, after a tenth of it to warm up."""
    payload = os.urandom(num_bytes)
    warm_end = time.perf_counter() + seconds / 10
    while time.perf_counter() < warm_end:
        round_trip(payload)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or len(times) < 5:
        round_trip(payload)
        times.append(time.perf_counter() - start)
    return times


def summarise(times: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in microseconds."""
    cuts = quantiles(times, n=100)
    return {"p50_us": cuts[49] * 1e6, "p99_us": cuts[98] * 1e6, "calls": len(times)}


def checks(results: dict[str, Any]) -> list[Check]:
    """What the design promises of one host at 5.6 KB."""
    one = {name: results[f"{name}, 1 host, 5.6 KB"] for name in (*OURS, GRPC)}
    ratio = one[GRPC]["p50_us"] / one["shm"]["p50_us"]
    return [
        Check("shared memory, p50", one["shm"]["p50_us"], "µs", 40, at_least=False),
        Check("TCP, p50", one["tcp"]["p50_us"], "µs", 80, at_least=False),
        Check("shared memory, p99", one["shm"]["p99_us"], "µs", 400, at_least=False),
        Check("TCP, p99", one["tcp"]["p99_us"], "µs", 400, at_least=False),
        Check("shared memory against gRPC, p50", ratio, "x faster", 10),
    ]


def card(results: dict[str, Any]) -> list[str]:
    """A row for each transport and number of hosts, p50/p99 for each size."""
    rows = []
    for name in (*OURS, GRPC):
        for hosts in ("1 host", "2 hosts"):
            found = [results[f"{name}, {hosts}, {size}"] for size in SIZES]
            cells = [f"{one['p50_us']:.0f}/{one['p99_us']:.0f}" for one in found]
            rows.append([f"{name}, {hosts}", *cells])
    return ["One round trip, µs, p50/p99, the same bytes each way", *table(["", *SIZES], rows)]


@contextlib.contextmanager
def echoing(num_hosts: int, secret: bytes) -> Iterator[list[tuple[Endpoint, str]]]:
    """Echo processes: where each can be reached, by link and by gRPC."""
    context = multiprocessing.get_context("spawn")
    controls, processes = [], []
    try:
        for _ in range(num_hosts):
            control, far = context.Pipe()
            process = context.Process(target=echo, args=(far, secret), daemon=True)
            process.start()
            far.close()
            controls.append(control)
            processes.append(process)
        addresses = [control.recv() for control in controls]
        yield [(Endpoint.from_dict(fields), address) for fields, address in addresses]
    finally:
        for control in controls:
            control.close()
        for process in processes:
            process.join(TIMEOUT_S)
            process.kill()


def echo(control: Connection, secret: bytes) -> None:
    """Send back whatever comes, over a link of each kind and over gRPC, until `control` closes."""
    server = grpc.server(futures.ThreadPoolExecutor(1), options=GRPC_OPTIONS)
    handler: Any = grpc.unary_unary_rpc_method_handler(lambda request, _: request)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bench.Echo", {"Echo": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    listener = Listener(secret, lambda hello: b"")
    control.send((listener.endpoint.to_dict(), f"127.0.0.1:{port}"))
    for _ in OURS:
        threading.Thread(target=_echo_link, args=(listener.accept(TIMEOUT_S),), daemon=True).start()
    with contextlib.suppress(EOFError):
        control.recv()
    listener.close()
    server.stop(None)


def _echo_link(link: Link) -> None:
    with link, contextlib.suppress(LinkError):
        while True:
            link.send([link.recv(None)], TIMEOUT_S)


@contextlib.contextmanager
def round_trips(
    name: str, endpoints: Sequence[tuple[Endpoint, str]], secret: bytes
) -> Iterator[RoundTrip]:
    """A function that sends its bytes to every host and waits for all answers."""
    with contextlib.ExitStack() as stack:
        if name == GRPC:
            channels = [grpc.insecure_channel(address, GRPC_OPTIONS) for _, address in endpoints]
            for channel in channels:
                stack.callback(channel.close)
            yield _by_grpc([channel.unary_unary(METHOD) for channel in channels])
        else:
            links = [
                stack.enter_context(connect(endpoint, secret, b"", TIMEOUT_S, [name]))
                for endpoint, _ in endpoints
            ]
            yield _by_links(links)


def _by_links(links: Sequence[Link]) -> RoundTrip:
    def round_trip(payload: bytes) -> None:
        for link in links:
            link.send([payload], TIMEOUT_S)
        for link in links:
            assert len(link.recv(TIMEOUT_S)) == len(payload)

    return round_trip


def _by_grpc(calls: Sequence[Any]) -> RoundTrip:
    def round_trip(payload: bytes) -> None:
        if len(calls) == 1:  # the plain blocking call
            assert len(calls[0](payload, timeout=TIMEOUT_S)) == len(payload)
            return
        for answer in [call.future(payload, timeout=TIMEOUT_S) for call in calls]:
            assert len(answer.result()) == len(payload)

    return round_trip


if __name__ == "__main__":
    main()
