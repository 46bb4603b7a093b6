"""What is on its way from Redis for requests that wait: looked up, decided, read into memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster.spec import AttentionKind
from cluster.store.kv_store import KVStore
from cluster.store.reader import PendingLookup, PendingRead
from deployments.decoder.kv.copies import BlockCopier, as_bytes
from deployments.decoder.kv.traces import KnownKeys
from deployments.decoder.kv.values import BlockRun, ValueLayout
from engine.cache.block_store import StoredBlock
from engine.cache.prefix import NOTHING_FETCHED, Fetched
from engine.request import Request

READING_BYTES = 2 << 30  # of memory for what is read; a single request may take more

log = logging.getLogger(__name__)


class Fetches:
    """The fetching half of `KVBlockStore`; nothing here waits either."""

    def __init__(
        self,
        store: KVStore,
        layout: ValueLayout,
        copiers: Mapping[AttentionKind, BlockCopier],
        known: KnownKeys,
        block_size: int,
        prefill_s: Callable[[int, int], float | None],
    ) -> None:
        self._store = store
        self._layout = layout
        self._copiers = copiers
        self._known = known
        self._block_size = block_size
        self._prefill_s = prefill_s
        self._fetches: dict[Request, _Fetch] = {}

    def begin(self, request: Request, num_cached_tokens: int) -> bool:
        """Ask what Redis has of a request's prompt; false where that isn't worth a wait."""
        start = num_cached_tokens // self._block_size
        stop = (request.num_tokens - 1) // self._block_size
        if start >= stop or not self._store.is_up:
            return False
        compute_s = self._compute_s(start, stop)
        if compute_s is None:
            compute_s = float("inf")
        elif compute_s < self._store.rates.latency_s:
            return False
        found: set[BlockRun] = set()
        questions = self._layout.questions(found, start, stop)
        fetch = self._fetches[request] = _Fetch(start, stop, compute_s, found, questions)
        self._ask(request, fetch)
        return True

    def result(self, request: Request) -> Fetched | None:
        """The blocks that have come, by kind; None while they are on their way."""
        fetch = self._fetches.get(request)
        if fetch is None:
            return NOTHING_FETCHED
        if fetch.result is None:
            self._go_on(request, fetch)
        return fetch.result

    def write(
        self, request: Request, blocks: Sequence[StoredBlock], positions: Mapping[bytes, int]
    ) -> bool:
        """Fill blocks with what has come, given the positions of all by hash; false if there was
        no memory for that.
        """
        fetch = self._fetches[request]
        assert fetch.result and all(b.block_hash in fetch.result[b.kind] for b in blocks)
        try:
            for kind, memory in fetch.memory.items():
                chosen = [block for block in blocks if block.kind is kind]
                rows = [positions[b.block_hash] - fetch.first_block[kind] for b in chosen]
                self._copiers[kind].write([block.block_id for block in chosen], memory, rows)
        except torch.OutOfMemoryError:
            log.warning("The card has no memory left for blocks from the KV store.")
            return False
        return True

    def end(self, request: Request) -> None:
        """Nobody needs any more what came, or still comes, for a request."""
        fetch = self._fetches.pop(request, None)
        if fetch is not None and fetch.read is not None:
            fetch.read.cancel()

    def _go_on(self, request: Request, fetch: _Fetch) -> None:
        """Take the next step towards a result, if it can be taken."""
        if fetch.give_up_at is None:  # now, since a long step may lie before the first question
            fetch.give_up_at = time.monotonic() + fetch.compute_s
        if fetch.wanted is None and fetch.lookup is not None and fetch.lookup.done():
            self._note_found(request, fetch, fetch.lookup.result())
            if not self._ask(request, fetch):
                self._decide(request, fetch)
        elif fetch.wanted is not None and fetch.read is None:
            self._read(request, fetch)
        elif fetch.wanted is not None and fetch.read is not None and fetch.read.done():
            fetch.result = self._arrived(request, fetch.wanted, fetch.read.result())
        if fetch.result is None and time.monotonic() > fetch.give_up_at:
            self._store.count_given_up()
            if fetch.read is not None:
                fetch.read.cancel()
            fetch.result = NOTHING_FETCHED

    def _ask(self, request: Request, fetch: _Fetch) -> bool:
        """Ask what of the next runs Redis has; false where nothing is left to ask."""
        runs = next(fetch.questions, None)
        if runs is not None:
            fetch.asked = {run.key(request.block_hashes): run for run in runs}
            fetch.lookup = self._store.look_up(request.tenant, list(fetch.asked))
        return runs is not None

    def _note_found(self, request: Request, fetch: _Fetch, sizes: Sequence[int | None]) -> None:
        known = self._known.of(request.tenant)
        for (key, run), num_bytes in zip(fetch.asked.items(), sizes, strict=True):
            if num_bytes is not None and num_bytes == self._layout.num_bytes(run):
                fetch.found.add(run)
                known.add(key)
            else:
                known.discard(key)

    def _decide(self, request: Request, fetch: _Fetch) -> None:
        """Redis has answered what it has: fetch it, or compute."""
        stop, fetch.wanted = self._layout.choose(fetch.found, fetch.start, fetch.stop)
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
        touch_values(self._store, request, fetch.wanted)

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
                self._known.of(request.tenant).discard(run.key(request.block_hashes))
        return hashes

    def _compute_s(self, start: int, stop: int) -> float | None:
        """How long it takes to compute the blocks [start, stop); None where nobody knows."""
        return self._prefill_s(start * self._block_size, stop * self._block_size)


def touch_values(store: KVStore, request: Request, runs: Iterable[BlockRun]) -> None:
    """Refresh the LRU time of every value that a request needs.

    So a prefix's head outlives its tail, and windows of earlier turns are evicted first.
    """
    store.look_up(request.tenant, [run.key(request.block_hashes) for run in runs], touch=True)


@dataclass(slots=True)
class _Fetch:
    """What is on its way for a request: looked up, then decided, then read, then a result."""

    start: int  # blocks that it has without the store
    stop: int  # blocks after which it could resume at most
    compute_s: float  # what computing takes, as far as known
    found: set[BlockRun]
    questions: Iterator[list[BlockRun]]  # still to be asked
    asked: dict[bytes, BlockRun] = field(default_factory=dict)  # the last one, by key
    lookup: PendingLookup | None = None
    give_up_at: float | None = None  # on time.monotonic's clock: by then it would be computed
    wanted: list[BlockRun] | None = None
    memory: dict[AttentionKind, Tensor] = field(default_factory=dict)  # rows of blocks
    first_block: dict[AttentionKind, int] = field(default_factory=dict)  # in the first row
    read: PendingRead | None = None
    result: Fetched | None = None

    def rows(self, run: BlockRun) -> Tensor:
        first = self.first_block[run.kind]
        return self.memory[run.kind][run.start - first : run.stop - first]
