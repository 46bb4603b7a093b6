"""Starting a request: behind the longest prefix of it that is cached or that the store brings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from engine.cache.block_store import BlockStore
from engine.cache.kv_cache import KVCache
from engine.cache.prefix import NOTHING_FETCHED, Fetched
from engine.request import Request, RequestState


@dataclass(slots=True)
class PrefixCacheStats:
    """Counters of one tenant: requests that were started, and what they found cached."""

    num_queries: int = 0
    num_hits: int = 0
    num_cached_tokens: int = 0


class PrefixLoader:
    """Gives requests the blocks of their prefix, and has the store bring what memory lacks."""

    def __init__(self, kv: KVCache, store: BlockStore) -> None:
        self._kv, self._store = kv, store
        self.prefix_stats: defaultdict[str, PrefixCacheStats] = defaultdict(
            PrefixCacheStats
        )  # by tenant

    def ask_store(self, request: Request) -> bool:
        """Let it wait if the store brings more than what is cached."""
        cached = self._kv.find_prefix(request)
        if self._store.fetch(request, cached.num_blocks * self._kv.block_size):
            request.state = RequestState.WAITING_FOR_BLOCKS
        return request.state is RequestState.WAITING_FOR_BLOCKS

    def look_for_blocks(self, waiting: Iterable[Request]) -> None:
        """Ask the store how far it is, also while there is no room: it goes on when asked."""
        for request in waiting:
            is_waiting = request.state is RequestState.WAITING_FOR_BLOCKS
            if is_waiting and self._store.fetched(request) is not None:
                request.state = RequestState.WAITING

    def fits(self, request: Request, without: Collection[Request] = ()) -> bool:
        """Whether all its known tokens fit beside those of the running requests, or `without`
        some of these.

        Asking for the first chunk only would admit prompts that preempt each other halfway.
        """
        fetched = self._fetched(request)
        return self._fits(request, fetched, without) or (
            bool(fetched) and self._fits(request, NOTHING_FETCHED, without)
        )

    def start(self, request: Request) -> bool:
        """Give it the blocks of its prefix, those that are cached and those that were fetched, or
        only the former; false if it doesn't fit.
        """
        fetched = self._fetched(request)
        in_memory = self._kv.find_prefix(request)
        if not (
            self._start(request, fetched) or (fetched and self._start(request, NOTHING_FETCHED))
        ):
            return False
        self._store.release(request)
        if request.num_preemptions == 0:
            self._count_prefix(request, in_memory.num_blocks * self._kv.block_size)
        return True

    def _fetched(self, request: Request) -> Fetched:
        return self._store.fetched(request) or NOTHING_FETCHED

    def _fits(self, request: Request, fetched: Fetched, without: Collection[Request]) -> bool:
        return self._kv.can_hold(request, self._kv.find_prefix(request, fetched), without)

    def _start(self, request: Request, fetched: Fetched) -> bool:
        if not self._fits(request, fetched, ()):
            return False
        prefix = self._kv.find_prefix(request, fetched)
        lacking = self._kv.add(request, prefix)
        if lacking:
            if not self._store.load(request, lacking):
                self._kv.free(request)
                self._store.release(request)
                return False
            self._kv.loaded(request, prefix.num_blocks)
        request.num_computed_tokens = prefix.num_blocks * self._kv.block_size
        return True

    def _count_prefix(self, request: Request, num_in_memory: int) -> None:
        request.num_cached_tokens = request.num_computed_tokens
        request.num_fetched_tokens = max(0, request.num_cached_tokens - num_in_memory)
        use = self.prefix_stats[request.tenant]
        use.num_queries += 1
        use.num_hits += request.num_cached_tokens > 0
        use.num_cached_tokens += request.num_cached_tokens
