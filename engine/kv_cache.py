"""The KV cache as the scheduler sees it: two groups of blocks, and each request's block tables."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cluster.errors import NotEnoughMemory
from cluster.spec import AttentionKind, ModelSpec
from engine.block_pool import NULL_BLOCK, BlockPool
from engine.request import Request

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """Sizes of the paged KV cache.

    A group holds all layers of one attention kind that own keys and values. `num_blocks` counts
    the null block (block 0) and is 0 for a kind of which no layer owns any: such a kind has no
    group, and batches carry neither a block table nor a slot mapping for it.
    """

    block_size: int  # tokens per block
    num_blocks: Mapping[AttentionKind, int]


class KVCacheGroup:
    """Blocks of one attention kind and, for each row (a running request), its block table.

    Entry i of a table holds positions [i * block_size, (i + 1) * block_size). With a window, a
    query at position p reads [p - window + 1, p]: entries wholly before that go back to the pool
    and become the null block, so live entries are [_begin, _end) of each row.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        window: int | None,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self.block_size = block_size
        self.window = window
        self.pool = BlockPool(num_blocks)
        width = _cdiv(max_model_len, block_size)
        self.block_tables: IntArray = np.full((max_num_seqs, width), NULL_BLOCK, dtype=np.int64)
        self._begin = [0] * max_num_seqs
        self._end = [0] * max_num_seqs

    def num_held(self, row: int) -> int:
        return self._end[row] - self._begin[row]

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that a request of `num_tokens` needs at once, in the smallest of steps."""
        if self.window is None:
            return _cdiv(num_tokens, self.block_size)
        return _sliding_blocks(self.window, 1, self.block_size, num_tokens)

    def num_missing(self, row: int, num_tokens: int) -> int:
        """Blocks that the row still needs to hold `num_tokens` tokens."""
        return max(0, _cdiv(num_tokens, self.block_size) - self._end[row])

    def max_tokens(self, row: int) -> int:
        """The length up to which the row can grow with the blocks that are free now."""
        return (self._end[row] + self.pool.num_free) * self.block_size

    def allocate(self, row: int, num_tokens: int) -> None:
        """Grow the row's table to hold `num_tokens` tokens; at most `max_tokens(row)`."""
        missing = self.num_missing(row, num_tokens)
        if missing:
            end = self._end[row]
            self.block_tables[row, end : end + missing] = self.pool.allocate(missing)
            self._end[row] = end + missing

    def leave_window(self, row: int, position: int) -> None:
        """Free the blocks that no query at `position` or later reads."""
        if self.window is None:
            return
        first = max(0, position - self.window + 1) // self.block_size
        self._drop(row, min(first, self._end[row]))

    def free(self, row: int) -> None:
        self._drop(row, self._end[row])
        self._begin[row] = self._end[row] = 0

    def _drop(self, row: int, stop: int) -> None:
        begin = self._begin[row]
        if begin < stop:
            self.pool.free(self.block_tables[row, begin:stop].tolist())
            self.block_tables[row, begin:stop] = NULL_BLOCK
            self._begin[row] = stop

    def check_integrity(self) -> None:
        """Assert that pool and tables agree: a block stands in tables once per reference."""
        self.pool.check_integrity()
        live = self.block_tables[self.block_tables != NULL_BLOCK]
        counts = np.bincount(live, minlength=self.pool.num_blocks)
        references = [self.pool.ref_cnt(block_id) for block_id in range(self.pool.num_blocks)]
        assert counts.tolist() == references, "a block is leaked or stands in a table unreferenced"
        for row, (begin, end) in enumerate(zip(self._begin, self._end, strict=True)):
            is_live = self.block_tables[row] != NULL_BLOCK
            assert is_live[begin:end].all() and is_live.sum() == end - begin, f"row {row} has holes"


