"""BlockStore: the protocol of a slower tier of KV blocks, and NullBlockStore, which holds none."""

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
    """A slower tier in which blocks outlive the pools; its maker gives it the runner's KV tensors.

    All methods are called between steps, in the thread that computes them: none may wait for a
    network or a disk, or raise an error of theirs. A store that lost something answers that it has
    nothing, and the tokens are computed.
    """

    def fetch(self, request: Request, num_cached_tokens: int) -> bool:
        """Begin to fetch the blocks of a request; True if it shall wait for them.

        Its `block_hashes` are those of all its full blocks, and without the store it could resume
        after `num_cached_tokens`.
        """

    def fetched(self, request: Request) -> Fetched | None:
        """Return the hashes, by kind, of the blocks that `load` can fill now.

        Empty if the store has nothing for the request; None while its blocks are being fetched.
        """

    def load(self, request: Request, blocks: Sequence[StoredBlock]) -> bool:
        """Fill blocks, all of them fetched; False if that failed and their content is undefined."""

    def release(self, request: Request) -> None:
        """Drop what was or is being fetched for a request, which has started or ended.

        Also called for requests that never fetched.
        """

    def save(self, request: Request, blocks: Sequence[StoredBlock]) -> None:
        """Save blocks that became full, and the windows of checkpoints, some of them saved before.

        They may be overwritten after this returns: copy them, or order the copy before later steps.
        """

    def discard(self, request: Request) -> None:
        """Remove everything that the request has read or computed, which can't be trusted."""


class NullBlockStore:
    """A store without blocks."""

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
