"""One question and its answer, and the coin that keeps some for the tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

Counter = Callable[[str], int]  # text -> number of tokens
HELD_OUT_SHARE = 10  # one in so many sums, recalls and (fact, phrasing) pairs is never trained on


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `kind` names the skill for the scores."""

    user: str
    model: str
    kind: str


def is_held_out(*parts: object) -> bool:
    """A stable coin for the test split: the same on every machine and for every seed."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return digest[0] * 256 + digest[1] < 65536 // HELD_OUT_SHARE


def words(text: str) -> list[str]:
    return text.split()
