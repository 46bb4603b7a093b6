"""The KV store's rates for 2 MB values, beside redis-py, and what the checksums cost.

`python -m bench.memory.kv_store` starts a Redis server without a file and measures, in turn,
writing and reading through the store (checksum, books and all), through redis-py with its own
parser and with hiredis, and a bare socket; then once more through the server of our own, with its
append-only file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import redis
import xxhash
from prometheus_client import CollectorRegistry

from bench.lib.card import Check, pin, report, table
from bench.lib.peers import NotMeasured
from bench.memory.raw_wire import HEAD_BYTES, RawWire
from cluster.config import StoreConfig
from cluster.metrics import Metrics
from cluster.store.kv_store import KVStore
from cluster.store.redis import REDIS_ERRORS, RedisAddress
from cluster.store.redis_server import RedisServer, server_binary

VALUE_BYTES = 2 << 20
NUM_VALUES = 64
MAX_BYTES = 1 << 30
NUM_ROUNDS = 5
START_S, TIMEOUT_S = 10.0, 60.0
PACKED_BYTES = 6000  # redis-py's own limit up to which it joins what it sends
OURS = "the store"
OURS_ON_DISK = "the store, append-only file"

Way = tuple[Callable[[], None], Callable[[], None]]  # write all values, read all values


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=NUM_VALUES, help="of 2 MB, for each round")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(2)
    values = [os.urandom(VALUE_BYTES) for _ in range(args.values)]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="briolette-")))
        bare = stack.enter_context(bare_server(directory))
        ours = stack.enter_context(RedisServer(directory / "data", MAX_BYTES))
        ways = {
            OURS: stack.enter_context(by_store(bare, values)),
            OURS_ON_DISK: stack.enter_context(by_store(ours.address, values)),
            **{name: by_redis_py(bare, values, *kinds) for name, kinds in peers().items()},
            "bare socket, no checksum": stack.enter_context(by_socket(bare, values)),
        }
        rates = measure(ways, [bare, ours.address], args.rounds, len(values) * VALUE_BYTES)
        put_us = time_of_put(stack.enter_context(opened(bare)), values[0])
    results = {"gb_per_s": rates, "put_us": put_us, "checksum_gb_per_s": checksums(values)}
    return report("kv_store", results, checks(results), card(results), keep=args.keep)


def measure(
    ways: dict[str, Way], servers: Sequence[RedisAddress], num_rounds: int, num_bytes: int
) -> dict[str, dict[str, list[float]]]:
    """GB/s of each round, writing and reading; in turn, so that a busy moment hits all alike."""
    rates: dict[str, dict[str, list[float]]] = {}
    for _, (name, way) in itertools.product(range(num_rounds), ways.items()):
        for server in servers:
            with server.client() as client:
                client.flushall()
        for what, run in zip(("write", "read"), way, strict=True):
            start = time.perf_counter()
            run()
            rate = num_bytes / (time.perf_counter() - start) / 1e9
            rates.setdefault(name, {"write": [], "read": []})[what].append(rate)
    return rates


def checks(results: dict[str, Any]) -> list[Check]:
    """What the design promises, medians of the rounds."""
    ours = results["gb_per_s"][OURS]
    return [
        Check("writing 2 MB values, with checksum", median(ours["write"]), "GB/s", 1.5),
        Check("reading 2 MB values, with checksum", median(ours["read"]), "GB/s", 1.5),
        Check("the checksum alone", results["checksum_gb_per_s"]["XXH3-128"], "GB/s", 3.0),
        Check("a put, for the step", results["put_us"], "µs", 100, at_least=False),
    ]


def card(results: dict[str, Any]) -> list[str]:
    rows = [
        [name, *(f"{median(one[what]):.2f} ({max(one[what]):.2f})" for what in ("write", "read"))]
        for name, one in results["gb_per_s"].items()
    ]
    sums = ", ".join(f"{name} {rate:.1f}" for name, rate in results["checksum_gb_per_s"].items())
    return [
        "GB/s through a Unix socket, median (best) of the rounds",
        *table(["", "write", "read"], rows),
        f"Checksums, GB/s: {sums}. A put takes the step {results['put_us']:.0f} µs.",
        "",
    ]


@contextlib.contextmanager
def bare_server(directory: Path) -> Iterator[RedisAddress]:
    """A server that keeps nothing on disk."""
    path = directory / "bare.sock"
    command = bare_command(MAX_BYTES, "--port", "0", "--unixsocket", str(path))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    address = RedisAddress(f"unix://{path}", timeout_s=TIMEOUT_S)
    try:
        wait_for_answer(address)
        yield address
    finally:
        process.terminate()
        process.wait()


def bare_command(max_bytes: int, *listening: str) -> list[str]:
    """How to start a server that keeps nothing on disk."""
    return [str(server_binary()), *listening, "--save", "", "--maxmemory", str(max_bytes)]


def wait_for_answer(address: RedisAddress) -> None:
    """Until a server that was started answers. Raises NotMeasured when it doesn't."""
    give_up_at = time.monotonic() + START_S
    while not answers(address):
        if time.monotonic() > give_up_at:
            raise NotMeasured(f"The Redis server at {address} didn't start.")
        time.sleep(0.01)


