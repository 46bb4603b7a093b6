"""The bytes of a token, by the decoder of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import CheckpointError


def token_to_bytes(decoder: Mapping[str, Any]) -> Callable[[str], bytes]:
    """The bytes of a token by the decoder of tokenizer.json.

    Byte-level BPE and Gemma's pieces with byte fallback spell each token on its own, whatever
    stands before it. So a text is the joined bytes of its tokens, which is exact and linear.
    Raises CheckpointError for a decoder that looks at neighbouring tokens.
    """
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return byte_level
    replacements = [
        (step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"
    ]
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse"}:
        return lambda token: _byte_fallback(token, replacements, "ByteFallback" in kinds)
    raise CheckpointError(f"The tokenizer's decoder {'+'.join(kinds)} is not one that Gemma uses.")


def _byte_fallback(token: str, replacements: list[tuple[str, str]], has_fallback: bool) -> bytes:
    if has_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    for pattern, content in replacements:
        token = token.replace(pattern, content)
    return token.encode()


def byte_level(token: str) -> bytes:
    """Each byte is written as one printable character; added tokens are written as they are."""
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        return token.encode()


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
