"""The KV cache as the scheduler sees it: two groups of blocks, and each request's block tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cluster.errors import NotEnoughMemory
from cluster.spec import AttentionKind, KVLayout
from engine.cache.block_hash import BlockHasher
from engine.cache.block_store import StoredBlock
from engine.cache.kv_cache_group import KVCacheGroup
from engine.cache.prefix import NOTHING_FETCHED, Fetched, Prefix, PrefixIndex, PrefixNode
from engine.request import Owner, Request
from engine.spans import longest_step, uncut_blocks


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """Sizes of the paged KV cache.

    A group holds all layers of one attention kind that own keys and values. `num_blocks` counts
    the null block (block 0) and is 0 for a kind of which no layer owns any: such a kind has no
    group, and batches carry neither a block table nor a slot mapping for it.
    """

    block_size: int  # tokens per block
    num_blocks: Mapping[AttentionKind, int]
    block_bytes: Mapping[AttentionKind, int] = field(default_factory=dict)  # 1 where left out
    kv_layout: KVLayout = "values"


@dataclass(slots=True)
class _Running:
    """A request's row in the block tables, and how far its blocks are in the prefix index."""

    row: int
    node: PrefixNode | None = None  # of its last full block
    branch: int | None = None  # blocks after which it left what was cached