def answers(address: RedisAddress) -> bool:
    try:
        address.connect().close()
    except REDIS_ERRORS:
        return False
    return True


@contextlib.contextmanager
def opened(address: RedisAddress) -> Iterator[KVStore]:
    config = StoreConfig(queue_bytes=MAX_BYTES)
    with KVStore(address, b"bench", "bench", Metrics(CollectorRegistry()), config) as store:
        yield store


@contextlib.contextmanager
def by_store(address: RedisAddress, values: Sequence[bytes]) -> Iterator[Way]:
    """Write-behind until all is written, and reads into memory that is there already."""
    memory = [bytearray(VALUE_BYTES) for _ in values]
    with opened(address) as store:

        def write() -> None:
            for i, value in enumerate(values):
                assert store.put("bench", b"%d" % i, [value])
            assert store.flush(TIMEOUT_S)

        def read() -> None:
            found = store.read("bench", [(b"%d" % i, [into]) for i, into in enumerate(memory)])
            assert all(found.result(TIMEOUT_S))

        yield write, read


def peers() -> dict[str, tuple[Any, Any]]:
    """redis-py's kinds of parsers and packers."""
    from redis._parsers import _RESP2Parser
    from redis.connection import HiredisRespSerializer, PythonRespSerializer

    encode = redis.ConnectionPool().get_encoder().encode
    plain = partial(PythonRespSerializer, PACKED_BYTES, encode)
    kinds: dict[str, tuple[Any, Any]] = {"redis-py": (_RESP2Parser, plain)}
    with contextlib.suppress(ImportError):
        import hiredis  # noqa: F401
        from redis._parsers import _HiredisParser

        kinds["redis-py with hiredis"] = (_HiredisParser, HiredisRespSerializer)
    return kinds


def by_redis_py(address: RedisAddress, values: Sequence[bytes], parser: Any, packer: Any) -> Way:
    """SET one after the other and GET likewise, the way most programs use it."""
    path = address.url.removeprefix("unix://")
    client = redis.Redis(unix_socket_path=path, protocol=2)
    options = client.connection_pool.connection_kwargs
    options["parser_class"] = parser
    options["command_packer"] = packer()

    def write() -> None:
        for i, value in enumerate(values):
            client.set(b"%d" % i, value)

    def read() -> None:
        for i in range(len(values)):
            found = client.get(b"%d" % i)
            assert isinstance(found, bytes) and len(found) == VALUE_BYTES

    return write, read


@contextlib.contextmanager
def by_socket(address: RedisAddress, values: Sequence[bytes]) -> Iterator[Way]:
    """What the wire and the server give: no checksum, no books, memory used again."""
    memory = memoryview(bytearray(VALUE_BYTES + HEAD_BYTES))
    with RawWire(address) as wire:

        def write() -> None:
            for i, value in enumerate(values):
                wire.set(b"%d" % i, value)

        def read() -> None:
            for i in range(len(values)):
                wire.get(b"%d" % i, VALUE_BYTES, memory)

        yield write, read


def time_of_put(store: KVStore, value: bytes) -> float:
    """Microseconds of the median put of 200."""
    times = []
    for i in range(200):
        start = time.perf_counter()
        store.put("bench", b"put-%d" % i, [value])
        times.append((time.perf_counter() - start) * 1e6)
    store.flush(TIMEOUT_S)
    return median(times)


def checksums(values: Sequence[bytes]) -> dict[str, float]:
    """GB/s of the candidates over all the values, the best of three."""
    candidates: dict[str, Callable[[bytes], object]] = {
        "XXH3-128": xxhash.xxh3_128_digest,
        "zlib.crc32": zlib.crc32,
        "zlib.adler32": zlib.adler32,
    }
    return {name: max(_rate(run, values) for _ in range(3)) for name, run in candidates.items()}


def _rate(run: Callable[[bytes], object], values: Sequence[bytes]) -> float:
    start = time.perf_counter()
    for value in values:
        run(value)
    return len(values) * VALUE_BYTES / (time.perf_counter() - start) / 1e9


if __name__ == "__main__":
    main()
