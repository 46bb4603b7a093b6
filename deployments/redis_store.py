"""The KV store as the configuration wants it: where it is, its server, a decoder's use of it."""

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
    """Where contexts and sessions are kept; None where nothing is: values are named by the hashes
    of prefix caching.
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
    """Of the Redis server that comes with us."""
    return (config.store.data_dir or config.state_dir / "redis").absolute()


@contextmanager
def store_server(config: Config, warn: Callable[[str], None]) -> Iterator[None]:
    """Our own server for the length of a `with` block, where one is wanted; another one is tried,
    and `warn` is told when it doesn't answer, which costs warmth and no answer.

    Raises ConfigError or Unavailable where our own can't start, and ConfigError where another one
    might throw tenants away.
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
    """Why nothing will be kept there, in a sentence; None where a server answers.

    Raises ConfigError when the address can't be used at all.
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
    return f"Redis at {address} {reason}; until it does, nothing is remembered there."


def doubt_about_tenants(address: RedisAddress) -> str | None:
    """What can't be known of a server that keeps tenants, in a sentence; None where all is well.

    Raises ConfigError where a full server would throw them away.
    """
    try:
        policy = eviction_policy(address)
    except REDIS_ERRORS as error:
        return (
            f"Redis at {address} doesn't tell its maxmemory-policy ({error}); make sure that it is "
            "noeviction, or tenants may be lost."
        )
    if not keeps_tenants(policy):
        raise ConfigError(
            f"Redis at {address} has the maxmemory-policy {policy}, by which a full server throws "
            "tenants and their keys away; set it to noeviction."
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
    """A decoder's end of the store; `budget_of` as `KVStore` has it."""
    return KVStore(address, fingerprint, config.model_id, metrics, config.store, budget_of)
