"""Block hashes: names of the content of a block and of all blocks before it."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from hashlib import blake2b

import numpy as np

from engine.request import Request
from engine.spans import media_digests

HASH_BYTES = 20  # finding two prompts with one hash takes some 2**80 tries


def tenant_salt(tenant: str, shared_tenants: Collection[str] = ()) -> bytes:
    """Return what sets a tenant's hashes apart; tenants that share prefixes have one salt."""
    return b"shared" if tenant in shared_tenants else b"tenant " + tenant.encode()


def block_hash(parent: bytes, token_bytes: bytes, media: bytes = b"") -> bytes:
    """Hash a block and everything before it.

    Args:
        parent: The hash of the block before it.
        token_bytes: Its token ids, 4 bytes each, little-endian.
        media: Names its images and audio (`media_digests`).

    Returns:
        HASH_BYTES bytes.
    """
    return blake2b(parent + token_bytes + media, digest_size=HASH_BYTES).digest()


class BlockHasher:
    """Hashes the blocks of requests, each once.

    `fingerprint` names all that the bits of keys and values depend on beside the tokens: weights,
    dtype, the KV layout.
    """

    def __init__(
        self, block_size: int, fingerprint: str, shared_tenants: Collection[str] = ()
    ) -> None:
        self._block_size = block_size
        self._shared_tenants = shared_tenants
        self._model = block_hash(b"", fingerprint.encode())

    def extend(self, request: Request) -> None:
        """Append the hashes of the full blocks of known tokens to the request's block_hashes."""
        hashes, size = request.block_hashes, self._block_size
        num_blocks = request.num_tokens // size
        if len(hashes) == num_blocks:
            return
        salt = tenant_salt(request.tenant, self._shared_tenants)
        parent = hashes[-1] if hashes else block_hash(self._model, salt)
        first = len(hashes) * size
        token_ids = array("I", request.token_ids(first, num_blocks * size))
        token_bytes = np.array(token_ids, dtype="<u4").tobytes()
        for start in range(0, len(token_bytes), 4 * size):
            media = media_digests(request.spans, first, first + size) if request.spans else b""
            parent = block_hash(parent, token_bytes[start : start + 4 * size], media)
            hashes.append(parent)
            first += size
