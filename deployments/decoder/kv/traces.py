"""The block store's notes: the blocks of a request, their ids, and the keys that Redis has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from deployments.decoder.kv.values import GLOBAL
from engine.cache.block_store import StoredBlock

MAX_KNOWN = 1 << 16  # keys of a tenant


@dataclass(slots=True)
class RequestTrace:
    """Notes on one request, kept as long as the engine refers to it."""

    positions: dict[bytes, int] = field(default_factory=dict)  # of its full blocks, by hash
    keys: list[bytes] = field(default_factory=list)  # of what was put for it

    def extend(self, block_hashes: Sequence[bytes]) -> None:
        """Note the blocks that have become full."""
        for position in range(len(self.positions), len(block_hashes)):
            self.positions[block_hashes[position]] = position


class KnownKeys:
    """Keys of values that we believe to be in Redis; each look-up corrects them."""

    def __init__(self) -> None:
        self._by_tenant: defaultdict[str, set[bytes]] = defaultdict(set)

    def of(self, tenant: str) -> set[bytes]:
        known = self._by_tenant[tenant]
        if len(known) > MAX_KNOWN:
            known.clear()
        return known


class BlockIds:
    """Where the global blocks are that the engine has saved or loaded.

    Right for every block that a running request holds: whatever is registered under a hash was
    shown to `save` or `load` then. Of others the id may be somebody else's by now.
    """

    def __init__(self) -> None:
        self._id_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    def update(self, blocks: Sequence[StoredBlock]) -> None:
        for block in blocks:
            if block.kind is GLOBAL:
                old = self._hash_of.get(block.block_id)
                if old is not None and self._id_of.get(old) == block.block_id:
                    del self._id_of[old]
                self._hash_of[block.block_id] = block.block_hash
                self._id_of[block.block_hash] = block.block_id

    def find(self, block_hashes: Sequence[bytes]) -> list[int] | None:
        """None where one is missing."""
        ids = [self._id_of.get(block_hash) for block_hash in block_hashes]
        return None if None in ids else [i for i in ids if i is not None]
