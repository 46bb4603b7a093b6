"""A KV value as Redis holds it: a header that proves what follows, then the exact payload."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import xxhash

Buffer: TypeAlias = bytes | bytearray | memoryview

MAGIC = b"BRKV"
VERSION = 1
_PREFIX = struct.Struct("<4sHHQ16s")  # magic, version, header bytes, payload bytes, fingerprint
CHECKSUM_BYTES = 16
HEADER_BYTES = _PREFIX.size + CHECKSUM_BYTES


class BadValue(Exception):
    """Stored bytes must not be used. It never leaves the store: the value counts as absent."""


class DamagedValue(BadValue):
    """The value is cut short, has a changed byte, or lies under another value's key."""


class ForeignValue(BadValue):
    """The value has another version of the format, or belongs to another model."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredValue:
    """A value to be stored: its payload is the parts, one after the other."""

    tenant: str
    key: bytes
    parts: Sequence[memoryview]
    num_bytes: int  # of the payload


@dataclass(frozen=True, slots=True)
class Header:
    """The parsed header of a value; `payload_bytes` follow it."""

    payload_bytes: int
    checksum: bytes
    prefix: bytes


def short_fingerprint(fingerprint: bytes) -> bytes:
    """Return the 16 bytes that stand for a model's fingerprint of any length."""
    return hashlib.blake2b(fingerprint, digest_size=16).digest()


def header_of(parts: Sequence[Buffer], name: bytes, fingerprint: bytes) -> bytes:
    """Return the header of a value. Its checksum covers all of these, so a value that was copied to
    another key is refused.

    Args:
        parts: The payload, one part after the other.
        name: The whole Redis key.
        fingerprint: 16 bytes that stand for the model.
    """
    payload_bytes = sum(memoryview(part).nbytes for part in parts)
    prefix = _PREFIX.pack(MAGIC, VERSION, HEADER_BYTES, payload_bytes, fingerprint)
    checksum = hasher(prefix, name)
    for part in parts:
        checksum.update(part)
    return prefix + checksum.digest()


def parse_header(header: bytes, value_bytes: int, fingerprint: bytes) -> Header:
    """Parse the header of a value that has `value_bytes` in all. Raises BadValue."""
    if len(header) < HEADER_BYTES:
        raise DamagedValue("shorter than a header")
    magic, version, header_bytes, payload_bytes, found = _PREFIX.unpack_from(header)
    if magic != MAGIC:
        raise DamagedValue("not a KV value")
    if version != VERSION:
        raise ForeignValue(f"version {version} of the format")
    if header_bytes != HEADER_BYTES or payload_bytes != value_bytes - HEADER_BYTES:
        raise DamagedValue("of another length than its header says")
    if found != fingerprint:
        raise ForeignValue("of another model")
    return Header(payload_bytes, header[_PREFIX.size : HEADER_BYTES], header[: _PREFIX.size])


def hasher(prefix: bytes, name: bytes) -> xxhash.xxh3_128:
    """Return the checksum to which the payload is still to be added: XXH3, which reaches 25 GB/s
    where zlib.crc32 reaches 4.
    """
    return xxhash.xxh3_128(prefix + name)
