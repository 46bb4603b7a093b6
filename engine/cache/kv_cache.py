"""KVCache: the paged KV cache as the scheduler sees it, with each request's block tables.

- group: all layers of one attention kind, global or sliding, that own keys and values. It has its
  own pool of blocks and its own block tables.
- block: the keys and values of `block_size` positions in all layers of a group.
- block table: a row of block ids for each running request; entry i holds the positions
  [i * block_size, (i + 1) * block_size).
- null block: id 0, which stands in a table where no block is held.
- prefix: full blocks that are cached, after which a request can resume.
- checkpoint: the end of a prefix whose sliding window is pinned, so that requests can resume there.

An example: blocks of 4 positions, a sliding window of 5, a request of 14 tokens. A query at
position 13 reads positions 9 to 13 in sliding layers, so that two blocks have gone back:

    positions    0-3   4-7   8-11  12-13
    global      [B1,   B2,   B3,   B4]
    sliding     [NULL, NULL, B7,   B8]

The request has a checkpoint after 3 blocks, which pins B7. Another one with the same first 12
tokens resumes there and shares what it reads, with two references each of B1, B2, B3 and B7:

    global      [B1,   B2,   B3,   B5]
    sliding     [NULL, NULL, B7,   B9]
"""

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
    block_bytes: Mapping[AttentionKind, int] = field(default_factory=dict)  # 1 if left out
    kv_layout: KVLayout = "values"


@dataclass(slots=True)
class _Running:
    """A request's row in the block tables, and its place in the prefix index."""

    row: int
    node: PrefixNode | None = None  # its last full block
    branch: int | None = None  # after so many blocks its tokens differ from what was cached


