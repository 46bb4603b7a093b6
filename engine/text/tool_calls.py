"""Streaming parser of a tool call: turns Gemma's form of its arguments into JSON.

A call is `call:NAME{key:value,…}`. Keys are bare, strings stand between two quote tokens with
nothing escaped, numbers, booleans, objects and lists are written as in JSON.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass

MAX_HEAD_CHARS = 256  # before the arguments
HEAD = re.compile(r"\s*(?>(?:(?:call)?:)?)\s*(\w[\w./:-]*)\s*")  # models have left "call" out
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
CLOSING = {"{": "}", "[": "]"}


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The new part of one tool call; only the first delta of a call has its `id` and `name`."""

    index: int  # among the answer's calls
    arguments: str  # JSON text; the deltas of a complete call, joined, are an object
    id: str = ""
    name: str = ""


class ToolCallParser:
    """Parses one call as its tokens come. Malformed input ends the parsing: what was returned
    until then stands, and the call stays incomplete.
    """

    def __init__(self) -> None:
        self.name = ""  # until it is known
        self._head = ""  # the text before the arguments
        self._is_broken = False  # the head is malformed
        self._arguments = ArgumentsParser()

    @property
    def is_complete(self) -> bool:
        """True once the arguments are a JSON object."""
        return self._arguments.is_complete

    def push_text(self, text: str) -> str:
        """Take text; returns the JSON that it adds to the arguments."""
        if self.name:
            return self._arguments.push_text(text)
        if self._is_broken:
            return ""
        self._head += text
        head, brace, rest = self._head.partition("{")
        self._is_broken = len(head) > MAX_HEAD_CHARS
        if not brace or self._is_broken:
            return ""
        match = HEAD.fullmatch(head)
        if match is None:
            self._is_broken = True
            return ""
        self.name = match[1]
        return self._arguments.push_text(brace + rest)

    def push_quote(self) -> str:
        """Take a quote token; returns the JSON that it adds to the arguments."""
        return self._arguments.push_quote() if self.name else ""


class _Expects(enum.Enum):
    KEY = enum.auto()  # or the end of the object
    COLON = enum.auto()  # after a quoted key
    VALUE = enum.auto()  # or the end of the list
    NEXT = enum.auto()  # a comma, or the end of what is open
    NOTHING = enum.auto()  # complete, or broken


class ArgumentsParser:
    """Turns the arguments of a call into JSON as they come. The returned strings, joined, are the
    beginning of a JSON object, and the whole object once `is_complete`.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self._open: list[str] = []  # braces and brackets that are open
        self._expects = _Expects.VALUE
        self._is_quoted = False  # between two quote tokens
        self._word = ""  # a bare key, number or word so far
        self._comma = ""  # returned once something follows it

    def push_text(self, text: str) -> str:
        """Take text; returns the JSON that it adds."""
        if self._is_quoted:
            return json.dumps(text, ensure_ascii=False)[1:-1]
        return "".join(map(self._char, text))

    def push_quote(self) -> str:
        """Take a quote token; returns the JSON that it adds."""
        if self._is_quoted:
            self._is_quoted = False
            is_key = self._expects is _Expects.KEY
            self._expects = _Expects.COLON if is_key else _Expects.NEXT
            return '"'
        may_begin = self._open and self._expects in (_Expects.KEY, _Expects.VALUE)
        if self._word.strip() or not may_begin:
            return self._break()
        self._is_quoted, self._word = True, ""
        return self._begin('"')

    def _char(self, char: str) -> str:
        match self._expects:
            case _Expects.KEY:
                return self._in_key(char)
            case _Expects.VALUE:
                return self._in_value(char)
            case _Expects.NOTHING:
                return ""
        if char.isspace():
            return ""
        if self._expects is _Expects.COLON:
            return self._colon() if char == ":" else self._break()
        return self._after_value(char)

    def _in_key(self, char: str) -> str:
        word = self._word.strip()
        if char == ":" and word:
            return self._begin(json.dumps(word, ensure_ascii=False)) + self._colon()
        if char == "}" and not word:
            return self._close(char)
        if char in ":,{}[]":
            return self._break()
        self._word += char
        return ""

    def _in_value(self, char: str) -> str:
        word = self._word.strip()
        if not word and char in "{[":
            if char == "[" and not self._open:
                return self._break()
            opened = self._begin(char)
            self._open.append(char)
            self._expects = _Expects.KEY if char == "{" else _Expects.VALUE
            return opened
        if not word and char == "]":
            return self._close(char)
        if char not in ",]}":
            self._word += char
            return "" if self._open else self._break_unless_space(char)
        if not word:
            return self._break()
        literal = self._begin(_literal(word))
        self._expects = _Expects.NEXT
        return literal + self._after_value(char)

    def _after_value(self, char: str) -> str:
        if char != ",":
            return self._close(char)
        self._comma = ","
        self._expects = _Expects.KEY if self._open[-1] == "{" else _Expects.VALUE
        return ""

    def _begin(self, token: str) -> str:
        """Write a key, a value, or the bracket that opens one."""
        comma, self._comma, self._word = self._comma, "", ""
        return comma + token

    def _colon(self) -> str:
        self._expects = _Expects.VALUE
        return ":"

    def _close(self, char: str) -> str:
        if not self._open or CLOSING[self._open[-1]] != char:
            return self._break()
        self._open.pop()
        self._comma = self._word = ""
        self.is_complete = not self._open
        self._expects = _Expects.NOTHING if self.is_complete else _Expects.NEXT
        return char

    def _break_unless_space(self, char: str) -> str:
        return "" if char.isspace() else self._break()

    def _break(self) -> str:
        self._expects = _Expects.NOTHING
        return ""


def _literal(word: str) -> str:
    """A bare word as JSON; a word unknown to JSON is a string that lacks its quote tokens."""
    if word in ("true", "false", "null") or NUMBER.fullmatch(word):
        return word
    if word == "None":
        return "null"
    return json.dumps(word, ensure_ascii=False)
