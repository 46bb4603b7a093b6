"""Schedulers without a model, requests for them, and steps that say 1 to everything."""

from __future__ import annotations

import zlib
from collections.abc import Collection

from cluster.spec import AttentionKind
from engine.cache.block_hash import BlockHasher
from engine.cache.block_store import BlockStore
from engine.cache.kv_cache import KVCache, KVCacheConfig
from engine.request import FinishReason, Request, SamplingParams
from engine.scheduling.load_shedding import LoadShedding
from engine.scheduling.policy import Policy
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.scheduler_output import SchedulerOutput

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING
SHARING = ("b", "c")  # tenants


def make_scheduler(
    *,
    block_size: int = 4,
    num_global: int = 65,
    num_sliding: int = 65,
    window: int = 8,
    max_model_len: int = 128,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    max_queue: int = 100,
    checkpoint_blocks: int = 0,
    kinds: Collection[AttentionKind] = (GLOBAL, SLIDING),
    policy: Policy | None = None,
    store: BlockStore | None = None,
) -> Scheduler:
    num_blocks = {GLOBAL: num_global, SLIDING: num_sliding}
    kv = KVCache(
        KVCacheConfig(block_size, {kind: num_blocks[kind] for kind in kinds}),
        sliding_window=window,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        hasher=BlockHasher(block_size, "model", SHARING),
        checkpoint_blocks=checkpoint_blocks,
    )
    return Scheduler(
        kv,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        policy=policy,
        load_shedding=LoadShedding(max_queue),
        store=store,
    )


def make_request(name: str, num_prompt: int, max_tokens: int = 4, arrival: float = 0) -> Request:
    """Requests of different names have no token in common."""
    prompt_ids = [100 + zlib.crc32(name.encode())] * num_prompt
    return Request(name, prompt_ids, SamplingParams(), 0, max_tokens=max_tokens, arrived_at=arrival)


def run_step(scheduler: Scheduler) -> SchedulerOutput:
    """A step whose model says 1 to everything."""
    output = scheduler.schedule()
    scheduler.update(output)
    for request in output.sampling:
        request.output_ids.append(1)
        if len(request.output_ids) == request.max_tokens:
            scheduler.finish(request, FinishReason.LENGTH)
    return output


def shares(output: SchedulerOutput) -> list[tuple[str, int, bool]]:
    return [(s.request.request_id, s.num_new_tokens, s.samples) for s in output.scheduled]


def evict_all(scheduler: Scheduler) -> None:
    for kind, group in scheduler.kv.groups.items():
        scheduler.kv.index.make_room(kind, group.pool.num_free)
