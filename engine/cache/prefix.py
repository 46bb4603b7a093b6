"""PrefixIndex: which prefixes are cached, and where a request can resume.

A request can resume only where both KV groups are complete: it needs every global block before that
point, and the sliding window that ends there. Global blocks are shared by all prefixes that go on
from them, but every point has a window of its own, so windows are kept at checkpoints only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from cluster.spec import AttentionKind
from engine.cache.block_pool import BlockPool
from engine.cache.eviction import EvictionQueue, eviction_priority
from engine.request import Owner

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING

Fetched = Mapping[AttentionKind, Collection[bytes]]  # block hashes that a slower tier can load
NOTHING_FETCHED: Fetched = {}


@dataclass(frozen=True, slots=True)
class Prefix:
    """The part of a request that need not be computed."""

    num_blocks: int  # full blocks after which the request can resume
    num_cached: int  # full blocks in the index, with or without a window at their end


@dataclass(slots=True, eq=False)
class PrefixNode:
    """A full, computed block as the end of a prefix.

    A node lives while it or a descendant is a checkpoint, or a running request has computed up to
    it or further. So the ancestors of a node in the index are in the index, too.
    """

    block_hash: bytes
    parent: PrefixNode | None
    depth: int  # blocks of the prefix, this one included
    _: KW_ONLY
    num_children: int = 0
    num_users: int = 0  # running requests of which this is the last full block
    is_checkpoint: bool = False  # requests can resume here: the window that ends here is pinned
    previous: PrefixNode | None = None  # the checkpoint before it, when it became one
    last_used: float = 0.0  # on the eviction clock
    owners: set[Owner] = field(default_factory=set)  # their requests left it or resumed here

    @property
    def is_idle_leaf(self) -> bool:
        """True if no node follows and no running request is here."""
        return self.num_children == 0 and self.num_users == 0

    def ancestors(self) -> Iterator[PrefixNode]:
        """Yield the node itself first, the first block of the prefix last."""
        node: PrefixNode | None = self
        while node is not None:
            yield node
            node = node.parent


class PrefixIndex:
    """The cached prefixes of all tenants, as a tree of full blocks over the pools of both groups.

    Each node pins its global block, and each checkpoint its window's sliding blocks. If a window
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
            GLOBAL: EvictionQueue(
                self._priority, lambda node: node.is_checkpoint and node.is_idle_leaf
            ),
            SLIDING: EvictionQueue(self._priority, lambda node: node.is_checkpoint),
        }
        self._clock = 0.0
        self.num_evicted = dict.fromkeys(pools, 0)  # counter, blocks

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._nodes

    def find(self, block_hashes: Sequence[bytes], fetched: Fetched = NOTHING_FETCHED) -> Prefix:
        """Return the longest prefix whose blocks are all cached or fetched, in every group."""
        num_blocks = len(block_hashes)
        num_cached = bisect_left(
            range(num_blocks), True, key=lambda i: block_hashes[i] not in self._nodes
        )
        global_ones, end = fetched.get(GLOBAL, ()), num_cached
        while end < num_blocks and block_hashes[end] in global_ones:
            end += 1
        while (hole := self._hole(block_hashes, end, fetched.get(SLIDING, ()))) is not None:
            end = hole  # no window may contain the missing block
        return Prefix(end, num_cached)

    def _hole(self, hashes: Sequence[bytes], end: int, fetched: Collection[bytes]) -> int | None:
        """Return the first block that is missing in the window that ends after `end` blocks."""
        for i in range(max(0, end - self._window_blocks), end):
            if self._pools[SLIDING].find(hashes[i]) is None and hashes[i] not in fetched:
                return i
        return None

    # Running requests: each is at one node, the last full block that it has computed

    def enter(self, block_hash: bytes, owner: Owner = None) -> PrefixNode:
        """Place a request that resumes after this block, and mark its checkpoint as used."""
        node = self._nodes[block_hash]
        node.num_users += 1
        for ancestor in node.ancestors():
            if ancestor.is_checkpoint:
                ancestor.last_used = self._clock
                ancestor.owners.add(owner)
                break
        return node

    def advance(
        self, node: PrefixNode | None, block_hash: bytes, owner: Owner = None
    ) -> PrefixNode:
        """Move a request from `node` (None: the start) to its next block, full and registered."""
        child = self._nodes.get(block_hash)
        if child is None:
            child = PrefixNode(block_hash, node, 1 if node is None else node.depth + 1)
            self._nodes[block_hash] = child
            if self._global_pool is not None:
                self._global_pool.pin(self._global_pool.block_of(block_hash))
            if node is not None:
                node.num_children += 1
        child.num_users += 1
        if node is not None:
            node.num_users -= 1
        if self._window_blocks == 0:
            self.add_checkpoint(child, owner)
        return child

    def leave(self, node: PrefixNode) -> None:
        """Remove a request that is at `node`; its references are gone already."""
        node.num_users -= 1
        self._prune(node)

    # Checkpoints

    def window(self, node: PrefixNode) -> list[bytes]:
        """Return the hashes of the sliding blocks that a request resuming at `node` reads."""
        nodes = zip(range(self._window_blocks), node.ancestors(), strict=False)
        return [ancestor.block_hash for _, ancestor in nodes]

    def add_checkpoint(self, node: PrefixNode, owner: Owner = None) -> None:
        """Make `node` a checkpoint; its window's sliding blocks are registered and referenced."""
        node.last_used = self._clock
        node.owners.add(owner)
        if node.is_checkpoint:
            return
        node.is_checkpoint = True
        node.previous = next(
            (n for n in node.ancestors() if n.is_checkpoint and n is not node), None
        )
        self._pin(SLIDING, self.window(node))
        self._offer(node)

    def forget(self, node: PrefixNode) -> None:
        """Remove all checkpoints up to `node`, whose content can't be trusted."""
        for ancestor in node.ancestors():
            if ancestor.is_checkpoint:
                self._remove_checkpoint(ancestor)

    def drop(self, owner: Owner) -> None:
        """Remove the checkpoints of `owner`, except those that others have used, too."""
        for node in [node for node in self._nodes.values() if owner in node.owners]:
            node.owners.remove(owner)
            if not node.owners:
                self._remove_checkpoint(node)

    def resumable_blocks(self) -> dict[Owner, int]:
        """Return for each owner the most blocks after which it can resume."""
        deepest: dict[Owner, int] = {}
        for node in self._nodes.values():
            for owner in node.owners:
                deepest[owner] = max(deepest.get(owner, 0), node.depth)
        return deepest

    def make_room(self, kind: AttentionKind, num_blocks: int) -> None:
        """Evict until the pool can allocate `num_blocks`; it must have as many free."""
        if self._pools[kind].num_unused >= num_blocks:
            return
        before = {k: pool.num_unused for k, pool in self._pools.items()}
        while self._pools[kind].num_unused < num_blocks:
            priority, node = self._queues[kind].pop()
            self._clock = max(self._clock, priority)
            self._remove_checkpoint(node)
        for k, pool in self._pools.items():
            self.num_evicted[k] += pool.num_unused - before[k]

    def _remove_checkpoint(self, node: PrefixNode) -> None:
        """Unpin the node's window, and drop the nodes that nothing needs without it."""
        node.is_checkpoint = False
        node.owners.clear()
        self._unpin(SLIDING, self.window(node))
        fallback = self._previous(node)
        if fallback is not None:  # requests that would have used `node` will use this one
            fallback.last_used = max(fallback.last_used, node.last_used)
        self._prune(node)

    def _prune(self, node: PrefixNode | None) -> None:
        """Remove the node and its ancestors as far as nothing needs them."""
        while node is not None and node.is_idle_leaf and not node.is_checkpoint:
            del self._nodes[node.block_hash]
            self._unpin(GLOBAL, [node.block_hash])
            node = node.parent
            if node is not None:
                node.num_children -= 1
        if node is not None and node.is_checkpoint:
            self._offer(node)

    def _offer(self, node: PrefixNode) -> None:
        """Queue a checkpoint for eviction, of its window and, from an idle leaf, global blocks."""
        if self._window_blocks:
            self._queues[SLIDING].add(node)
        if node.is_idle_leaf:
            self._queues[GLOBAL].add(node)

    def _priority(self, node: PrefixNode) -> float:
        fallback = self._previous(node)
        num_saved = node.depth - (0 if fallback is None else fallback.depth)
        num_bytes = self._num_own(node) * self._block_bytes.get(SLIDING, 0)
        if node.is_idle_leaf:
            num_bytes += num_saved * self._block_bytes.get(GLOBAL, 0)
        return eviction_priority(node.last_used, num_saved, num_bytes)

    def _num_own(self, node: PrefixNode) -> int:
        """Count the blocks of its window that no other checkpoint pins."""
        if self._window_blocks == 0:
            return 0
        pool = self._pools[SLIDING]
        return sum(pool.pin_cnt(pool.block_of(h)) == 1 for h in self.window(node))

    def _previous(self, node: PrefixNode) -> PrefixNode | None:
        """Return the checkpoint at which a request would resume without `node`."""
        before = node.previous
        while before is not None and not before.is_checkpoint:
            before = before.previous
        node.previous = before  # so that no removed one is passed twice
        return before

    def _pin(self, kind: AttentionKind, hashes: Iterable[bytes]) -> None:
        if (pool := self._pools.get(kind)) is not None:
            for block_hash in hashes:
                pool.pin(pool.block_of(block_hash))

    def _unpin(self, kind: AttentionKind, hashes: Iterable[bytes]) -> None:
        if (pool := self._pools.get(kind)) is not None:
            for block_hash in hashes:
                pool.unpin(pool.block_of(block_hash))

    def check_integrity(self, users: Iterable[PrefixNode]) -> None:
        """Assert that the tree, its counts and the pools agree; `users` are the requests' nodes."""
        nodes = self._nodes.values()
        expected = {node: [0, 0] for node in nodes}  # children, users
        windows: dict[bytes, int] = {}
        for node in nodes:
            if node.parent is not None:
                expected[node.parent][0] += 1
            for block_hash in self.window(node) if node.is_checkpoint else ():
                windows[block_hash] = windows.get(block_hash, 0) + 1
        for node in users:
            expected[node][1] += 1
        for node, counts in expected.items():
            assert counts == [node.num_children, node.num_users], "wrong counts in the prefix tree"
            assert node.is_checkpoint or not node.is_idle_leaf, "a node that nothing needs"
            assert node.is_checkpoint == bool(node.owners), "a checkpoint without an owner"
            assert (
                not node.is_checkpoint or node in self._queues[SLIDING] or not self._window_blocks
            )
            assert not (node.is_checkpoint and node.is_idle_leaf) or node in self._queues[GLOBAL]
        kept = {GLOBAL: dict.fromkeys(self._nodes, 1), SLIDING: windows}
        for kind, pool in self._pools.items():
            counts_of = {block_hash: pool.pin_cnt(i) for block_hash, i in pool.registered()}
            assert {h: n for h, n in counts_of.items() if n} == kept[kind], (
                "wrong blocks are pinned"
            )
