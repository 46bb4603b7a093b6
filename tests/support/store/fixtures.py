"""Fixtures: Redis servers, KV stores on them, and engines that keep their blocks there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from cluster.config import StoreConfig
from cluster.metrics import Metrics
from cluster.store.kv_store import KVStore
from cluster.store.redis import RedisAddress
from tests.support.engine.invariant_subjects import Subject, load
from tests.support.engine.tiny_models import make_tiny
from tests.support.store.engines import Deployment
from tests.support.store.redis_servers import redis_server
from tests.support.store.stores import FINGERPRINT, Stores


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry)


@pytest.fixture
def stores(metrics: Metrics) -> Iterator[Stores]:
    with ExitStack() as stack:

        def make(
            address: RedisAddress,
            fingerprint: bytes = FINGERPRINT,
            budget_of: Callable[[str], int] | None = None,
            **config: Any,
        ) -> KVStore:
            store = KVStore(
                address, fingerprint, "m", metrics, StoreConfig.model_construct(**config), budget_of
            )
            return stack.enter_context(store)

        yield make


@pytest.fixture
def address(tmp_path: Path) -> Iterator[RedisAddress]:
    with redis_server(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    torch.set_num_threads(1)
    return {name: load(make_tiny(name, tmp_path_factory.mktemp(name))) for name in ("26b", "e2b")}


@pytest.fixture
def deploy(subjects: dict[str, Subject]) -> Iterator[Callable[..., Deployment]]:
    made: list[Deployment] = []

    def make(address: RedisAddress, **config: Any) -> Deployment:
        made.append(Deployment(subjects["26b"], address, **config))
        return made[-1]

    yield make
    for deployment in made:
        deployment.close()
