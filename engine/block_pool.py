"""BlockPool: the blocks of one KV cache group, their ref counts and the queue of free ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

NULL_BLOCK = 0  # stands in block tables where nothing is kept; never allocated, never written


class BlockPool:
    """Hands out block ids 1 to num_blocks - 1.

    `allocate` gives a block a reference, `free` takes it away; a block without references goes to
    the end of the free queue, so that the one freed longest ago is reused first (what a prefix
    index will want, as it will the counts: until then they are 0 or 1).
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, "one null block and at least one to give"
        self.num_blocks = num_blocks
        self._free = deque(range(1, num_blocks))
        self._ref_cnt = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    def ref_cnt(self, block_id: int) -> int:
        return self._ref_cnt[block_id]

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, one reference each. The caller has looked at `num_free` before."""
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free"
        block_ids = [self._free.popleft() for _ in range(count)]
        for block_id in block_ids:
            self._ref_cnt[block_id] = 1
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Drop one reference of each block."""
        for block_id in block_ids:
            assert self._ref_cnt[block_id] > 0, f"block {block_id} is freed twice"
            self._ref_cnt[block_id] -= 1
            if self._ref_cnt[block_id] == 0:
                self._free.append(block_id)

    def check_integrity(self) -> None:
        """Assert that every block but the null block is either free or referenced, never both."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block stands twice in the free queue"
        assert NULL_BLOCK not in free and self._ref_cnt[NULL_BLOCK] == 0, "the null block is in use"
        for block_id in range(1, self.num_blocks):
            is_free = self._ref_cnt[block_id] == 0
            assert is_free == (block_id in free), f"block {block_id} is lost or used while free"
