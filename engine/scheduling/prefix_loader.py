"""PrefixLoader: starts requests behind the longest prefix that is cached or that a store brings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.cache.block_store import BlockStore
from engine.cache.kv_cache import KVCache
from engine.cache.prefix import Prefix
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
        self.stats: defaultdict[str, PrefixCacheStats] = defaultdict(PrefixCacheStats)  # by tenant

    def fetch(self, request: Request, cached: Prefix) -> bool:
        """Ask the store for more than the `cached` prefix; True if the request has to wait."""
        request.asks_store = False
        if self._store.fetch(request, cached.num_blocks * self._kv.block_size):
            request.state = RequestState.WAITING_FOR_BLOCKS
        return request.state is RequestState.WAITING_FOR_BLOCKS

    def poll(self, waiting: Iterable[Request]) -> None:
        """Let the requests whose blocks have come start.

        Also while the engine is full: a store goes on fetching when it is asked.
        """
        for request in waiting:
            is_fetching = request.state is RequestState.WAITING_FOR_BLOCKS
            if is_fetching and self._store.fetched(request) is not None:
                request.state = RequestState.WAITING

    def find(self, request: Request) -> list[Prefix]:
        """Return the prefixes that the request could start behind, the longest first.

        They are the one that counts the blocks that the store has fetched, if there are any, and
        the one in memory. Valid until a request starts, grows or is preempted.
        """
        in_memory = self._kv.find_prefix(request)
        fetched = self._store.fetched(request)
        return [self._kv.find_prefix(request, fetched), in_memory] if fetched else [in_memory]

    def start(self, request: Request, prefix: Prefix, found: Sequence[Prefix]) -> bool:
        """Give a request the blocks of a prefix, one of those `found`, behind which it fits.

        Where the store fails to load them, it starts behind what is in memory by now; False if
        it doesn't fit like that.
        """
        missing = self._kv.add(request, prefix)
        is_complete = not missing or self._store.load(request, missing)
        self._store.release(request)
        if not is_complete:
            self._kv.free(request)
            prefix = self._kv.find_prefix(request)
            if not self._kv.can_hold(request, prefix):
                return False
            self._kv.add(request, prefix)
        elif missing:
            self._kv.loaded(request, prefix.num_blocks)
        request.num_computed_tokens = prefix.num_blocks * self._kv.block_size
        if request.num_preemptions == 0:
            self._count(request, found[-1].num_blocks * self._kv.block_size)
        return True

    def _count(self, request: Request, num_tokens_in_memory: int) -> None:
        request.num_cached_tokens = request.num_computed_tokens
        request.num_fetched_tokens = max(0, request.num_cached_tokens - num_tokens_in_memory)
        stats = self.stats[request.tenant]
        stats.num_queries += 1
        stats.num_hits += request.num_cached_tokens > 0
        stats.num_cached_tokens += request.num_cached_tokens
