"""A grammar as the user wrote it: the format that an answer's text must have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.errors import InvalidRequest

MAX_CHARS = 1 << 17  # takes about a second to compile, at worst

GrammarKind = Literal["json_schema", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A JSON schema, a regular expression or a Lark grammar that an answer's text must match."""

    kind: GrammarKind
    text: str

    @property
    def noun(self) -> str:
        """The kind as error messages name it."""
        return "lark grammar" if self.kind == "lark" else self.kind

    def check_size(self) -> None:
        """Raise InvalidRequest if the grammar exceeds MAX_CHARS."""
        if len(self.text) > MAX_CHARS:
            raise InvalidRequest(f"The {self.noun} has more than {MAX_CHARS:,} characters.")


JSON_OBJECT = Grammar("json_schema", '{"type": "object"}')  # any JSON object
