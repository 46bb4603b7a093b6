"""The engine's blocks in a real Redis: warm equals cold, and nothing that breaks there shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from bench.warm_cold import WarmCold
from cluster.kv_store import KVStore
from cluster.metrics import Metrics
from cluster.redis import RedisAddress
from cluster.spec import AttentionKind
from deployments.kv_block_store import KVBlockStore, kv_tensors
from engine.runner import ModelRunner
from tests.redis_servers import redis_server
from tests.test_batch_invariant import Subject, load
from tests.tiny_models import make_tiny

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    torch.set_num_threads(1)
    return load(make_tiny("26b", tmp_path_factory.mktemp("26b")))


@pytest.fixture
def address(tmp_path: Path) -> Iterator[RedisAddress]:
    with redis_server(tmp_path) as address:
        yield address


def block_store(runner: ModelRunner, store: KVStore) -> KVBlockStore:
    tensors = kv_tensors(runner)
    block_size = tensors[GLOBAL][0].shape[1]
    return KVBlockStore(tensors, block_size, runner.model.spec.sliding_window, "m", lambda f: store)


def test_warm_from_redis_equals_cold(subject: Subject, address: RedisAddress) -> None:
    registry = CollectorRegistry()
    with KVStore(address, b"m", "m", Metrics(registry)) as store:

        def connect(runner: ModelRunner) -> KVBlockStore:
            assert store.flush(5)
            return block_store(runner, store)

        cases = WarmCold(lambda kv: ModelRunner(subject.model, kv, subject.experts), connect)
        tally = cases.run(10)
        print(tally)
        for metric in registry.collect():
            for s in metric.samples:
                print(s.name, s.labels, s.value)
    assert tally.num_rows > 100 and tally.num_unequal == 0, tally
    assert count(registry, "reads", outcome="ok") > 10


def count(registry: CollectorRegistry, what: str, **labels: str) -> float:
    return (
        registry.get_sample_value(f"briolette_kv_store_{what}_total", {"model": "m", **labels}) or 0
    )
