"""The engine's slower tier of KV blocks, in Redis: `BlockStore` on top of `KVStore`.

Everything here happens between two steps and nothing waits. The store's threads look keys up and
read values into plain memory, and `load` copies from there into the KV tensors; `save` copies out
of them, and the store's writer sends that when it can.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from weakref import WeakKeyDictionary

from torch import Tensor

from cluster.spec import AttentionKind
from cluster.store.kv_store import KVStore, StoreStatus
from deployments.decoder.kv.copies import BlockCopier
from deployments.decoder.kv.fetches import Fetches, touch_values
from deployments.decoder.kv.staged_writes import StagedWrites
from deployments.decoder.kv.traces import BlockIds, KnownKeys, RequestTrace
from deployments.decoder.kv.values import GLOBAL, SLIDING, BlockRun, ValueLayout
from engine.cache.block_store import StoredBlock
from engine.cache.prefix import Fetched
from engine.request import Request
from engine.runner import ModelRunner

log = logging.getLogger(__name__)


class KVBlockStore:
    """The blocks of one model runner. Each tenant has values, and a budget, of its own.

    `tensors` are the KV tensors by kind, each [num_blocks, ...]. `connect` is given the fingerprint
    that values shall have. `prefill_s(start, stop)` says how many seconds it takes to compute these
    positions, None while nobody knows: a prefix is fetched only if that is expected to be faster,
    and given up when it takes longer than computing would have.
    """

    def __init__(
        self,
        tensors: Mapping[AttentionKind, Sequence[Tensor]],
        block_size: int,
        sliding_window: int,
        fingerprint: str,
        connect: Callable[[bytes], KVStore],
        prefill_s: Callable[[int, int], float | None] = lambda start, stop: None,
    ) -> None:
        self._copiers = {kind: BlockCopier(of_kind) for kind, of_kind in tensors.items()}
        self._layout = ValueLayout.of(
            {kind: copier.block_bytes for kind, copier in self._copiers.items()},
            -(-(sliding_window - 1) // block_size),
        )
        self._block_size = block_size
        self.fingerprint = self._fingerprint(fingerprint)
        self._store = connect(self.fingerprint)
        device = next(iter(tensors.values()))[0].device
        self._writes = StagedWrites(self._store, device)
        self._traces: WeakKeyDictionary[Request, RequestTrace] = WeakKeyDictionary()
        self._global_blocks = BlockIds()
        self._known = KnownKeys()
        self._fetches = Fetches(
            self._store, self._layout, self._copiers, self._known, block_size, prefill_s
        )

    # For the engine

    def fetch(self, request: Request, num_cached_tokens: int) -> bool:
        return self._fetches.begin(request, num_cached_tokens)

    def fetched(self, request: Request) -> Fetched | None:
        return self._fetches.result(request)

    def load(self, request: Request, blocks: Sequence[StoredBlock]) -> bool:
        is_loaded = self._fetches.write(request, blocks, self._trace(request).positions)
        if is_loaded:
            self._global_blocks.update(blocks)
        return is_loaded

    def release(self, request: Request) -> None:
        self._fetches.end(request)

    def save(self, request: Request, blocks: Sequence[StoredBlock]) -> None:
        self._forget_lost()
        self._global_blocks.update(blocks)
        trace = self._trace(request)
        for start, stop in self._stretches(trace, blocks):
            for run in self._layout.global_runs(start, stop):
                self._put_global(request, trace, run)
            if start == 0:
                touch_values(self._store, request, self._layout.needed(0, stop))
        self._put_sliding(request, trace, [b for b in blocks if b.kind is SLIDING])

    def discard(self, request: Request) -> None:
        """Remove this request's values that we believe to be in Redis.

        A request that reads further values of the prefix later removes those too.
        """
        runs = self._layout.all_runs(len(request.block_hashes))
        keys = self._known.of(request.tenant).intersection(
            run.key(request.block_hashes) for run in runs
        )
        keys.update(self._trace(request).keys)
        self.forget(request.tenant, keys)
        if keys:
            self._writes.remove(request.tenant, list(keys))

    # For sessions

    def keys_of(self, request: Request) -> tuple[bytes, ...]:
        """Keys of the values with which a conversation that goes on after this request resumes."""
        num_tokens = request.num_computed_tokens
        if request.num_lasting_tokens is not None:
            num_tokens = min(num_tokens, request.num_lasting_tokens)
        stop = num_tokens // self._block_size
        return tuple(run.key(request.block_hashes) for run in self._layout.needed(0, stop))

    def traces_of(self, request: Request) -> tuple[bytes, ...]:
        """Keys of all values that were saved for this request."""
        return tuple(self._trace(request).keys)

    def forget(self, tenant: str, keys: Iterable[bytes]) -> None:
        """These values aren't in Redis, whatever was thought."""
        self._known.of(tenant).difference_update(keys)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was saved is written or given up; whether that came in time."""
        give_up_at = time.monotonic() + timeout_s
        is_staged = self._writes.flush(timeout_s)
        return self._store.flush(max(0.0, give_up_at - time.monotonic())) and is_staged

    @property
    def status(self) -> StoreStatus:
        """How Redis is doing, as last seen."""
        return self._store.status

    def close(self) -> None:
        """Give up what still waits to be written; `flush` first to keep it."""
        self._writes.close()
        self._store.close()

    # Saving

    def _forget_lost(self) -> None:
        """What didn't get to Redis is to be written again."""
        for tenant, key in self._store.take_lost():
            self.forget(tenant, [key])

    def _stretches(
        self, trace: RequestTrace, blocks: Sequence[StoredBlock]
    ) -> Iterator[tuple[int, int]]:
        """Global blocks to be stored: a run that is whole now, and where a window ends all before
        it, in case the store wasn't there. Windows come from their last block to their first.
        """
        before = None
        for block in blocks:
            stop = trace.positions[block.block_hash] + 1
            if block.kind is SLIDING:
                if before != stop + 1:
                    yield 0, stop
                before = stop
            elif stop % self._layout.run_blocks == 0:
                yield stop - 1, stop

    def _put_global(self, request: Request, trace: RequestTrace, run: BlockRun) -> None:
        """Store a run if it isn't there yet; all its blocks are referenced by the request."""
        key = run.key(request.block_hashes)
        if key in self._known.of(request.tenant):
            return
        block_ids = self._global_blocks.find(request.block_hashes[run.start : run.stop])
        takes = self._store.takes(request.tenant, self._layout.num_bytes(run))
        if block_ids is not None and takes:
            self._put(request, trace, [key], GLOBAL, block_ids)

    def _put_sliding(
        self, request: Request, trace: RequestTrace, blocks: Sequence[StoredBlock]
    ) -> None:
        """Store the blocks that aren't there yet, each as a value."""
        new, known = {}, self._known.of(request.tenant)
        for block in blocks:
            position = trace.positions[block.block_hash]
            key = BlockRun(SLIDING, position, position + 1).key(request.block_hashes)
            if key not in known:
                new[key] = block.block_id
        num_bytes = len(new) * self._layout.block_bytes[SLIDING]
        if new and self._store.takes(request.tenant, num_bytes):
            self._put(request, trace, list(new), SLIDING, list(new.values()))

    def _put(
        self,
        request: Request,
        trace: RequestTrace,
        keys: Sequence[bytes],
        kind: AttentionKind,
        block_ids: Sequence[int],
    ) -> None:
        """Store blocks under a key each, or under the one key all of them as one value; or not,
        where there is no memory for the copy.
        """
        try:
            rows = self._copiers[kind].read(block_ids)
        except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors among them
            log.warning("%d blocks can't be copied for the KV store: %s", len(block_ids), error)
            return
        values = [rows] if len(keys) == 1 else rows.unbind()
        self._known.of(request.tenant).update(keys)
        trace.keys += keys
        self._writes.put(request.tenant, keys, values)

    def _trace(self, request: Request) -> RequestTrace:
        trace = self._traces.setdefault(request, RequestTrace())
        trace.extend(request.block_hashes)
        return trace

    def _fingerprint(self, fingerprint: str) -> bytes:
        kinds = sorted((kind.value, copier.layout) for kind, copier in self._copiers.items())
        facts = (fingerprint, self._block_size, self._layout.run_blocks, kinds)
        return blake2b(repr(facts).encode(), digest_size=16).digest()


def kv_tensors(runner: ModelRunner) -> dict[AttentionKind, list[Tensor]]:
    """What holds a runner's keys and values, each [num_blocks, ...], by kind."""
    tensors: dict[AttentionKind, list[Tensor]] = {}
    for layer in runner.model.spec.layers:
        if layer.owns_kv:
            tensors.setdefault(layer.kind, []).extend(runner.kv_tensors[layer.layer_idx].stored)
    return tensors