class KVCache:
    """The groups together, with one row of each for every running request.

    Bookkeeping only: the tensors belong to the model runner.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        *,
        sliding_window: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        """Raises NotEnoughMemory when a group can't hold what one request needs to go on."""
        self.block_size = config.block_size
        windows = {AttentionKind.GLOBAL: None, AttentionKind.SLIDING: sliding_window}
        self.groups = {
            kind: KVCacheGroup(
                num_blocks, config.block_size, windows[kind], max_num_seqs, max_model_len
            )
            for kind, num_blocks in config.num_blocks.items()
            if num_blocks > 0
        }
        self._rows: dict[Request, int] = {}
        self._free_rows = list(reversed(range(max_num_seqs)))
        self._check_sizes(max_model_len)

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def max_request_tokens(self) -> int | None:
        """Tokens of the longest request that fits alone; None where no group grows with it."""
        group = self.groups.get(AttentionKind.GLOBAL)
        return None if group is None else (group.pool.num_blocks - 1) * self.block_size

    @property
    def requests(self) -> set[Request]:
        return set(self._rows)

    def row(self, request: Request) -> int:
        return self._rows[request]

    def add(self, request: Request) -> None:
        """Give a request a row, without blocks yet. `free` takes the row and all blocks back."""
        assert request not in self._rows
        self._rows[request] = self._free_rows.pop()

    def free(self, request: Request) -> None:
        row = self._rows.pop(request)
        for group in self.groups.values():
            group.free(row)
        self._free_rows.append(row)

    def max_new_tokens(self, request: Request) -> int:
        """How many tokens more the request could compute with the blocks that are free now."""
        row = self._rows[request]
        limit = min(group.max_tokens(row) for group in self.groups.values())
        return limit - request.num_computed_tokens

    def allocate(self, request: Request, num_new_tokens: int) -> None:
        """Blocks for the next `num_new_tokens` (at most `max_new_tokens`) of the request."""
        row = self._rows[request]
        for group in self.groups.values():
            group.allocate(row, request.num_computed_tokens + num_new_tokens)

    def leave_window(self, request: Request) -> None:
        """Free what the next token of the request, and later ones, no longer see."""
        for group in self.groups.values():
            group.leave_window(self._rows[request], request.num_computed_tokens)

    def can_hold(self, num_tokens: int) -> bool:
        """Whether a new request of `num_tokens` fits into the blocks that are free now."""
        return all(g.num_needed(num_tokens) <= g.pool.num_free for g in self.groups.values())

    def check_integrity(self) -> None:
        """Assert that no block and no row is leaked or held twice."""
        for group in self.groups.values():
            group.check_integrity()
        max_num_seqs = len(self._rows) + len(self._free_rows)
        rows = sorted([*self._rows.values(), *self._free_rows])
        assert rows == list(range(max_num_seqs)), "a row is leaked or held twice"
        for row in self._free_rows:
            assert all(group.num_held(row) == 0 for group in self.groups.values())

    def _check_sizes(self, max_model_len: int) -> None:
        for kind, group in self.groups.items():
            num_needed = 1 if group.window is None else group.num_needed(max_model_len)
            if group.pool.num_blocks - 1 < num_needed:
                raise NotEnoughMemory(
                    f"The {kind.value} KV cache has {group.pool.num_blocks} blocks of "
                    f"{self.block_size} tokens; one request needs {num_needed} and the null block."
                )


def kv_bytes_per_block(
    spec: ModelSpec, kind: AttentionKind, block_size: int, dtype: torch.dtype
) -> int:
    """Bytes of one block over all layers of `kind` that own keys and values; 0 if none does."""
    elements = sum(
        2 * block_size * layer.num_kv_heads * layer.head_dim
        for layer in spec.layers
        if layer.kind is kind and layer.owns_kv
    )
    return elements * dtype.itemsize


def min_kv_bytes(
    spec: ModelSpec,
    max_model_len: int,
    *,
    dtype: torch.dtype,
    block_size: int = 16,
    max_num_batched_tokens: int = 512,
) -> int:
    """Bytes that the KV cache of one request of `max_model_len` tokens takes, null blocks too."""
    num_global = 1 + _cdiv(max_model_len, block_size)
    per_step, per_seq = _sliding_needs(spec, max_model_len, block_size, max_num_batched_tokens)
    return num_global * kv_bytes_per_block(spec, AttentionKind.GLOBAL, block_size, dtype) + (
        per_step + per_seq
    ) * kv_bytes_per_block(spec, AttentionKind.SLIDING, block_size, dtype)