class KVCache:
    """All groups, with a row of each for every running request, and the prefix index.

    It does the bookkeeping only: the tensors belong to the model runner.
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
        """Allocate the tables.

        Args:
            config: Sizes of the groups.
            sliding_window: Positions that a query reads in sliding layers, its own included.
            max_num_seqs: Rows of the block tables.
            max_model_len: Tokens of the longest request.
            hasher: Names blocks by their content; None: no prefix is cached.
            checkpoint_blocks: Leave a checkpoint every so many blocks; 0: only where prompts and
                requests end, and where prompts part.

        Raises:
            NotEnoughMemory: A group can't hold the blocks that one request needs at once.
        """
        self.block_size = config.block_size
        self._block_bytes = {kind: config.block_bytes.get(kind, 1) for kind in config.num_blocks}
        windows = {AttentionKind.GLOBAL: None, AttentionKind.SLIDING: sliding_window}
        self.groups = {
            kind: KVCacheGroup(
                num_blocks,
                block_size=config.block_size,
                window=windows[kind],
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
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
        """Requests that can still be added."""
        return len(self._free_rows)

    @property
    def max_request_tokens(self) -> int | None:
        """Tokens of the longest request that fits alone; None if there is no global group."""
        group = self.groups.get(AttentionKind.GLOBAL)
        return None if group is None else (group.pool.num_blocks - 1) * self.block_size

    @property
    def requests(self) -> set[Request]:
        """Requests that have a row."""
        return set(self._running)

    def row(self, request: Request) -> int:
        """Return the request's row in the block tables of all groups."""
        return self._running[request].row

    def held_bytes(self, request: Request) -> int:
        """Return the bytes of the blocks that a request references, shared ones included."""
        running = self._running.get(request)
        if running is None:
            return 0
        held = {kind: group.num_held(running.row) for kind, group in self.groups.items()}
        return sum(num_blocks * self._block_bytes[kind] for kind, num_blocks in held.items())

    # Starting

    def find_prefix(self, request: Request, fetched: Fetched = NOTHING_FETCHED) -> Prefix:
        """Return where the request can resume, with at least one of its tokens left to compute."""
        if self._hasher is None:
            return Prefix(0, 0)
        self._hasher.extend(request)
        num_blocks = (request.num_tokens - 1) // self.block_size
        prefix = self.index.find(request.block_hashes[:num_blocks], fetched)
        while (num_blocks := self._uncut(request, prefix.num_blocks)) < prefix.num_blocks:
            prefix = self.index.find(request.block_hashes[:num_blocks], fetched)
        return prefix

    def can_hold(self, request: Request, prefix: Prefix, without: Collection[Request] = ()) -> bool:
        """True if all blocks of a request that resumes after the prefix fit.

        They have to fit into the free blocks, less those that the running requests still need for
        tokens that they know already. With `without`, as if some of these had been preempted.
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
        """True if a request of so many tokens fits when it is alone."""
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

        Returns:
            Blocks of the prefix that aren't in memory; call `loaded` once a store has filled them.
        """
        assert request not in self._running
        hashes = request.block_hashes[: prefix.num_blocks]
        running = self._running[request] = _Running(self._free_rows.pop())
        if num_cached := min(prefix.num_cached, prefix.num_blocks):
            running.node = self.index.enter(hashes[num_cached - 1], request.owner)
        if prefix.num_cached > prefix.num_blocks:
            running.branch = prefix.num_cached
        # Reference what is cached before making room, so that it isn't evicted for the rest.
        missing = {k: group.take_cached(running.row, hashes) for k, group in self.groups.items()}
        blocks = []
        for kind, entries in missing.items():
            self.index.make_room(kind, len(entries))
            block_ids = self.groups[kind].fill(running.row, entries)
            pairs = zip(entries, block_ids, strict=True)
            blocks += [StoredBlock(kind, b, hashes[i]) for i, b in pairs]
        return blocks

    def loaded(self, request: Request, num_blocks: int) -> None:
        """Index the request's prefix, whose blocks are all filled now."""
        running, hashes = self._running[request], request.block_hashes[:num_blocks]
        for group in self.groups.values():
            group.register(running.row, 0, hashes)
        for block_hash in hashes[self._num_indexed(request) :]:
            running.node = self.index.advance(running.node, block_hash, request.owner)
        self.checkpoint(request)

    # Running

    def max_new_tokens(self, request: Request) -> int:
        """Return how many more tokens of the request the free blocks can hold."""
        row = self.row(request)
        limit = min(group.max_tokens(row) for group in self.groups.values())
        return limit - request.num_computed_tokens

    def allocate(self, request: Request, num_new_tokens: int) -> None:
        """Allocate blocks for the request's next tokens, at most `max_new_tokens`."""
        row, num_tokens = self.row(request), request.num_computed_tokens + num_new_tokens
        for kind, group in self.groups.items():
            self.index.make_room(kind, group.num_missing(row, num_tokens))
            group.allocate(row, num_tokens)

    def commit(self, request: Request) -> list[StoredBlock]:
        """Index the blocks that are full now that tokens up to num_computed_tokens are computed.

        Leaves checkpoints, and frees the blocks that windows have moved past.

        Returns:
            Blocks that a slower tier may save, all of them still referenced.
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
        """Make the last full block a checkpoint, so that others can resume there.

        Returns:
            The window's blocks, still referenced; none if it was a checkpoint before.
        """
        node = self._running[request].node
        if node is None or self._uncut(request, node.depth) < node.depth:
            return []
        was_checkpoint = node.is_checkpoint
        self.index.add_checkpoint(node, request.owner)
        if was_checkpoint:
            return []
        sliding = self.groups.get(AttentionKind.SLIDING)
        if sliding is None:
            return []
        return [
            StoredBlock(AttentionKind.SLIDING, sliding.pool.block_of(block_hash), block_hash)
            for block_hash in self.index.window(node)
        ]

    def forget(self, request: Request) -> None:
        """Keep others from resuming from what this request has read or computed."""
        node = self._running[request].node
        if node is not None:
            self.index.forget(node)

    def drop(self, owner: Owner) -> int:
        """Remove what is cached for `owner` alone; returns the bytes that this frees."""
        before = self._held_bytes()
        self.index.drop(owner)
        return before - self._held_bytes()

    def free(self, request: Request) -> None:
        """Take a request's row and its references back."""
        running = self._running.pop(request)
        for group in self.groups.values():
            group.free(running.row)
        if running.node is not None:
            self.index.leave(running.node)
        self._free_rows.append(running.row)

    def _held_bytes(self) -> int:
        return sum(
            (group.pool.num_blocks - group.pool.num_unused) * self._block_bytes[kind]
            for kind, group in self.groups.items()
        )

    def _num_indexed(self, request: Request) -> int:
        node = self._running[request].node
        return 0 if node is None else node.depth

    def _index_block(self, request: Request, index: int) -> list[StoredBlock]:
        """Index a full block; it is returned if it is a global one that is new."""
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
        """True at the last block that the same prompt could resume after, where the request's
        tokens began to differ from what was cached (others may share them up to there), and every
        `checkpoint_blocks` blocks.
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
