"""Warm equals cold, bit by bit, through a real Redis: `python -m bench.memory.redis_cases`.

The cases of `deployments/verify/random_cases.py` in `batch_invariant` mode, for each kind of rows:
concurrent requests that share prefixes, evictions in memory, a tenant's budget in Redis that all
cases together exceed, engines that are started anew (some without having written all), and now and
then a new Redis server on the old one's file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from prometheus_client import CollectorRegistry

from bench.lib.card import Check, pin, report, table
from bench.lib.models import BenchModel, load_models
from cluster.config import Config, StoreConfig
from cluster.metrics import Metrics
from cluster.spec import KVLayout
from cluster.store.kv_store import KVStore
from cluster.store.redis_server import RedisServer
from deployments.decoder.kv.block_store import KVBlockStore, kv_tensors
from deployments.loading import ModelSource, load_local_experts
from deployments.verify.random_cases import RandomCases
from engine.cache.kv_cache import KVCacheConfig
from engine.model.model import GemmaDecoder
from engine.runner import ModelRunner

MODEL = "tiny-moe"
NUM_CASES = 1000  # of each kind of rows
SERVER_BYTES, TENANT_BYTES = 64 << 20, 2 << 20
STARTS_PER_SERVER = 50
STARTS_PER_LOSS = 4  # every so many starts the engine before has lost what wasn't written yet
FLUSH_S = 30.0


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the cases, print the card, return the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=NUM_CASES, help="of each kind of rows")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(2)
    [model] = load_models([MODEL])
    kinds = get_args(KVLayout)
    with ProcessPoolExecutor(len(kinds), multiprocessing.get_context("spawn")) as processes:
        found = processes.map(partial(run, model, num_cases=args.cases), kinds)
        results = dict(zip(kinds, found, strict=True))
    return report("redis_cases", results, checks(results), card(results), keep=args.keep)


def run(model: BenchModel, kv_layout: KVLayout, num_cases: int) -> dict[str, Any]:
    """What became of the cases of one kind of rows, and how long they took."""
    torch.set_num_threads(1)
    overrides = {"model": str(model.model_dir), "device": "cpu", "batch_invariant": True}
    config = Config.load(None, overrides)
    source = ModelSource.open(config)
    experts = load_local_experts(config, source)
    decoder = GemmaDecoder.load(
        source.spec, source.checkpoint, source.device, source.dtype, config.batch_invariant
    )

    def make_runner(kv: KVCacheConfig) -> ModelRunner:
        return ModelRunner(decoder, kv, experts)

    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="briolette-") as directory,
        Stores(Path(directory), source.spec.sliding_window, kv_layout) as stores,
    ):
        tally = RandomCases(make_runner, stores.connect, kv_layout).run(num_cases)
        counts = {"num_bytes_read": stores.num_bytes_read, "num_servers": stores.num_servers}
    return asdict(tally) | counts | {"seconds": time.perf_counter() - start}


class Stores:
    """The store of one engine after another, over one Redis file; ends with a `with` block."""

    def __init__(self, data_dir: Path, sliding_window: int, kv_layout: KVLayout) -> None:
        self._data_dir, self._window, self._kv_layout = data_dir, sliding_window, kv_layout
        self._registry = CollectorRegistry()
        self._metrics = Metrics(self._registry)
        self._resources = ExitStack()
        self._blocks: KVBlockStore | None = None
        self._num_starts = self.num_servers = 0

    def connect(self, runner: ModelRunner) -> KVBlockStore:
        """For an engine that was just started; the one before has ended."""
        self._end_engine(loses=self._num_starts % STARTS_PER_LOSS == 1)
        if self._num_starts % STARTS_PER_SERVER == 0:
            self._start_server()
        self._num_starts += 1
        tensors = kv_tensors(runner)
        block_size = next(iter(tensors.values()))[0].shape[1]
        self._blocks = KVBlockStore(
            tensors, block_size, self._window, f"cases {self._kv_layout}", self._open
        )
        return self._blocks

    @property
    def num_bytes_read(self) -> float:
        labels = {"model": MODEL, "direction": "read"}
        return self._registry.get_sample_value("briolette_kv_store_bytes_total", labels) or 0.0

    def __enter__(self) -> Stores:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_engine(loses=True)
        self._resources.close()

    def _open(self, whole: bytes) -> KVStore:
        config = StoreConfig(tenant_bytes=TENANT_BYTES)
        return KVStore(self._server.address, whole, MODEL, self._metrics, config)

    def _start_server(self) -> None:
        self._resources.close()
        self._server = self._resources.enter_context(RedisServer(self._data_dir, SERVER_BYTES))
        self.num_servers += 1

    def _end_engine(self, *, loses: bool) -> None:
        if self._blocks is not None:
            if not loses:
                assert self._blocks.flush(FLUSH_S), "Redis is too slow for these cases"
            self._blocks.close()


def checks(results: dict[str, Any]) -> list[Check]:
    """What the design promises: every bit, in every case."""
    found = []
    for kv_layout, one in results.items():
        name = f"kv_layout {kv_layout}"
        found += [
            Check(f"{name}: random cases", one["num_cases"], "cases", NUM_CASES),
            Check(f"{name}: unequal rows of logits", one["num_unequal"], "rows", 0, at_least=False),
        ]
    return found


def card(results: dict[str, Any]) -> list[str]:
    columns = {
        "num_cases": "cases",
        "num_requests": "requests",
        "num_hits": "found a prefix",
        "num_restarts": "restarts",
        "num_servers": "Redis servers",
        "num_evicted": "blocks evicted",
        "num_rows": "rows compared",
        "num_unequal": "unequal",
    }
    rows = [
        [
            kv_layout,
            *(str(one[column]) for column in columns),
            f"{one['num_bytes_read'] / 1e6:.1f}",
            f"{one['seconds']:.0f}",
        ]
        for kv_layout, one in results.items()
    ]
    header = ["engine.kv_layout", *columns.values(), "MB from Redis", "seconds"]
    return ["Warm equals cold, batch_invariant, through Redis", *table(header, rows)]


if __name__ == "__main__":
    main()
