"""An engine in this process with its blocks in Redis, put together as the decoder's is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from bench.lib.models import BenchModel
from bench.lib.ours import bench_config
from cluster.metrics import Metrics
from cluster.spec import AttentionKind
from cluster.store.redis import RedisAddress
from deployments.decoder.kv.block_store import KVBlockStore, kv_tensors
from deployments.loading import (
    ModelSource,
    fingerprint,
    load_local_experts,
    load_model,
    make_engine,
)
from deployments.redis_store import open_kv_store
from engine.core import EngineCore
from engine.prefill_meter import PrefillMeter

FLUSH_S = 60.0


@dataclass(frozen=True, slots=True)
class Stored:
    """The engine, its store (None: it has none), and what both count."""

    engine: EngineCore
    blocks: KVBlockStore | None
    registry: CollectorRegistry

    def flush(self) -> None:
        """Wait until everything is written."""
        if self.blocks is not None:
            assert self.blocks.flush(FLUSH_S), "Redis is too slow for this bench"

    def forget(self) -> None:
        """Evict everything from the engine's own memory; call while nothing runs."""
        for kind, group in self.engine.kv.groups.items():
            self.engine.kv.index.make_room(kind, group.pool.num_free)

    def bytes_moved(self, direction: str) -> float:
        """Payload "read" or "written" since the start."""
        name = "briolette_kv_store_bytes_total"
        found = self.registry.collect()
        samples = (sample for family in found for sample in family.samples if sample.name == name)
        return sum(s.value for s in samples if s.labels["direction"] == direction)


@contextmanager
def stored_engine(
    model: BenchModel,
    num_threads: int,
    address: RedisAddress | None,
    options: Mapping[str, Any] | None = None,
    *,
    token_bytes: Mapping[AttentionKind, int] | None = None,
    knows_rates: bool = True,
) -> Iterator[Stored]:
    """An engine with local experts. `options` change its configuration; its blocks are padded to
    `token_bytes` for each token; unless it `knows_rates` it fetches whatever is there.
    """
    torch.set_num_threads(num_threads)
    config = bench_config(model, {"experts.mode": "local", **(options or {})})
    source, registry = ModelSource.open(config), CollectorRegistry()
    metrics, block_size = Metrics(registry), config.engine.block_size
    loaded, meter = load_model(config, source, load_local_experts(config, source)), PrefillMeter()
    blocks: KVBlockStore | None = None
    if address is not None:
        blocks = KVBlockStore(
            padded(kv_tensors(loaded.runner), block_size, token_bytes or {}),
            block_size,
            source.spec.sliding_window,
            fingerprint(config, source),
            lambda whole: open_kv_store(config, address, whole, metrics),
            meter.seconds if knows_rates else lambda start, stop: None,
        )
    engine = make_engine(config, source, loaded, store=blocks, prefill_meter=meter)
    try:
        yield Stored(engine, blocks, registry)
    finally:
        if blocks is not None:
            blocks.close()


def padded(
    tensors: Mapping[AttentionKind, list[Tensor]],
    block_size: int,
    token_bytes: Mapping[AttentionKind, int],
) -> dict[AttentionKind, list[Tensor]]:
    """The tensors, and one more of each kind that is padded. Its pages exist once written to."""
    found = {kind: list(of_kind) for kind, of_kind in tensors.items()}
    for kind, wanted in token_bytes.items():
        num_blocks, block_bytes = len(found[kind][0]), sum(t[0].nbytes for t in found[kind])
        found[kind].append(
            torch.zeros((num_blocks, wanted * block_size - block_bytes), dtype=torch.uint8)
        )
    return found
