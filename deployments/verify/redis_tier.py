"""The Redis side of a verification: a tenant of its own, which is deleted at the end."""

from __future__ import annotations

import logging
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from cluster.config import Config, StoreConfig
from cluster.errors import Unavailable
from cluster.metrics import Metrics
from cluster.store.kv_store import KVStore
from cluster.store.redis import REDIS_ERRORS, RedisAddress
from cluster.store.redis_server import RedisServer
from cluster.store.scripts import tenant_prefix
from deployments.decoder.kv.block_store import KVBlockStore, kv_tensors
from deployments.loading import ModelSource, fingerprint
from deployments.redis_store import problem_of
from engine.cache.block_store import BlockStore
from engine.runner import ModelRunner

log = logging.getLogger(__name__)

TTL_S = 3600.0  # of its values: what a killed verification has left expires
FLUSH_S = 120.0


@dataclass(frozen=True, slots=True)
class RedisTier:
    """The `Tier` of `deployments.verify.verify` in a Redis server."""

    address: RedisAddress
    config: Config
    source: ModelSource
    tenant: str

    @contextmanager
    def connect(self, runner: ModelRunner) -> Iterator[BlockStore]:
        """Open the store of an engine; raises Unavailable if Redis doesn't write in time."""
        store = KVBlockStore(
            kv_tensors(runner),
            self.config.engine.block_size,
            self.source.spec.sliding_window,
            fingerprint(self.config, self.source),
            self._store,
        )
        try:
            yield store
            if not store.flush(FLUSH_S):
                raise Unavailable(f"Redis at {self.address} wrote too little in {FLUSH_S:.0f} s.")
        finally:
            store.close()

    def _store(self, whole: bytes) -> KVStore:
        metrics = Metrics(CollectorRegistry())  # not exported
        return KVStore(self.address, whole, "verify", metrics, self._settings)

    @property
    def _settings(self) -> StoreConfig:
        """The configured store, with a queue that drops nothing and values that expire soon."""
        store = self.config.store
        return store.model_copy(
            update={"queue_bytes": store.tenant_bytes, "ttl_s": min(store.ttl_s, TTL_S)}
        )


@contextmanager
def redis_tier(config: Config, source: ModelSource) -> Iterator[RedisTier]:
    """Use the configured Redis during a `with` block, or start one in a temporary directory.

    Raises:
        Unavailable: Redis doesn't answer.
    """
    with _server(config.store) as address:
        tier = RedisTier(address, config, source, f"briolette-verify-{secrets.token_hex(4)}")
        try:
            yield tier
        finally:
            _delete(address, tier.tenant)


@contextmanager
def _server(store: StoreConfig) -> Iterator[RedisAddress]:
    if store.url is None:
        with (
            tempfile.TemporaryDirectory(prefix="briolette-verify-") as directory,
            RedisServer(Path(directory), store.max_bytes) as server,
        ):
            yield server.address
    else:
        address = RedisAddress(store.url, store.password_file, store.ca_file, store.timeout_s)
        if (problem := problem_of(address)) is not None:
            raise Unavailable(problem)
        yield address


def _delete(address: RedisAddress, tenant: str) -> None:
    """Delete the tenant's values; those that can't be deleted expire."""
    try:
        client = address.client()
        for name in client.scan_iter(match=tenant_prefix(tenant) + b"*", count=1000):
            client.delete(name)
        client.close()
    except REDIS_ERRORS as error:
        log.warning("The values of %s stay in Redis for an hour at most: %s", tenant, error)
