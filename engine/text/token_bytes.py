"""The bytes of a token, according to the decoder in a tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import CheckpointError


def token_to_bytes(decoder: Mapping[str, Any]) -> Callable[[str], bytes]:
    """Return a function that gives the bytes of a token.

    Byte-level BPE and Gemma's pieces with byte fallback decode each token on its own, so a text is
    simply the joined bytes of its tokens.

    Args:
        decoder: The `decoder` section of tokenizer.json.

    Raises:
        CheckpointError: The decoder looks at neighbouring tokens.
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
    raise CheckpointError(f"The tokenizer's decoder {'+'.join(kinds)} is not supported.")


def _byte_fallback(token: str, replacements: list[tuple[str, str]], has_fallback: bool) -> bytes:
    if has_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    for pattern, content in replacements:
        token = token.replace(pattern, content)
    return token.encode()


def byte_level(token: str) -> bytes:
    """Decode a token of byte-level BPE, which writes each byte as one printable character; an added
    token stands for itself.
    """
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        return token.encode()


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others begin at U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
