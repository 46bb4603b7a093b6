"""BlockPool: the blocks of one KV cache group, what holds them, and what is in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

NULL_BLOCK = 0  # fills block tables where no block is held; never allocated, never written


class BlockPool:
    """Allocates block ids 1 to num_blocks - 1.

    Two counts hold a block: `ref_cnt`, the running requests that read it, and `pin_cnt`, the pins
    of the prefix index. So a block is in one of three states:

    - referenced: ref_cnt > 0;
    - cached: no request reads it, but it is pinned and found by its hash; eviction unpins it;
    - unused: neither, in the queue from which `allocate` takes the one freed longest ago.

    `register` gives a block whose keys and values are complete its hash. The block is found by that
    hash as long as it is referenced or pinned.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, "one null block and at least one to give"
        self.num_blocks = num_blocks
        self._unused = deque(range(1, num_blocks))
        self._ref_cnt = [0] * num_blocks
        self._pin_cnt = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._num_referenced = 0

    @property
    def num_unused(self) -> int:
        """Blocks that `allocate` can take now."""
        return len(self._unused)

    @property
    def num_free(self) -> int:
        """Blocks that no request reads: unused ones, and cached ones, which can be evicted."""
        return self.num_blocks - 1 - self._num_referenced

    @property
    def num_used(self) -> int:
        """Blocks that requests read."""
        return self._num_referenced

    @property
    def num_cached(self) -> int:
        """Blocks that no request reads, but that can be found by their hash."""
        return self.num_free - self.num_unused

    def ref_cnt(self, block_id: int) -> int:
        """Return how many running requests read a block."""
        return self._ref_cnt[block_id]

    def pin_cnt(self, block_id: int) -> int:
        """Return how many pins a block has."""
        return self._pin_cnt[block_id]

    def find(self, block_hash: bytes) -> int | None:
        """Return the block that holds the keys and values of a hash; None if none does."""
        return self._by_hash.get(block_hash)

    def block_of(self, block_hash: bytes) -> int:
        """Return the block of a hash that is known to be held."""
        return self._by_hash[block_hash]

    def registered(self) -> Iterable[tuple[bytes, int]]:
        """Return every hash that can be found, with its block."""
        return self._by_hash.items()

    def allocate(self, count: int) -> list[int]:
        """Take `count` unused blocks, with one reference each. The caller has made room before."""
        assert count <= len(self._unused), f"{count} blocks asked for, {len(self._unused)} unused"
        block_ids = [self._unused.popleft() for _ in range(count)]
        for block_id in block_ids:
            self._ref_cnt[block_id] = 1
        self._num_referenced += count
        return block_ids

    def take(self, block_id: int) -> None:
        """Add a reference to a block that `find` returned."""
        assert self._hashes[block_id] is not None
        self._num_referenced += self._ref_cnt[block_id] == 0
        self._ref_cnt[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Drop one reference of each of these blocks."""
        for block_id in block_ids:
            assert self._ref_cnt[block_id] > 0, f"block {block_id} is freed twice"
            self._ref_cnt[block_id] -= 1
            self._num_referenced -= self._ref_cnt[block_id] == 0
            self._reuse_if_free(block_id)

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Name the content of a block, which the caller references and has filled."""
        assert self._ref_cnt[block_id] > 0 and self._hashes[block_id] is None
        assert block_hash not in self._by_hash, "the same content in two blocks"
        self._hashes[block_id] = block_hash
        self._by_hash[block_hash] = block_id

    def pin(self, block_id: int) -> None:
        """Add a pin to a registered block: it stays cached when no request reads it."""
        assert self._hashes[block_id] is not None
        self._pin_cnt[block_id] += 1

    def unpin(self, block_id: int) -> None:
        """Drop a pin."""
        assert self._pin_cnt[block_id] > 0, f"block {block_id} isn't pinned"
        self._pin_cnt[block_id] -= 1
        self._reuse_if_free(block_id)

    def _reuse_if_free(self, block_id: int) -> None:
        if self._ref_cnt[block_id] or self._pin_cnt[block_id]:
            return
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            self._hashes[block_id] = None
            del self._by_hash[block_hash]
        self._unused.append(block_id)

    def check_integrity(self) -> None:
        """Assert that each block but the null block is in one state, and that hashes agree."""
        unused = set(self._unused)
        assert len(unused) == len(self._unused), "a block is twice in the queue"
        assert NULL_BLOCK not in unused and self._ref_cnt[NULL_BLOCK] == 0, "null block in use"
        for block_id in range(1, self.num_blocks):
            is_held = self._ref_cnt[block_id] > 0 or self._pin_cnt[block_id] > 0
            assert is_held != (block_id in unused), f"block {block_id} is lost or held while unused"
            assert is_held or self._hashes[block_id] is None, f"unused block {block_id} has a hash"
            assert self._hashes[block_id] is not None or self._pin_cnt[block_id] == 0
        named = {block_hash: i for i, block_hash in enumerate(self._hashes) if block_hash}
        assert named == self._by_hash, "hashes and blocks differ"
        assert self._num_referenced == sum(count > 0 for count in self._ref_cnt)
