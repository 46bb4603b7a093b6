"""API keys: how one looks, and what is kept of it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

PREFIX = "brio"  # so that people and secret scanners know one when they see it
SECRET_BYTES = 32
SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class KeyHash:
    """What is kept of a key: enough to know it again, too little to make it.

    One pass of BLAKE2b is slow enough: the secret has 256 random bits, which nobody can go through,
    and every call pays for the hash. Slow hashes are for passwords, which people choose.
    """

    key_id: str
    salt: str  # this and the digest in hex
    digest: str
    created: float  # seconds since the epoch
    expires: float | None = None  # of a key that a newer one has replaced

    def matches(self, secret: str) -> bool:
        """Whether this is the secret part of the key; takes the same time whatever it is."""
        return hmac.compare_digest(_digest(secret, self.salt), self.digest)


def new_key(now: float) -> tuple[str, KeyHash]:
    """A key to show once, and what to keep of it."""
    key_id, secret = secrets.token_hex(4), secrets.token_hex(SECRET_BYTES)
    return f"{PREFIX}_{key_id}_{secret}", _hashed(key_id, secret, now)


def split_key(key: str) -> tuple[str, str] | None:
    """A key's id and secret; None for what is no key of ours."""
    parts = key.split("_")
    return (parts[1], parts[2]) if len(parts) == 3 and parts[0] == PREFIX else None


def _hashed(key_id: str, secret: str, now: float) -> KeyHash:
    salt = secrets.token_hex(SALT_BYTES)
    return KeyHash(key_id, salt, _digest(secret, salt), now)


def _digest(secret: str, salt: str) -> str:
    # A header may hold any text, also what UTF-8 can't encode.
    given = secret.encode(errors="surrogatepass")
    return hashlib.blake2b(given, salt=bytes.fromhex(salt), digest_size=32).hexdigest()
