"""The engine's slower tier of KV blocks, in Redis: `BlockStore` on top of `KVStore`.

Everything here happens between two steps and nothing waits. The store's threads look keys up and
read values into plain memory, and `load` copies from there into the KV tensors; `save` copies out
of them, and the store's writer sends that when it can.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cluster.kv_reader import Lookup, Read
from cluster.kv_store import KVStore, StoreStatus
from cluster.spec import AttentionKind
from deployments.kv_copies import BlockCopier, as_bytes
from deployments.kv_landing import Landing
from deployments.kv_traces import BlockIds, Trace
from deployments.kv_values import GLOBAL, SLIDING, BlockRun, ValueLayout
from engine.block_store import StoredBlock
from engine.prefix import NOTHING_FETCHED, Fetched
from engine.request import Request
from engine.runner import ModelRunner

READING_BYTES = 2 << 30  # of memory for what is read; a single request may take more
MAX_KNOWN = 1 << 16  # keys of a tenant

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
        self._prefill_s = prefill_s
        self.fingerprint = self._fingerprint(fingerprint)
        self._store = connect(self.fingerprint)
        device = next(iter(tensors.values()))[0].device
        self._landing = Landing(self._store, device)
        self._fetches: dict[Request, _Fetch] = {}
        self._traces: WeakKeyDictionary[Request, Trace] = WeakKeyDictionary()
        self._global_blocks = BlockIds()
        self._known: defaultdict[str, set[bytes]] = defaultdict(set)  # by tenant

    # For the engine

    def fetch(self, request: Request, num_cached_tokens: int) -> bool:
        start = num_cached_tokens // self._block_size
        stop = (request.num_tokens - 1) // self._block_size
        if start >= stop or not self._store.is_up:
            return False
        compute_s = self._compute_s(start, stop)
        if compute_s is None:
            compute_s = float("inf")
        elif compute_s < self._store.rates.latency_s:
            return False
        candidates = self._layout.candidates(start, stop)
        keys = [run.key(request.block_hashes) for run in candidates]
        self._fetches[request] = _Fetch(
            start,
            stop,
            candidates,
            keys,
            self._store.look_up(request.tenant, keys),
            compute_s,
        )
        return True

    def fetched(self, request: Request) -> Fetched | None:
        fetch = self._fetches.get(request)
        if fetch is None:
            return NOTHING_FETCHED
        if fetch.result is None:
            self._go_on(request, fetch)
        return fetch.result

    def load(self, request: Request, blocks: Sequence[StoredBlock]) -> bool:
        fetch, positions = self._fetches[request], self._trace(request).positions
        assert fetch.result and all(b.block_hash in fetch.result[b.kind] for b in blocks)
        try:
            for kind, memory in fetch.memory.items():
                chosen = [block for block in blocks if block.kind is kind]
                rows = [positions[b.block_hash] - fetch.first_block[kind] for b in chosen]
                self._copiers[kind].write([block.block_id for block in chosen], memory, rows)
        except torch.OutOfMemoryError:
            log.warning("The card has no memory left for blocks from the KV store.")
            return False
        self._global_blocks.update(blocks)
        return True

    def release(self, request: Request) -> None:
        fetch = self._fetches.pop(request, None)
        if fetch is not None and fetch.read is not None:
            fetch.read.cancel()

    def save(self, request: Request, blocks: Sequence[StoredBlock]) -> None:
        self._forget_lost()
        self._global_blocks.update(blocks)
        trace = self._trace(request)
        for start, stop in self._stretches(trace, blocks):
            for run in self._layout.global_runs(start, stop):
                self._put_global(request, trace, run)
            if start == 0:
                self._use(request, self._layout.needed(0, stop))
        self._put_sliding(request, trace, [b for b in blocks if b.kind is SLIDING])

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
        self._known[tenant].difference_update(keys)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was saved is written or given up; whether that came in time."""
        give_up_at = time.monotonic() + timeout_s
        is_landed = self._landing.flush(timeout_s)
        return self._store.flush(max(0.0, give_up_at - time.monotonic())) and is_landed

    @property
    def status(self) -> StoreStatus:
        """How Redis is doing, as last seen."""
        return self._store.status

    def close(self) -> None:
        """Give up what still waits to be written; `flush` first to keep it."""
        self._landing.close()
        self._store.close()

    # Fetching

    def _go_on(self, request: Request, fetch: _Fetch) -> None:
        """Take the next step towards a result, if it can be taken."""
        if fetch.give_up_at is None:  # now, since a long step may lie before the first question
            fetch.give_up_at = time.monotonic() + fetch.compute_s
        if fetch.wanted is None and fetch.lookup.done():
            self._decide(request, fetch)
        elif fetch.wanted is not None and fetch.read is None:
            self._read(request, fetch)
        elif fetch.wanted is not None and fetch.read is not None and fetch.read.done():
            fetch.result = self._arrived(request, fetch.wanted, fetch.read.result())
        if fetch.result is None and time.monotonic() > fetch.give_up_at:
            self._store.gave_up()
            if fetch.read is not None:
                fetch.read.cancel()
            fetch.result = NOTHING_FETCHED

    def _decide(self, request: Request, fetch: _Fetch) -> None:
        """Redis has answered what it has: fetch it, or compute."""
        known, found = self._known_of(request), set()
        known.difference_update(fetch.keys)
        sizes = fetch.lookup.result()
        for run, key, num_bytes in zip(fetch.candidates, fetch.keys, sizes, strict=True):
            if num_bytes is not None and num_bytes == self._layout.num_bytes(run):
                found.add(run)
                known.add(key)
        stop, fetch.wanted = self._layout.choose(found, fetch.start, fetch.stop)
        num_bytes = sum(map(self._layout.num_bytes, fetch.wanted))
        compute_s = self._compute_s(fetch.start, stop)
        if not fetch.wanted or not self._store.worth_fetching(num_bytes, compute_s):
            fetch.result = NOTHING_FETCHED
        else:
            self._read(request, fetch)

    def _read(self, request: Request, fetch: _Fetch) -> None:
        """Begin to read, unless others have the memory."""
        assert fetch.wanted is not None
        num_bytes = sum(map(self._layout.num_bytes, fetch.wanted))
        in_use = sum(m.nbytes for other in self._fetches.values() for m in other.memory.values())
        if in_use and in_use + num_bytes > READING_BYTES:
            return
        try:
            self._allocate(fetch, fetch.wanted)
        except (MemoryError, RuntimeError) as error:  # numpy's, and torch's of pinned memory
            log.warning("There is no memory for %d bytes from the KV store: %s", num_bytes, error)
            fetch.memory.clear()
            fetch.result = NOTHING_FETCHED
            return
        wanted = [
            (run.key(request.block_hashes), [as_bytes(fetch.rows(run))]) for run in fetch.wanted
        ]
        fetch.read = self._store.read(request.tenant, wanted)
        self._use(request, fetch.wanted)

    def _allocate(self, fetch: _Fetch, wanted: Sequence[BlockRun]) -> None:
        for kind, copier in self._copiers.items():
            if runs := [run for run in wanted if run.kind is kind]:
                fetch.first_block[kind] = runs[0].start
                fetch.memory[kind] = copier.memory(runs[-1].stop - runs[0].start)

    def _arrived(
        self, request: Request, runs: Sequence[BlockRun], is_ok: Sequence[bool]
    ) -> Fetched:
        hashes: dict[AttentionKind, set[bytes]] = {kind: set() for kind in self._copiers}
        for run, is_here in zip(runs, is_ok, strict=True):
            if is_here:
                hashes[run.kind].update(request.block_hashes[run.start : run.stop])
            else:
                self._known_of(request).discard(run.key(request.block_hashes))
        return hashes

    def _compute_s(self, start: int, stop: int) -> float | None:
        """How long it takes to compute the blocks [start, stop); None where nobody knows."""
        return self._prefill_s(start * self._block_size, stop * self._block_size)

    # Saving

    def _forget_lost(self) -> None:
        """What didn't get to Redis is to be written again."""
        for tenant, key in self._store.take_lost():
            self.forget(tenant, [key])

    def _stretches(self, trace: Trace, blocks: Sequence[StoredBlock]) -> Iterator[tuple[int, int]]:
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

    def _put_global(self, request: Request, trace: Trace, run: BlockRun) -> None:
        """Store a run if it isn't there yet; all its blocks are referenced by the request."""
        key = run.key(request.block_hashes)
        if key in self._known_of(request):
            return
        block_ids = self._global_blocks.find(request.block_hashes[run.start : run.stop])
        if block_ids is not None and self._store.takes(self._layout.num_bytes(run)):
            self._put(request, trace, [key], GLOBAL, block_ids)

    def _put_sliding(self, request: Request, trace: Trace, blocks: Sequence[StoredBlock]) -> None:
        """Store the blocks that aren't there yet, each as a value."""
        new, known = {}, self._known_of(request)
        for block in blocks:
            position = trace.positions[block.block_hash]
            key = BlockRun(SLIDING, position, position + 1).key(request.block_hashes)
            if key not in known:
                new[key] = block.block_id
        if new and self._store.takes(len(new) * self._layout.block_bytes[SLIDING]):
            self._put(request, trace, list(new), SLIDING, list(new.values()))

    def _put(
        self,
        request: Request,
        trace: Trace,
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
        self._known_of(request).update(keys)
        trace.keys += keys
        self._landing.put(request.tenant, keys, values)

    def _use(self, request: Request, runs: Sequence[BlockRun]) -> None:
        """Of a tenant's values those go first that nobody used for long: whoever needs the end of a
        prefix needs its beginning, and nobody the windows of earlier turns.
        """
        keys = [run.key(request.block_hashes) for run in runs]
        self._store.look_up(request.tenant, keys, is_use=True)

    def _known_of(self, request: Request) -> set[bytes]:
        """Keys of the tenant's values that are thought to be in Redis; a look-up corrects it."""
        known = self._known[request.tenant]
        if len(known) > MAX_KNOWN:
            known.clear()
        return known

    def _trace(self, request: Request) -> Trace:
        trace = self._traces.setdefault(request, Trace())
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


@dataclass(slots=True)
class _Fetch:
    """What is on its way for a request: looked up, then decided, then read, then a result."""

    start: int  # blocks that it has without the store
    stop: int  # blocks after which it could resume at most
    candidates: list[BlockRun]
    keys: list[bytes]  # of the candidates
    lookup: Lookup
    compute_s: float  # what computing takes, as far as known
    give_up_at: float | None = None  # on time.monotonic's clock: by then it would be computed
    wanted: list[BlockRun] | None = None
    memory: dict[AttentionKind, Tensor] = field(default_factory=dict)  # rows of blocks
    first_block: dict[AttentionKind, int] = field(default_factory=dict)  # in the first row
    read: Read | None = None
    result: Fetched | None = None

    def rows(self, run: BlockRun) -> Tensor:
        first = self.first_block[run.kind]
        return self.memory[run.kind][run.start - first : run.stop - first]
