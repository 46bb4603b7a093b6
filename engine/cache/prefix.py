"""The prefix index: which prefixes are kept, and where a request can resume.

A prefix can be resumed only where both KV groups are there: every global block before it, and the
sliding window that ends at it. Global blocks are shared by all that follows them, but each window
is as large as the next one, so windows are kept at checkpoints only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.spec import AttentionKind
from engine.cache.block_pool import BlockPool
from engine.cache.eviction import EvictionQueue, eviction_priority
from engine.request import Owner

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING

Fetched = Mapping[AttentionKind, Collection[bytes]]  # hashes of blocks that a slower tier can fill
NOTHING_FETCHED: Fetched = {}


@dataclass(frozen=True, slots=True)
class Prefix:
    """What of a request need not be computed."""

    num_blocks: int  # full blocks after which it can resume
    num_cached: int  # blocks of it in the index, with or without a window at their end


@dataclass(slots=True, eq=False)
class PrefixNode:
    """A full, computed block as the end of a prefix.

    A node lives while a checkpoint is kept at it or behind it, or a running request has come to it
    or past it; so whoever is in the index has all its ancestors there.
    """

    block_hash: bytes
    parent: PrefixNode | None
    depth: int  # blocks of the prefix, this one included
    num_children: int = 0
    num_users: int = 0  # running requests of which this is the last full block
    is_kept: bool = False  # a checkpoint: requests resume here, the window that ends here is kept
    kept_before: PrefixNode | None = None  # a checkpoint among its ancestors, when it became one
    last_used: float = 0.0  # the eviction clock then
    owners: set[Owner] = field(default_factory=set)  # of a checkpoint: who left it or resumed here

    @property
    def is_idle_leaf(self) -> bool:
        return self.num_children == 0 and self.num_users == 0

    def ancestors(self) -> Iterator[PrefixNode]:
        """Itself first, the first block of the prefix last."""
        node: PrefixNode | None = self
        while node is not None:
            yield node
            node = node.parent


class PrefixIndex:
    """The kept prefixes of all tenants, as a tree of full blocks over the pools of both groups.

    A checkpoint keeps its window's sliding blocks, each node its global block. Where a window
    needs no block (no sliding layers, or a window of one token), every block is a checkpoint.
    """

    def __init__(
        self,
        pools: Mapping[AttentionKind, BlockPool],
        block_bytes: Mapping[AttentionKind, int],
        window_blocks: int,
    ) -> None:
        self._pools = pools
        self._global_pool = pools.get(GLOBAL)
        self._block_bytes = block_bytes
        self._window_blocks = window_blocks
        self._nodes: dict[bytes, PrefixNode] = {}
        self._queues = {
            GLOBAL: EvictionQueue(self._priority, lambda node: node.is_kept and node.is_idle_leaf),
            SLIDING: EvictionQueue(self._priority, lambda node: node.is_kept),
        }
        self._clock = 0.0
        self.num_evicted = dict.fromkeys(pools, 0)  # counter, blocks

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._nodes

    def find(self, block_hashes: Sequence[bytes], fetched: Fetched = NOTHING_FETCHED) -> Prefix:
        """The longest prefix whose blocks are all cached or fetched, in every group."""
        num_blocks = len(block_hashes)
        num_cached = bisect_left(
            range(num_blocks), True, key=lambda i: block_hashes[i] not in self._nodes
        )
        global_ones, end = fetched.get(GLOBAL, ()), num_cached
        while end < num_blocks and block_hashes[end] in global_ones:
            end += 1
        while (hole := self._hole(block_hashes, end, fetched.get(SLIDING, ()))) is not None:
            end = hole  # no window may contain it
        return Prefix(end, num_cached)

    def _hole(self, hashes: Sequence[bytes], end: int, fetched: Collection[bytes]) -> int | None:
        """The first block that the window which ends after `end` blocks lacks."""
        for i in range(max(0, end - self._window_blocks), end):
            if self._pools[SLIDING].find(hashes[i]) is None and hashes[i] not in fetched:
                return i
        return None

    # Running requests: each stands at one node, the last full block that it has computed

    def enter(self, block_hash: bytes, owner: Owner = None) -> PrefixNode:
        """A request resumes from what is cached up to this block."""
        node = self._nodes[block_hash]
        node.num_users += 1
        for ancestor in node.ancestors():
            if ancestor.is_kept:
                ancestor.last_used = self._clock
                ancestor.owners.add(owner)
                break
        return node

    def advance(
        self, node: PrefixNode | None, block_hash: bytes, owner: Owner = None
    ) -> PrefixNode:
        """A request at `node` (None: at the start) holds the next block, full and registered."""
        child = self._nodes.get(block_hash)
        if child is None:
            child = PrefixNode(block_hash, node, 1 if node is None else node.depth + 1)
            self._nodes[block_hash] = child
            if self._global_pool is not None:
                self._global_pool.keep(self._global_pool.block_of(block_hash))
            if node is not None:
                node.num_children += 1
        child.num_users += 1
        if node is not None:
            node.num_users -= 1
        if self._window_blocks == 0:
            self.keep(child, owner)
        return child

    def leave(self, node: PrefixNode) -> None:
        """A request is gone, and its references with it."""
        node.num_users -= 1
        self._prune(node)

    # Checkpoints

    def window(self, node: PrefixNode) -> list[bytes]:
        """Hashes of the sliding blocks that a request which resumes at `node` reads."""
        nodes = zip(range(self._window_blocks), node.ancestors(), strict=False)
        return [ancestor.block_hash for _, ancestor in nodes]

    def keep(self, node: PrefixNode, owner: Owner = None) -> None:
        """Make `node` a checkpoint; its window's sliding blocks are registered and held."""
        node.last_used = self._clock
        node.owners.add(owner)
        if node.is_kept:
            return
        node.is_kept = True
        node.kept_before = next((n for n in node.ancestors() if n.is_kept and n is not node), None)
        self._keep_blocks(SLIDING, self.window(node))
        self._offer(node)

    def forget(self, node: PrefixNode) -> None:
        """Keep nothing of the prefix that ends at `node`: what is in it can't be trusted."""
        for ancestor in node.ancestors():
            if ancestor.is_kept:
                self._drop(ancestor)

    def drop(self, owner: Owner) -> None:
        """Keep nothing for `owner` alone; checkpoints that others have used too stay theirs."""
        for node in [node for node in self._nodes.values() if owner in node.owners]:
            node.owners.remove(owner)
            if not node.owners:
                self._drop(node)

    def kept_blocks(self) -> dict[Owner, int]:
        """After how many blocks, at most, each owner can resume."""
        deepest: dict[Owner, int] = {}
        for node in self._nodes.values():
            for owner in node.owners:
                deepest[owner] = max(deepest.get(owner, 0), node.depth)
        return deepest

    def make_room(self, kind: AttentionKind, num_blocks: int) -> None:
        """Evict until the pool can allocate `num_blocks`, of which it has that many free."""
        if self._pools[kind].num_unused >= num_blocks:
            return
        before = {k: pool.num_unused for k, pool in self._pools.items()}
        while self._pools[kind].num_unused < num_blocks:
            priority, node = self._queues[kind].pop()
            self._clock = max(self._clock, priority)
            self._drop(node)
        for k, pool in self._pools.items():
            self.num_evicted[k] += pool.num_unused - before[k]

    def _drop(self, node: PrefixNode) -> None:
        """No checkpoint any more. Blocks that are of no use without it are unused at once."""
        node.is_kept = False
        node.owners.clear()
        self._unkeep_blocks(SLIDING, self.window(node))
        fallback = self._kept_before(node)
        if fallback is not None:  # whoever would have used `node` will use this one
            fallback.last_used = max(fallback.last_used, node.last_used)
        self._prune(node)

    def _prune(self, node: PrefixNode | None) -> None:
        """Remove it and its ancestors as far as nobody needs them."""
        while node is not None and node.is_idle_leaf and not node.is_kept:
            del self._nodes[node.block_hash]
            self._unkeep_blocks(GLOBAL, [node.block_hash])
            node = node.parent
            if node is not None:
                node.num_children -= 1
        if node is not None and node.is_kept:
            self._offer(node)

    def _offer(self, node: PrefixNode) -> None:
        """Evicting a checkpoint frees its window; its global blocks only where nothing follows."""
        if self._window_blocks:
            self._queues[SLIDING].add(node)
        if node.is_idle_leaf:
            self._queues[GLOBAL].add(node)

    def _priority(self, node: PrefixNode) -> float:
        fallback = self._kept_before(node)
        num_saved = node.depth - (0 if fallback is None else fallback.depth)
        num_bytes = self._num_own(node) * self._block_bytes.get(SLIDING, 0)
        if node.is_idle_leaf:
            num_bytes += num_saved * self._block_bytes.get(GLOBAL, 0)
        return eviction_priority(node.last_used, num_saved, num_bytes)

    def _num_own(self, node: PrefixNode) -> int:
        """Blocks of its window that no other checkpoint keeps."""
        if self._window_blocks == 0:
            return 0
        pool = self._pools[SLIDING]
        return sum(pool.keep_cnt(pool.block_of(h)) == 1 for h in self.window(node))

    def _kept_before(self, node: PrefixNode) -> PrefixNode | None:
        """Where a request would resume without `node`."""
        before = node.kept_before
        while before is not None and not before.is_kept:
            before = before.kept_before
        node.kept_before = before  # so that no dropped one is passed twice
        return before

    def _keep_blocks(self, kind: AttentionKind, hashes: Iterable[bytes]) -> None:
        if (pool := self._pools.get(kind)) is not None:
            for block_hash in hashes:
                pool.keep(pool.block_of(block_hash))

    def _unkeep_blocks(self, kind: AttentionKind, hashes: Iterable[bytes]) -> None:
        if (pool := self._pools.get(kind)) is not None:
            for block_hash in hashes:
                pool.unkeep(pool.block_of(block_hash))

    def check_integrity(self, users: Iterable[PrefixNode]) -> None:
        """Assert that the tree, its counts and the pools agree; `users` are the requests' nodes."""
        nodes = self._nodes.values()
        expected = {node: [0, 0] for node in nodes}  # children, users
        windows: dict[bytes, int] = {}
        for node in nodes:
            if node.parent is not None:
                expected[node.parent][0] += 1
            for block_hash in self.window(node) if node.is_kept else ():
                windows[block_hash] = windows.get(block_hash, 0) + 1
        for node in users:
            expected[node][1] += 1
        for node, counts in expected.items():
            assert counts == [node.num_children, node.num_users], "wrong counts in the prefix tree"
            assert node.is_kept or not node.is_idle_leaf, "a node that nobody needs"
            assert node.is_kept == bool(node.owners), "a checkpoint of nobody's"
            assert not node.is_kept or node in self._queues[SLIDING] or not self._window_blocks
            assert not (node.is_kept and node.is_idle_leaf) or node in self._queues[GLOBAL]
        kept = {GLOBAL: dict.fromkeys(self._nodes, 1), SLIDING: windows}
        for kind, pool in self._pools.items():
            counts_of = {block_hash: pool.keep_cnt(i) for block_hash, i in pool.registered()}
            assert {h: n for h, n in counts_of.items() if n} == kept[kind], "wrong blocks are kept"
