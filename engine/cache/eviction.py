"""Which kept checkpoint goes first: the policy, and the queue that follows it."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


def eviction_priority(last_used: float, num_blocks_saved: int, num_bytes: int) -> float:
    """What goes first has the lowest: GreedyDual-Size (Cao and Irani, 1997).

    A checkpoint is worth the blocks that need not be computed again, per byte that goes with it.
    One with which nothing goes, because others keep its whole window, is worth nothing: requests
    can resume there without it. The clock, which stands at the priority of the last one evicted,
    is added when a checkpoint is used, so that worth outlives use only for a while.
    """
    return last_used + (num_blocks_saved / num_bytes if num_bytes else 0)


class EvictionQueue(Generic[T]):
    """Checkpoints, the lowest priority first.

    Priorities rise while a checkpoint waits (it is used, or the one before it is evicted) and
    candidates stop being ones; both are looked at only when an entry comes up. Where a priority
    sinks (a neighbour that shared its window is gone) the entry comes up late. O(log n) amortised.
    """

    def __init__(
        self,
        priority: Callable[[T], float],
        is_candidate: Callable[[T], bool],
    ) -> None:
        self._priority = priority
        self._is_candidate = is_candidate
        self._heap: list[tuple[float, int, T]] = []
        self._members: set[T] = set()  # those in the heap, each once
        self._order = count()  # among equals the first to come goes first
        self._next_sweep = 64

    def __contains__(self, node: T) -> bool:
        return node in self._members

    def add(self, node: T) -> None:
        if node in self._members:
            return
        if len(self._heap) >= self._next_sweep:
            self._sweep()
        self._members.add(node)
        heapq.heappush(self._heap, (self._priority(node), next(self._order), node))

    def pop(self) -> tuple[float, T]:
        """The next to go. The caller knows that there is one."""
        while True:
            priority, order, node = heapq.heappop(self._heap)
            if not self._is_candidate(node):
                self._members.remove(node)
            elif (now := self._priority(node)) > priority:
                heapq.heappush(self._heap, (now, order, node))
            else:
                self._members.remove(node)
                return priority, node

    def _sweep(self) -> None:
        """Leave out those that are no candidates, so that the heap can't grow without evictions."""
        self._heap = [entry for entry in self._heap if self._is_candidate(entry[2])]
        heapq.heapify(self._heap)
        self._members = {node for _, _, node in self._heap}
        self._next_sweep = 2 * len(self._heap) + 64
