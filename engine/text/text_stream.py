"""Incremental detokenization, with stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """The part of `engine.text.tokenizer.Tokenizer` that detokenization needs."""

    def token_bytes(self, token_id: int) -> bytes: ...


class TextStream:
    """Turns the tokens of one request into text deltas, in time linear in the number of tokens.

    The deltas, joined, are what `Tokenizer.decode` gives for all tokens, cut before the first stop
    string. The bytes of an incomplete character are held back, and so is text that may be the
    beginning of a stop string; U+FFFD stands for bytes that no later token can complete. A stop
    string is found as soon as it is complete, however it is split over tokens.
    """

    def __init__(self, tokenizer: TokenBytes, stop: Sequence[str] = ()) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_StopMatcher(text) for text in stop]
        self._held = ""  # may be the beginning of a stop string
        self._is_finished = False

    def push(self, token_ids: Iterable[int]) -> tuple[str, str | None]:
        """Take tokens; returns the text that is certain now, and the stop string it reaches."""
        assert not self._is_finished, "the stream has ended"
        text = self._utf8.decode(b"".join(map(self._token_bytes, token_ids)))
        if not self._matchers:
            return text, None
        return self._until_stop(text)

    def finish(self) -> str:
        """End the stream; returns the text that was held back, none after a stop string."""
        if self._is_finished:
            return ""
        self._is_finished = True
        return self._held + self._utf8.decode(b"", final=True)

    def _until_stop(self, text: str) -> tuple[str, str | None]:
        for index, char in enumerate(text):
            met = [matcher.text for matcher in self._matchers if matcher.push(char)]
            if met:
                stop = max(met, key=len)  # the longest one began first
                self._is_finished = True
                return (self._held + text[: index + 1])[: -len(stop)], stop
        text = self._held + text
        cut = len(text) - max(matcher.num_matched for matcher in self._matchers)
        self._held = text[cut:]
        return text[:cut], None


class _StopMatcher:
    """Finds one stop string, character by character, with the Knuth-Morris-Pratt algorithm."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0  # how much of the beginning of `text` the input ends with
        self._borders = [0] * len(text)  # longest proper prefix of text[:i + 1] that also ends it
        for i in range(1, len(text)):
            self._borders[i] = self._advance(self._borders[i - 1], text[i])

    def push(self, char: str) -> bool:
        """Take one character; returns True if it completes the stop string."""
        self.num_matched = self._advance(self.num_matched, char)
        return self.num_matched == len(self.text)

    def _advance(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._borders[matched - 1]
        return matched + 1 if self.text[matched] == char else 0
