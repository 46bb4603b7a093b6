"""ActiveRequests: the waiting and the running requests, and the way from one list to the other."""

from __future__ import annotations

from collections.abc import Sequence

from engine.cache.block_store import BlockStore, StoredBlock
from engine.cache.kv_cache import KVCache
from engine.request import FinishReason, Request, RequestState


class ActiveRequests:
    """All requests that are not finished. Running ones hold a row and blocks of the KV cache."""

    def __init__(self, kv: KVCache, store: BlockStore) -> None:
        self._kv, self._store = kv, store
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        # Running requests that were started ahead of blocked ones, and those that they passed
        self.backfilled: dict[Request, list[Request]] = {}
        self.num_preemptions = 0

    def started(self, request: Request) -> None:
        """Move a waiting request, which has got its row and its prefix, to the running ones."""
        self.waiting.remove(request)
        self.running.append(request)
        request.state = RequestState.RUNNING

    def preempt(self, request: Request) -> None:
        """Return a running request to the head of the queue and free its blocks.

        It keeps its tokens, and resumes from what is cached by then.
        """
        self.running.remove(request)
        self._release(request, is_sound=True)
        self.waiting.insert(0, request)
        request.state = RequestState.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.asks_store = True
        self.num_preemptions += 1

    def finish(self, request: Request, reason: FinishReason, *, is_sound: bool) -> None:
        """End a request in any state. Unless it is sound, what it computed leaves the cache."""
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
            if not is_sound:
                self._kv.forget(request)
                self._store.discard(request)
            self._release(request, is_sound=is_sound)
        else:
            self.withdraw(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def withdraw(self, request: Request) -> None:
        """Drop a request that isn't running; one that was never queued is ignored."""
        if request in self.waiting:
            self.waiting.remove(request)
        self._store.release(request)

    def commit(self, request: Request, num_computed_tokens: int) -> None:
        """Record a running request's progress, and offer the blocks that are full now to others."""
        request.num_computed_tokens = num_computed_tokens
        self._save(request, self._kv.commit(request))

    def _release(self, request: Request, *, is_sound: bool) -> None:
        if is_sound:
            self._save(request, self._kv.checkpoint(request))
        self._kv.free(request)
        self.backfilled.pop(request, None)

    def _save(self, request: Request, blocks: Sequence[StoredBlock]) -> None:
        if blocks:
            self._store.save(request, blocks)

    def check_integrity(self) -> None:
        """Assert that states, lists and blocks agree, and that no block is held when idle."""
        self._kv.check_integrity()
        assert all(r.state is RequestState.RUNNING for r in self.running)
        queued = (RequestState.WAITING, RequestState.WAITING_FOR_BLOCKS)
        assert all(r.state in queued and r.num_computed_tokens == 0 for r in self.waiting)
        assert set(self.running) == self._kv.requests, "rows and running requests differ"
        assert self.backfilled.keys() <= self._kv.requests, "a backfilled request doesn't run"