def longest_context(
    spec: ModelSpec,
    kv_bytes: int,
    *,
    dtype: torch.dtype,
    block_size: int = 16,
    max_num_batched_tokens: int = 512,
) -> int:
    """The most tokens, up to the model's context, that one request can have in `kv_bytes`; at
    least 1, whether it fits or not.
    """

    def needed(max_model_len: int) -> int:
        return min_kv_bytes(
            spec,
            max_model_len,
            dtype=dtype,
            block_size=block_size,
            max_num_batched_tokens=max_num_batched_tokens,
        )

    lengths = range(1, spec.max_position_embeddings + 1)
    return max(1, bisect_right(lengths, kv_bytes, key=needed))


def size_kv_cache(
    spec: ModelSpec,
    kv_bytes: int,
    max_model_len: int,
    *,
    dtype: torch.dtype,
    block_size: int = 16,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 512,
) -> KVCacheConfig:
    """Share `kv_bytes` between the groups.

    The sliding group gets what max_num_seqs requests can use at once (fewer where memory is short),
    the global group all the rest, and at least one request of max_model_len tokens.
    Raises NotEnoughMemory when not even one such request fits.
    """
    bytes_of = {kind: kv_bytes_per_block(spec, kind, block_size, dtype) for kind in AttentionKind}
    global_bytes, sliding_bytes = bytes_of[AttentionKind.GLOBAL], bytes_of[AttentionKind.SLIDING]
    min_global = 1 + _cdiv(max_model_len, block_size)
    per_step, per_seq = _sliding_needs(spec, max_model_len, block_size, max_num_batched_tokens)
    left_for_sliding = kv_bytes - min_global * global_bytes
    num_seqs = max_num_seqs
    if sliding_bytes:
        num_seqs = min(num_seqs, (left_for_sliding // sliding_bytes - per_step) // per_seq)
    if left_for_sliding < 0 or num_seqs < 1:
        needed = min_kv_bytes(
            spec,
            max_model_len,
            dtype=dtype,
            block_size=block_size,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        raise NotEnoughMemory(
            f"The KV cache of one request of {max_model_len} tokens takes {needed / 1e6:.1f} MB; "
            f"{kv_bytes / 1e6:.1f} MB are free. Lower engine.max_model_len or raise "
            "engine.kv_bytes."
        )
    num_sliding = per_step + num_seqs * per_seq if sliding_bytes else 0
    num_global = (kv_bytes - num_sliding * sliding_bytes) // global_bytes if global_bytes else 0
    # More than every request at full length could never be used.
    num_global = min(num_global, 1 + max_num_seqs * (min_global - 1))
    return KVCacheConfig(
        block_size, {AttentionKind.GLOBAL: num_global, AttentionKind.SLIDING: num_sliding}
    )


def _sliding_needs(
    spec: ModelSpec, max_model_len: int, block_size: int, max_num_batched_tokens: int
) -> tuple[int, int]:
    """Sliding blocks for a step's tokens, and for each request.

    Windows are left behind after each step, and a step computes max_num_batched_tokens in all: a
    window (and a block's edge) per request, and the step's tokens once.
    """
    per_step = 1 + _cdiv(min(max_num_batched_tokens, max_model_len), block_size)
    return per_step, 1 + _sliding_blocks(spec.sliding_window, 1, block_size, max_model_len)


def _sliding_blocks(window: int, chunk: int, block_size: int, max_model_len: int) -> int:
    """The most blocks that `chunk` queries in a row touch: window - 1 + chunk keys, unaligned."""
    return min(_cdiv(window + chunk - 2, block_size) + 1, _cdiv(max_model_len, block_size))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