class KVCache:
    """The groups together, with one row of each for every running request, and the prefix index.

    Bookkeeping only: the tensors belong to the model runner. Without a hasher nothing is cached.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        *,
        sliding_window: int,
        max_num_seqs: int,
        max_model_len: int,
        hasher: BlockHasher | None = None,
        checkpoint_blocks: int = 0,
    ) -> None:
        """Raises NotEnoughMemory when a group can't hold what one request needs to go on."""
        self.block_size = config.block_size
        self._block_bytes = {kind: config.block_bytes.get(kind, 1) for kind in config.num_blocks}
        windows = {AttentionKind.GLOBAL: None, AttentionKind.SLIDING: sliding_window}
        self.groups = {
            kind: KVCacheGroup(
                num_blocks, config.block_size, windows[kind], max_num_seqs, max_model_len
            )
            for kind, num_blocks in config.num_blocks.items()
            if num_blocks > 0
        }
        sliding = self.groups.get(AttentionKind.SLIDING)
        self.index = PrefixIndex(
            {kind: group.pool for kind, group in self.groups.items()},
            self._block_bytes,
            0 if sliding is None else sliding.window_blocks or 0,
        )
        self._hasher = hasher
        self._checkpoint_blocks = checkpoint_blocks
        self._running: dict[Request, _Running] = {}
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
        return set(self._running)

    def row(self, request: Request) -> int:
        return self._running[request].row

    def held_bytes(self, request: Request) -> int:
        """Of the blocks that a request reads; others may read them, too."""
        running = self._running.get(request)
        if running is None:
            return 0
        held = {kind: group.num_held(running.row) for kind, group in self.groups.items()}
        return sum(num_blocks * self._block_bytes[kind] for kind, num_blocks in held.items())

    # Starting

    def find_prefix(self, request: Request, fetched: Fetched = NOTHING_FETCHED) -> Prefix:
        """Where the request can resume; at least one of its tokens is left to be computed."""
        if self._hasher is None:
            return Prefix(0, 0)
        self._hasher.extend(request)
        num_blocks = (request.num_tokens - 1) // self.block_size
        prefix = self.index.find(request.block_hashes[:num_blocks], fetched)
        while (num_blocks := self._uncut(request, prefix.num_blocks)) < prefix.num_blocks:
            prefix = self.index.find(request.block_hashes[:num_blocks], fetched)
        return prefix

    def can_hold(self, request: Request, prefix: Prefix, without: Collection[Request] = ()) -> bool:
        """Whether a request that resumes after the prefix fits into what is free now, beside what
        the running ones know and have no blocks for yet, or would fit `without` some of them.
        """
        hashes = request.block_hashes[: prefix.num_blocks]
        needed = request.num_tokens, longest_step(request.spans)
        for group in self.groups.values():
            freed = group.read_only_by(self.row(other) for other in without)
            num_taken = group.num_taken(hashes, *needed, freed)
            if num_taken + self._num_claimed(group, without) > group.pool.num_free + len(freed):
                return False
        return True

    def can_ever_hold(self, num_tokens: int, longest_step: int) -> bool:
        """Whether a request of so many tokens fits when it is alone."""
        return all(
            group.num_needed(num_tokens, longest_step) < group.pool.num_blocks
            for group in self.groups.values()
        )

    def _num_claimed(self, group: KVCacheGroup, without: Collection[Request]) -> int:
        return sum(
            group.num_claimed(running.row, request.num_tokens, longest_step(request.spans))
            for request, running in self._running.items()
            if request not in without
        )

    def add(self, request: Request, prefix: Prefix) -> list[StoredBlock]:
        """Give a request a row that begins with the prefix; `free` takes row and blocks back.

        Returns the blocks that aren't cached: to be filled from a store, then `loaded`.
        """
        assert request not in self._running
        hashes = request.block_hashes[: prefix.num_blocks]
        running = self._running[request] = _Running(self._free_rows.pop())
        if num_cached := min(prefix.num_cached, prefix.num_blocks):
            running.node = self.index.enter(hashes[num_cached - 1], request.owner)
        if prefix.num_cached > prefix.num_blocks:
            running.branch = prefix.num_cached
        # All that is cached is referenced before room is made: it mustn't be evicted for the rest.
        missing = {k: group.take_cached(running.row, hashes) for k, group in self.groups.items()}
        blocks = []
        for kind, entries in missing.items():
            self.index.make_room(kind, len(entries))
            block_ids = self.groups[kind].fill(running.row, entries)
            pairs = zip(entries, block_ids, strict=True)
            blocks += [StoredBlock(kind, b, hashes[i]) for i, b in pairs]
        return blocks

    def loaded(self, request: Request, num_blocks: int) -> None:
        """All blocks of the request's prefix are filled; others can resume there too."""
        running, hashes = self._running[request], request.block_hashes[:num_blocks]
        for group in self.groups.values():
            group.register(running.row, 0, hashes)
        for block_hash in hashes[self._num_indexed(request) :]:
            running.node = self.index.advance(running.node, block_hash, request.owner)
        self.checkpoint(request)

    # Running

    def max_new_tokens(self, request: Request) -> int:
        """How many tokens more the request could compute with the blocks that are free now."""
        row = self.row(request)
        limit = min(group.max_tokens(row) for group in self.groups.values())
        return limit - request.num_computed_tokens

    def allocate(self, request: Request, num_new_tokens: int) -> None:
        """Blocks for the next `num_new_tokens` (at most `max_new_tokens`) of the request."""
        row, num_tokens = self.row(request), request.num_computed_tokens + num_new_tokens
        for kind, group in self.groups.items():
            self.index.make_room(kind, group.num_missing(row, num_tokens))
            group.allocate(row, num_tokens)

    def commit(self, request: Request) -> list[StoredBlock]:
        """The request's tokens up to num_computed_tokens are computed: index the blocks that are
        full now, keep the windows of checkpoints, free what later tokens don't see.

        Returns the blocks that a slower tier may save, all of them still referenced.
        """
        blocks = []
        if self._hasher is not None:
            self._hasher.extend(request)
            first = self._num_indexed(request)
            for index in range(first, request.num_computed_tokens // self.block_size):
                blocks += self._index_block(request, index)
                if self._is_checkpoint(request, index + 1):
                    blocks += self.checkpoint(request)
        for group in self.groups.values():
            group.leave_window(self.row(request), request.num_computed_tokens)
        return blocks

    def checkpoint(self, request: Request) -> list[StoredBlock]:
        """Keep the window at the last full block, so that others can resume there.

        Returns the window's blocks, still referenced; none where it was kept before.
        """
        node = self._running[request].node
        if node is None or self._uncut(request, node.depth) < node.depth:
            return []
        was_kept = node.is_kept
        self.index.keep(node, request.owner)
        if was_kept:
            return []
        sliding = self.groups.get(AttentionKind.SLIDING)
        if sliding is None:
            return []
        return [
            StoredBlock(AttentionKind.SLIDING, sliding.pool.block_of(block_hash), block_hash)
            for block_hash in self.index.window(node)
        ]

    def forget(self, request: Request) -> None:
        """Nobody shall resume from what this request has read or computed."""
        node = self._running[request].node
        if node is not None:
            self.index.forget(node)

    def drop(self, owner: Owner) -> int:
        """Keep nothing for `owner` alone; returns the bytes that nothing is kept in any more."""
        before = self._kept_bytes()
        self.index.drop(owner)
        return before - self._kept_bytes()

    def free(self, request: Request) -> None:
        running = self._running.pop(request)
        for group in self.groups.values():
            group.free(running.row)
        if running.node is not None:
            self.index.leave(running.node)
        self._free_rows.append(running.row)

    def _kept_bytes(self) -> int:
        return sum(
            (group.pool.num_blocks - group.pool.num_unused) * self._block_bytes[kind]
            for kind, group in self.groups.items()
        )

    def _num_indexed(self, request: Request) -> int:
        node = self._running[request].node
        return 0 if node is None else node.depth

    def _index_block(self, request: Request, index: int) -> list[StoredBlock]:
        """Let others find a full block; returned if it is a global one that is new."""
        running, block_hash = self._running[request], request.block_hashes[index]
        is_new = block_hash not in self.index
        for group in self.groups.values():
            group.register(running.row, index, [block_hash])
        running.node = self.index.advance(running.node, block_hash, request.owner)
        if not is_new or AttentionKind.GLOBAL not in self.groups:
            return []
        block_id = self.groups[AttentionKind.GLOBAL].pool.block_of(block_hash)
        return [StoredBlock(AttentionKind.GLOBAL, block_id, block_hash)]

    def _uncut(self, request: Request, num_blocks: int) -> int:
        return uncut_blocks(request.spans, num_blocks, self.block_size)

    def _is_checkpoint(self, request: Request, num_blocks: int) -> bool:
        """The end of the prompt (as far as the same prompt could resume), where the request left
        what was cached (others may follow it up to there), and every so many blocks.
        """
        every, branch = self._checkpoint_blocks, self._running[request].branch
        return (
            num_blocks == self._uncut(request, (len(request.prompt_ids) - 1) // self.block_size)
            or (branch is not None and num_blocks == self._uncut(request, branch))
            or (every > 0 and num_blocks % every == 0)
        )

    def check_integrity(self) -> None:
        """Assert that no block and no row is leaked or held twice, and that the index agrees."""
        for group in self.groups.values():
            group.check_integrity()
        nodes = [running.node for running in self._running.values()]
        self.index.check_integrity([node for node in nodes if node is not None])
        rows = sorted([*(running.row for running in self._running.values()), *self._free_rows])
        assert rows == list(range(len(rows))), "a row is leaked or held twice"
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
