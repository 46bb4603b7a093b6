"""What tests ask of KV stores: values, how they come back, what was counted."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from cluster.store.kv_store import KVStore
from cluster.store.redis import RedisAddress
from cluster.store.scripts import OVERHEAD_BYTES, tenant_prefix
from cluster.store.value import HEADER_BYTES

SIZE = 100_000
FINGERPRINT = b"a model"
KEYS = [b"key-%d" % i for i in range(8)]
Stores = Callable[..., KVStore]


def payload(key: bytes, size: int = SIZE) -> bytes:
    return (key * size)[:size]


def put_all(store: KVStore, keys: list[bytes] = KEYS, tenant: str = "t") -> None:
    for key in keys:
        assert store.put(tenant, key, [payload(key)])
    assert store.flush(5)


def read_all(
    store: KVStore, keys: list[bytes] = KEYS, tenant: str = "t", size: int = SIZE
) -> list[bytes | None]:
    memory = [bytearray(size) for _ in keys]
    read = store.read(tenant, [(key, [view]) for key, view in zip(keys, memory, strict=True)])
    came = read.result(10)
    assert read.done()
    return [bytes(view) if ok else None for ok, view in zip(came, memory, strict=True)]


def count(registry: CollectorRegistry, kind: str, outcome: str) -> float:
    name = f"briolette_kv_store_{kind}_total"
    return registry.get_sample_value(name, {"model": "m", "outcome": outcome}) or 0.0


def command(address: RedisAddress, *words: object) -> None:
    with address.client() as client:
        client.execute_command(*words)


def pause(address: RedisAddress, seconds: float) -> None:
    command(address, "CLIENT", "PAUSE", round(seconds * 500), "ALL")


def booked(address: RedisAddress, tenant: str = "t") -> int:
    with address.client() as client:
        return int(client.hget(tenant_prefix(tenant) + b"usage", "bytes") or 0)


VALUE_BYTES = SIZE + HEADER_BYTES + OVERHEAD_BYTES


def gauge(registry: CollectorRegistry, name: str) -> float | None:
    return registry.get_sample_value(f"briolette_kv_store_{name}", {"model": "m"})
