"""A block store in a dict, with a slower tier's ways to be late, empty or broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cluster.spec import AttentionKind
from engine.attention.interface import KVTensors
from engine.cache.block_store import StoredBlock
from engine.cache.prefix import NOTHING_FETCHED, Fetched
from engine.request import Request


class Blocks(Protocol):
    """Where the store reads and writes what is in a block."""

    def read(self, kind: AttentionKind, block_id: int) -> Any: ...
    def write(self, kind: AttentionKind, block_id: int, value: Any) -> None: ...


class TensorBlocks:
    """The blocks of a model runner: key and value of all layers of a kind."""

    def __init__(self, tensors: Mapping[int, KVTensors], kinds: Sequence[AttentionKind]) -> None:
        self._tensors, self._kinds = tensors, kinds  # kinds by layer index

    def read(self, kind: AttentionKind, block_id: int) -> Any:
        layers = [t for idx, t in self._tensors.items() if self._kinds[idx] is kind]
        return [[tensor[block_id].clone() for tensor in t.stored] for t in layers]

    def write(self, kind: AttentionKind, block_id: int, value: Any) -> None:
        layers = [t for idx, t in self._tensors.items() if self._kinds[idx] is kind]
        for tensors, kept in zip(layers, value, strict=True):
            for tensor, stored in zip(tensors.stored, kept, strict=True):
                tensor[block_id] = stored


class MemoryStore:
    """Values by kind and hash. A fetch is ready when `fetched` was asked more than `polls` times;
    None: never. With `fails`, loading leaves garbage behind.
    """

    def __init__(self, polls: int | None = 0, *, fails: bool = False) -> None:
        self.values: dict[tuple[AttentionKind, bytes], Any] = {}
        self.polls, self.fails = polls, fails
        self.blocks: Blocks | None = None
        self.num_loaded = 0
        self.on_their_way: dict[Request, int] = {}  # to the number of times that it was asked for

    def fetch(self, request: Request, num_cached_tokens: int) -> bool:
        if not any(self._known(request).values()):
            return False
        self.on_their_way[request] = 0
        return True

    def fetched(self, request: Request) -> Fetched | None:
        if request not in self.on_their_way:
            return NOTHING_FETCHED
        self.on_their_way[request] += 1
        if self.polls is None or self.on_their_way[request] <= self.polls:
            return None
        return self._known(request)

    def load(self, request: Request, blocks: Sequence[StoredBlock]) -> bool:
        assert self.blocks is not None and request in self.on_their_way
        for block in blocks:
            value = self.values[block.kind, block.block_hash]
            if not self.fails:
                self.blocks.write(block.kind, block.block_id, value)
        self.num_loaded += 0 if self.fails else len(blocks)
        return not self.fails

    def release(self, request: Request) -> None:
        self.on_their_way.pop(request, None)

    def save(self, request: Request, blocks: Sequence[StoredBlock]) -> None:
        assert self.blocks is not None
        for block in blocks:
            value = self.blocks.read(block.kind, block.block_id)
            self.values.setdefault((block.kind, block.block_hash), value)

    def discard(self, request: Request) -> None:
        for kind in AttentionKind:
            for block_hash in request.block_hashes:
                self.values.pop((kind, block_hash), None)

    def _known(self, request: Request) -> dict[AttentionKind, set[bytes]]:
        return {
            kind: {h for h in request.block_hashes if (kind, h) in self.values}
            for kind in AttentionKind
        }
