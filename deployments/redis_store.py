"""The KV store of a configuration: its address, its server, its budgets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.metrics import Metrics
from cluster.store.kv_store import KVStore
from cluster.store.redis import REDIS_ERRORS, RedisAddress
from cluster.store.redis_server import SOCKET, RedisServer
from cluster.tenants.directory import eviction_policy, keeps_tenants

log = logging.getLogger(__name__)


def store_address(config: Config) -> RedisAddress | None:
    """Return the address of Redis; None without a store.

    There is none without prefix caching either, whose hashes name the values.
    """
    store = config.store
    if not store.enabled or not config.engine.prefix_caching:
        return None
    return RedisAddress(
        store.url or f"unix://{data_dir(config) / SOCKET}",
        store.password_file,
        store.ca_file,
        store.timeout_s,
    )


def data_dir(config: Config) -> Path:
    """Return the data directory of our own Redis server."""
    return (config.store.data_dir or config.state_dir / "redis").absolute()


@contextmanager
def store_server(config: Config, warn: Callable[[str], None]) -> Iterator[None]:
    """Run our own Redis server during a `with` block, or check the configured one.

    Args:
        config: The configuration; without a store nothing happens.
        warn: Called with a sentence if the configured server doesn't answer: the cluster then
            serves without stored contexts.

    Raises:
        ConfigError: Our own server is set wrongly, or the configured one may evict tenants.
        Unavailable: Our own server doesn't start.
    """
    address = store_address(config)
    if address is None:
        yield
    elif config.store.url is None:
        with RedisServer(data_dir(config), config.store.max_bytes):
            yield
    else:
        problem = problem_of(address)
        if problem is None and config.gateway.auth == "keys":
            problem = doubt_about_tenants(address)
        if problem is not None:
            warn(problem)
        yield


def problem_of(address: RedisAddress) -> str | None:
    """Return why the server can't be used, in a sentence; None if it answers.

    Raises:
        ConfigError: The address is wrong.
    """
    address.check()
    try:
        connection = address.connect()
        try:
            connection.command("PING")
        finally:
            connection.close()
    except redis.AuthenticationError as error:
        reason = f"refuses the password ({error})"
    except REDIS_ERRORS as error:
        reason = f"doesn't answer ({error})"
    else:
        return None
    return f"Redis at {address} {reason}; until it does, no context or session is stored."


def doubt_about_tenants(address: RedisAddress) -> str | None:
    """Return a warning if the server's eviction policy is unknown; None if it evicts no tenants.

    Raises:
        ConfigError: A full server would evict tenants.
    """
    try:
        policy = eviction_policy(address)
    except REDIS_ERRORS as error:
        return (
            f"The maxmemory-policy of Redis at {address} can't be read ({error}); make sure that "
            "it is noeviction, or tenants may be evicted."
        )
    if not keeps_tenants(policy):
        raise ConfigError(
            f"Redis at {address} has the maxmemory-policy {policy}, with which it may evict "
            "tenants and their keys when it is full; set it to noeviction."
        )
    return None


class TenantBudgets:
    """Bytes that each tenant may keep in the store, as gateways send them with every request."""

    def __init__(self, usual_bytes: int) -> None:
        """Start without exceptions; `usual_bytes` is the budget of every tenant."""
        self._usual_bytes = usual_bytes
        self._own_bytes: dict[str, int] = {}

    def set(self, tenant: str, num_bytes: int | None) -> None:
        """Set a tenant's budget; None sets the usual one."""
        if num_bytes is None:
            self._own_bytes.pop(tenant, None)
        else:
            self._own_bytes[tenant] = num_bytes

    def get(self, tenant: str) -> int:
        """Return a tenant's budget in bytes. Any thread may call."""
        return self._own_bytes.get(tenant, self._usual_bytes)


def open_kv_store(
    config: Config,
    address: RedisAddress,
    fingerprint: bytes,
    metrics: Metrics,
    budget_of: Callable[[str], int] | None = None,
) -> KVStore:
    """Open a decoder's side of the store.

    Args:
        config: The configuration.
        address: Where Redis is.
        fingerprint: Part of every key: values of other fingerprints are never read.
        metrics: Counts reads and writes.
        budget_of: Returns the bytes that a tenant may keep; None for the usual budget.
    """
    return KVStore(address, fingerprint, config.model_id, metrics, config.store, budget_of)
