"""BlockPool: the blocks of one KV cache group, who holds them, and what is in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

NULL_BLOCK = 0  # stands in block tables where nothing is kept; never allocated, never written


class BlockPool:
    """Hands out block ids 1 to num_blocks - 1.

    Two counts say who holds a block: `ref_cnt`, the running requests that read it, and `keep_cnt`,
    the reasons for which the prefix index keeps it. So a block is in one of three states:

    - referenced: ref_cnt > 0;
    - cached: nobody reads it, the index keeps it, and whoever asks for its hash finds it;
    - unused: neither, in the queue from which `allocate` takes the one put there longest ago.

    A block whose keys and values are complete can be given its hash by `register`; it is found by
    that hash as long as somebody holds it.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, "one null block and at least one to give"
        self.num_blocks = num_blocks
        self._unused = deque(range(1, num_blocks))
        self._ref_cnt = [0] * num_blocks
        self._keep_cnt = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._num_referenced = 0

    @property
    def num_unused(self) -> int:
        """Blocks that `allocate` can give now."""
        return len(self._unused)

    @property
    def num_free(self) -> int:
        """Blocks that nobody reads: unused ones, and cached ones that can be evicted."""
        return self.num_blocks - 1 - self._num_referenced

    @property
    def num_used(self) -> int:
        return self._num_referenced

    @property
    def num_cached(self) -> int:
        return self.num_free - self.num_unused

    def ref_cnt(self, block_id: int) -> int:
        return self._ref_cnt[block_id]

    def keep_cnt(self, block_id: int) -> int:
        return self._keep_cnt[block_id]

    def find(self, block_hash: bytes) -> int | None:
        """The block that holds the keys and values of this hash."""
        return self._by_hash.get(block_hash)

    def block_of(self, block_hash: bytes) -> int:
        """The same, where somebody holds it."""
        return self._by_hash[block_hash]

    def registered(self) -> Iterable[tuple[bytes, int]]:
        """Every hash and its block."""
        return self._by_hash.items()

    def allocate(self, count: int) -> list[int]:
        """Take `count` unused blocks, one reference each. The caller has made room before."""
        assert count <= len(self._unused), f"{count} blocks asked for, {len(self._unused)} unused"
        block_ids = [self._unused.popleft() for _ in range(count)]
        for block_id in block_ids:
            self._ref_cnt[block_id] = 1
        self._num_referenced += count
        return block_ids

    def take(self, block_id: int) -> None:
        """One more reference of a block that `find` gave."""
        assert self._hashes[block_id] is not None
        self._num_referenced += self._ref_cnt[block_id] == 0
        self._ref_cnt[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Drop one reference of each block."""
        for block_id in block_ids:
            assert self._ref_cnt[block_id] > 0, f"block {block_id} is freed twice"
            self._ref_cnt[block_id] -= 1
            self._num_referenced -= self._ref_cnt[block_id] == 0
            self._reuse_if_unheld(block_id)

    def register(self, block_id: int, block_hash: bytes) -> None:
        """The block, which the caller holds, is full and computed; its hash names its content."""
        assert self._ref_cnt[block_id] > 0 and self._hashes[block_id] is None
        assert block_hash not in self._by_hash, "the same content in two blocks"
        self._hashes[block_id] = block_hash
        self._by_hash[block_hash] = block_id

    def keep(self, block_id: int) -> None:
        """One more reason to keep a registered block when nobody reads it."""
        assert self._hashes[block_id] is not None
        self._keep_cnt[block_id] += 1

    def unkeep(self, block_id: int) -> None:
        assert self._keep_cnt[block_id] > 0, f"block {block_id} isn't kept"
        self._keep_cnt[block_id] -= 1
        self._reuse_if_unheld(block_id)

    def _reuse_if_unheld(self, block_id: int) -> None:
        if self._ref_cnt[block_id] or self._keep_cnt[block_id]:
            return
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            self._hashes[block_id] = None
            del self._by_hash[block_hash]
        self._unused.append(block_id)

    def check_integrity(self) -> None:
        """Assert that each block but the null block is in one state, and that hashes agree."""
        unused = set(self._unused)
        assert len(unused) == len(self._unused), "a block stands twice in the queue"
        assert NULL_BLOCK not in unused and self._ref_cnt[NULL_BLOCK] == 0, "null block in use"
        for block_id in range(1, self.num_blocks):
            is_held = self._ref_cnt[block_id] > 0 or self._keep_cnt[block_id] > 0
            assert is_held != (block_id in unused), f"block {block_id} is lost or held while unused"
            assert is_held or self._hashes[block_id] is None, f"unused block {block_id} has a hash"
            assert self._hashes[block_id] is not None or self._keep_cnt[block_id] == 0
        named = {block_hash: i for i, block_hash in enumerate(self._hashes) if block_hash}
        assert named == self._by_hash, "hashes and blocks differ"
        assert self._num_referenced == sum(count > 0 for count in self._ref_cnt)
