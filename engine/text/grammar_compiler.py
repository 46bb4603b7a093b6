"""Compiles grammars against a model's vocabulary with llguidance.

llguidance follows a grammar token by token. The limits below bound what a grammar may cost, so
that none holds up a step for long.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from cluster.errors import InvalidRequest
from engine.text.dialect import Dialect
from engine.text.grammar import Grammar
from engine.text.guide import Guide

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # exists in the stubs only

LIMITS = LLParserLimits(
    max_lexer_states=25_000,  # up to 2 KB each
    step_max_items=10_000,  # items of the parser; some 35 ms for a mask, at worst
    verbose_errors=False,
)
# A confused model writes white space for ever, so the grammar limits it.
JSON_STYLE: JsonCompileOptions = {"whitespace_pattern": r"[ \t\r\n]{1,32}"}


class Vocabulary(Protocol):
    """The part of `engine.text.tokenizer.Tokenizer` that structured output needs."""

    vocab_size: int
    eos_ids: tuple[int, ...]
    dialect: Dialect

    def token_bytes(self, token_id: int) -> bytes: ...
    def encode_plain(self, text: str) -> list[int]: ...


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Threads may share it."""

    def __init__(self, vocabulary: Vocabulary, extra_eos_ids: Sequence[int] = ()) -> None:
        """Load the vocabulary into llguidance; takes a second for a large one, during which no
        other Python thread runs.

        Args:
            vocabulary: The model's tokenizer.
            extra_eos_ids: Token ids that end an answer, besides the vocabulary's own.
        """
        self._tokenizer: LLTokenizer | None = None
        if eos_ids := list(dict.fromkeys((*vocabulary.eos_ids, *extra_eos_ids))):
            tokens: Any = _Tokens(vocabulary, eos_ids[0])
            self._tokenizer = LLTokenizer(tokens, n_vocab=vocabulary.vocab_size, eos_token=eos_ids)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Compile a grammar; takes up to a second.

        Raises:
            InvalidRequest: The grammar is invalid or too large, or this vocabulary can't write it.
        """
        grammar.check_size()
        if self._tokenizer is None:
            raise InvalidRequest("Structured output needs a model with an end-of-sequence token.")
        try:
            matcher = LLMatcher(self._tokenizer, _definition(grammar), limits=LIMITS)
        except ValueError as error:
            raise InvalidRequest(f"The {grammar.noun} is invalid: {error}.") from None
        if matcher.is_error():
            reason = matcher.get_error().strip().split("\n")[0]
            raise InvalidRequest(f"The {grammar.noun} can't be used: {reason}.")
        Guide(matcher).allowed()  # refuses a grammar without a first token
        return matcher


def _definition(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises ValueError."""
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    try:
        schema = json.loads(grammar.text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema is an object")
    return LLMatcher.grammar_from_json_schema(schema, defaults=JSON_STYLE)


class _Tokens:
    """The vocabulary in the form that llguidance reads."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary, eos_id: int) -> None:
        texts = map(vocabulary.token_bytes, range(vocabulary.vocab_size))
        self.tokens = [text or b"<|%d|>" % i for i, text in enumerate(texts)]
        self.special_token_ids = [
            i for i in range(vocabulary.vocab_size) if not vocabulary.token_bytes(i)
        ]
        self.eos_token_id, self.bos_token_id = eos_id, None
        self._encode = vocabulary.encode_plain

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)
