"""The protocol of a slower tier of KV blocks, and the one that holds none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cluster.spec import AttentionKind
from engine.cache.prefix import NOTHING_FETCHED, Fetched
from engine.request import Request


class StoredBlock(NamedTuple):
    """A block of one KV cache group and the hash that names its content."""

    kind: AttentionKind
    block_id: int
    block_hash: bytes


class BlockStore(Protocol):
    """Where blocks outlive the pools. It is given the runner's KV tensors when it is made.

    All methods are called between steps, from the thread that computes them: none may wait for a
    network or a disk, and none may raise for what happens there. A store that lost something
    answers that it has nothing, and the request is computed.
    """

    def fetch(self, request: Request, num_cached_tokens: int) -> bool:
        """A request arrived; its block_hashes are those of all its full blocks, and it could
        resume after `num_cached_tokens` without the store. True: blocks are on their way, let it
        wait; False: start it without them.
        """

    def fetched(self, request: Request) -> Fetched | None:
        """Hashes, by kind, of the blocks that are here for `load`; none if there is nothing for
        the request, None while they are on their way.
        """

    def load(self, request: Request, blocks: Sequence[StoredBlock]) -> bool:
        """Fill blocks, all of them fetched; false if that failed and their content is undefined."""

    def release(self, request: Request) -> None:
        """The request was started or has ended: what was fetched for it, or still is on its way,
        isn't needed. Also called for requests that never fetched.
        """

    def save(self, request: Request, blocks: Sequence[StoredBlock]) -> None:
        """Blocks that became full, and the windows of checkpoints, some of them saved before. They
        may be overwritten after this returns: copy them, or order the copy before later steps.
        """

    def discard(self, request: Request) -> None:
        """What the request has read or computed can't be trusted: keep nothing of it."""


class NullBlockStore:
    """Holds no blocks."""

    def fetch(self, request: Request, num_cached_tokens: int) -> bool:
        return False

    def fetched(self, request: Request) -> Fetched | None:
        return NOTHING_FETCHED

    def load(self, request: Request, blocks: Sequence[StoredBlock]) -> bool:
        return False

    def release(self, request: Request) -> None:
        pass

    def save(self, request: Request, blocks: Sequence[StoredBlock]) -> None:
        pass

    def discard(self, request: Request) -> None:
        pass
