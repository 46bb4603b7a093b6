"""KVCacheGroup: the block tables of the running requests over the pool of one attention kind."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from engine.cache.block_pool import NULL_BLOCK, BlockPool

IntArray = npt.NDArray[np.int64]


class KVCacheGroup:
    """The blocks of one attention kind, and a block table for each row (a running request).

    Entry i of a table holds positions [i * block_size, (i + 1) * block_size). With a window, a
    query at position p reads [p - window + 1, p]: blocks wholly before that are freed and their
    entries become the null block, so that the live entries of a row are [_begin, _end).
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        block_size: int,
        window: int | None,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self.block_size = block_size
        self.window = window
        self.window_blocks = None if window is None else cdiv(window - 1, block_size)
        self.pool = BlockPool(num_blocks)
        width = cdiv(max_model_len, block_size)
        self.block_tables: IntArray = np.full((max_num_seqs, width), NULL_BLOCK, dtype=np.int64)
        self._begin = [0] * max_num_seqs
        self._end = [0] * max_num_seqs

    def num_held(self, row: int) -> int:
        """Return how many blocks the row references."""
        return self._end[row] - self._begin[row]

    def first_read(self, num_blocks: int) -> int:
        """Return the first block that a request reads if it resumes after `num_blocks` blocks."""
        return 0 if self.window_blocks is None else max(0, num_blocks - self.window_blocks)

    def num_needed(self, num_tokens: int, longest_step: int = 1) -> int:
        """Return how many blocks a request of `num_tokens` needs at once.

        `longest_step` are the most tokens that some step has to compute together.
        """
        num_blocks = cdiv(num_tokens, self.block_size)
        if self.window_blocks is None:
            return num_blocks
        return min(num_blocks, self.window_blocks + 1 + cdiv(longest_step - 1, self.block_size))

    def read_only_by(self, rows: Iterable[int]) -> set[int]:
        """Return the blocks that no other row reads."""
        readers: Counter[int] = Counter()
        for row in rows:
            readers.update(self.block_tables[row, self._begin[row] : self._end[row]].tolist())
        return {block_id for block_id, num in readers.items() if num == self.pool.ref_cnt(block_id)}

    def num_taken(
        self,
        block_hashes: Sequence[bytes],
        num_tokens: int,
        longest_step: int = 1,
        freed: Collection[int] = (),
    ) -> int:
        """Return how many free blocks a new request takes at once.

        Args:
            block_hashes: The prefix that it resumes after.
            num_tokens: Its tokens.
            longest_step: The most tokens that some step has to compute together.
            freed: Blocks to count as free, beside the cached ones that no request reads.
        """

        def is_read(index: int) -> bool:
            block_id = self.pool.find(block_hashes[index])
            return (
                block_id is not None and self.pool.ref_cnt(block_id) > 0 and block_id not in freed
            )

        num_blocks = len(block_hashes)
        if self.window is None:  # a request that reads a block reads all before it
            num_read = bisect_left(range(num_blocks), True, key=lambda index: not is_read(index))
        else:
            num_read = sum(map(is_read, range(self.first_read(num_blocks), num_blocks)))
        return self.num_needed(num_tokens, longest_step) - num_read

    def num_missing(self, row: int, num_tokens: int) -> int:
        """Return how many more blocks the row needs to hold `num_tokens` tokens."""
        return max(0, cdiv(num_tokens, self.block_size) - self._end[row])

    def num_claimed(self, row: int, num_tokens: int, longest_step: int) -> int:
        """Return how many more blocks the row needs at once to get to `num_tokens` tokens.

        That is fewer than `num_missing` with a window, which frees a block as it moves to the next.
        """
        at_once = max(1, self.num_needed(num_tokens, longest_step) - self.num_held(row))
        return min(self.num_missing(row, num_tokens), at_once)

    def max_tokens(self, row: int) -> int:
        """Return the number of tokens up to which the row can grow into the free blocks."""
        return (self._end[row] + self.pool.num_free) * self.block_size

    def allocate(self, row: int, num_tokens: int) -> None:
        """Grow the row's table to hold `num_tokens` tokens; at most `max_tokens(row)`."""
        missing = self.num_missing(row, num_tokens)
        if missing:
            end = self._end[row]
            self.block_tables[row, end : end + missing] = self.pool.allocate(missing)
            self._end[row] = end + missing

    def take_cached(self, row: int, block_hashes: Sequence[bytes]) -> list[int]:
        """Begin an empty row after the blocks of these hashes, referencing those it reads.

        Returns:
            Entries whose blocks the pool doesn't have, to be filled.
        """
        begin, end = self.first_read(len(block_hashes)), len(block_hashes)
        self._begin[row], self._end[row] = begin, end
        missing = []
        for index in range(begin, end):
            block_id = self.pool.find(block_hashes[index])
            if block_id is None:
                missing.append(index)
            else:
                self.pool.take(block_id)
                self.block_tables[row, index] = block_id
        return missing

    def fill(self, row: int, missing: Sequence[int]) -> list[int]:
        """Allocate new blocks for the entries that `take_cached` found missing."""
        block_ids = self.pool.allocate(len(missing))
        self.block_tables[row, list(missing)] = block_ids
        return block_ids

    def register(self, row: int, first: int, block_hashes: Sequence[bytes]) -> None:
        """Name the content of the row's blocks from `first` on, which are full and computed.

        Entries before its window are skipped. If another block has the same content already, the
        row takes that one and frees its own.
        """
        num_left = max(0, self._begin[row] - first)
        begin, end = first + num_left, first + len(block_hashes)
        own = self.block_tables[row, begin:end].tolist()
        for index, block_id, block_hash in zip(
            range(begin, end), own, block_hashes[num_left:], strict=True
        ):
            shared = self.pool.find(block_hash)
            if shared is None:
                self.pool.register(block_id, block_hash)
            elif shared != block_id:
                self.pool.take(shared)
                self.pool.free([block_id])
                self.block_tables[row, index] = shared

    def leave_window(self, row: int, position: int) -> None:
        """Free the blocks before the window of a query in `position`'s block or later.

        A query at `position` itself may need one block less, but if the request ends here, the
        window at its last full block becomes a checkpoint.
        """
        self._drop(row, min(self.first_read(position // self.block_size), self._end[row]))

    def free(self, row: int) -> None:
        """Drop all of the row's references; it is empty then."""
        self._drop(row, self._end[row])
        self._begin[row] = self._end[row] = 0

    def _drop(self, row: int, stop: int) -> None:
        begin = self._begin[row]
        if begin < stop:
            self.pool.free(self.block_tables[row, begin:stop].tolist())
            self.block_tables[row, begin:stop] = NULL_BLOCK
            self._begin[row] = stop

    def check_integrity(self) -> None:
        """Assert that pool and tables agree: a block is in tables once per reference."""
        self.pool.check_integrity()
        live = self.block_tables[self.block_tables != NULL_BLOCK]
        counts = np.bincount(live, minlength=self.pool.num_blocks)
        references = [self.pool.ref_cnt(block_id) for block_id in range(self.pool.num_blocks)]
        assert counts.tolist() == references, "a block is leaked, or in a table without a reference"
        for row, (begin, end) in enumerate(zip(self._begin, self._end, strict=True)):
            is_live = self.block_tables[row] != NULL_BLOCK
            assert is_live[begin:end].all() and is_live.sum() == end - begin, f"row {row} has holes"


def sliding_blocks(window: int, chunk: int, block_size: int, max_model_len: int) -> int:
    """Return the most blocks that `chunk` successive queries read: window - 1 + chunk keys."""
    return min(cdiv(window + chunk - 2, block_size) + 1, cdiv(max_model_len, block_size))


def cdiv(a: int, b: int) -> int:
    """Divide two integers and round up."""
    return -(-a // b)
