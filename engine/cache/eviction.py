"""Eviction: the priority of a checkpoint, and the queue that evicts the lowest first."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


def eviction_priority(last_used: float, num_blocks_saved: int, num_bytes: int) -> float:
    """Return a checkpoint's priority; the lowest is evicted first.

    GreedyDual-Size (Cao and Irani, 1997): a checkpoint is worth the blocks that need not be
    computed again, per byte that its eviction frees. One that frees nothing, because others pin its
    whole window, is worth nothing: requests can resume there without it. The eviction clock is the
    priority of the last one evicted; a checkpoint that is used gets the clock's value on top, so
    that unused ones lose against it in time.

    Args:
        last_used: The eviction clock when the checkpoint was last used.
        num_blocks_saved: Blocks that a request needs not compute thanks to it.
        num_bytes: Bytes that its eviction frees.
    """
    return last_used + (num_blocks_saved / num_bytes if num_bytes else 0)


class EvictionQueue(Generic[T]):
    """A queue of checkpoints, the lowest priority first.

    While a checkpoint is queued its priority rises (it is used, or the one before it is evicted),
    or it stops being a candidate; both are checked only when it comes up. If a priority falls (a
    neighbour that shared its window is gone), it comes up late. O(log n) amortised.
    """

    def __init__(
        self,
        priority: Callable[[T], float],
        is_candidate: Callable[[T], bool],
    ) -> None:
        self._priority = priority
        self._is_candidate = is_candidate
        self._heap: list[tuple[float, int, T]] = []
        self._members: set[T] = set()  # nodes in the heap, each once
        self._order = count()  # breaks ties: first in, first out
        self._next_sweep = 64

    def __contains__(self, node: T) -> bool:
        return node in self._members

    def add(self, node: T) -> None:
        """Queue a node; one that is queued already is ignored."""
        if node in self._members:
            return
        if len(self._heap) >= self._next_sweep:
            self._sweep()
        self._members.add(node)
        heapq.heappush(self._heap, (self._priority(node), next(self._order), node))

    def pop(self) -> tuple[float, T]:
        """Remove the candidate with the lowest priority; the caller knows that there is one."""
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
        """Drop nodes that are no candidates, so that the heap can't grow without evictions."""
        self._heap = [entry for entry in self._heap if self._is_candidate(entry[2])]
        heapq.heapify(self._heap)
        self._members = {node for _, _, node in self._heap}
        self._next_sweep = 2 * len(self._heap) + 64
