"""Structured output: which tokens may come next, by JSON schema, regular expression or grammar.

llguidance compiles a grammar against the vocabulary and follows it token by token. Both have
limits here, so that no grammar holds up a step for long.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from cluster.errors import InvalidRequest
from engine.dialect import NO_DIALECT, Dialect

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # a type only

MAX_CHARS = 1 << 17  # of a grammar: about a second to compile, at worst
NUM_COMPILED = 64  # kept, the last used ones
LIMITS = LLParserLimits(max_lexer_states=25_000, verbose_errors=False)  # up to 2 KB for a state
# A model that is at a loss writes spaces for ever, so they are counted.
JSON_STYLE: JsonCompileOptions = {"whitespace_pattern": r"[ \t\r\n]{1,32}"}

GrammarKind = Literal["json_schema", "regex", "lark"]
Allowed = NDArray[np.bool_]  # [vocab_size]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a text must be, as the user wrote it."""

    kind: GrammarKind
    text: str

    def check_size(self) -> None:
        """Raises InvalidRequest."""
        if len(self.text) > MAX_CHARS:
            raise InvalidRequest(f"The {self.kind} has more than {MAX_CHARS:,} characters.")


class Vocabulary(Protocol):
    """What is needed of engine.tokenizer.Tokenizer."""

    vocab_size: int
    eos_ids: tuple[int, ...]
    dialect: Dialect

    def token_bytes(self, token_id: int) -> bytes: ...
    def encode_plain(self, text: str) -> list[int]: ...


class Grammars:
    """Grammars compiled for one vocabulary. Any thread may call."""

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int] = ()) -> None:
        """`eos_ids` end an answer, beside the vocabulary's own."""
        self._vocabulary, self._more_eos_ids = vocabulary, tuple(eos_ids)
        self._compiled: Callable[[Grammar], LLMatcher] = lru_cache(NUM_COMPILED)(self._compile)

    def compile(self, grammar: Grammar) -> None:
        """Takes up to a second; from then on `guide` takes none.

        Raises InvalidRequest for a grammar that is wrong, too large, or that this vocabulary
        can't write.
        """
        self._compiled(grammar)

    def guide(self, grammar: Grammar, prompt_ids: Sequence[int] = ()) -> Guide:
        """A new answer's guide. What its prompt allows beside a text, a thought before it or calls
        in its place, is free. Raises InvalidRequest.
        """
        dialect = self._vocabulary.dialect
        may_think = dialect.think is not None and dialect.think in prompt_ids
        may_call = dialect.tool_open is not None and dialect.tool_open in prompt_ids
        matcher = self._compiled(grammar).deep_copy()
        guide = Guide(matcher, dialect, may_think=may_think, may_call=may_call)
        if may_think and dialect.open_thought(prompt_ids) is not None:
            guide.think()
        return guide

    def _compile(self, grammar: Grammar) -> LLMatcher:
        grammar.check_size()
        try:
            matcher = LLMatcher(self._tokenizer, _definition(grammar), limits=LIMITS)
        except ValueError as error:
            raise InvalidRequest(f"The {grammar.kind} is wrong: {error}.") from None
        if matcher.is_error():
            reason = matcher.get_error().strip().split("\n")[0]
            raise InvalidRequest(f"The {grammar.kind} can't be used: {reason}.")
        Guide(matcher).allowed()
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Takes about a second for a large vocabulary, so it waits until somebody has a grammar."""
        eos_ids = list(dict.fromkeys((*self._vocabulary.eos_ids, *self._more_eos_ids)))
        if not eos_ids:
            raise InvalidRequest("Structured output needs a model with an end-of-sequence token.")
        tokens: Any = _Tokens(self._vocabulary, eos_ids[0])
        return LLTokenizer(tokens, n_vocab=self._vocabulary.vocab_size, eos_token=eos_ids)


class Guide:
    """Follows one answer through its grammar."""

    def __init__(
        self,
        matcher: LLMatcher,
        dialect: Dialect = NO_DIALECT,
        *,
        may_think: bool = False,
        may_call: bool = False,
    ) -> None:
        self._matcher, self._dialect = matcher, dialect
        # Tokens that may open something free as long as the text hasn't begun
        self._thought_open = dialect.thought_open if may_think else None
        self._call_open = dialect.call_open if may_call else None
        self._is_free = False
        self._free_until: int | None = None  # to the end

    def allowed(self) -> Allowed | None:
        """The next tokens that may come; None: all.

        Raises InvalidRequest where there is none, and where the grammar has got too complex.
        """
        if self._is_free:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little").view(np.bool_)
        reason = self._matcher.get_error().strip().split("\n")[0]
        is_dead_end = reason == "NoExtensionBias"
        if reason and not is_dead_end:
            raise InvalidRequest(f"The answer's grammar got too complex: {reason}.")
        for token_id in (self._thought_open, self._call_open):
            if token_id is not None:
                allowed[token_id] = True
        if is_dead_end or not allowed.any():
            raise InvalidRequest("The model's vocabulary can't write what the grammar asks for.")
        return allowed

    def think(self) -> None:
        """A thought has begun, the last one before the text."""
        self._thought_open, self._is_free = None, True
        self._free_until = self._dialect.thought_close

    def advance(self, token_id: int) -> None:
        """Take the token that came."""
        if self._is_free:
            self._is_free = token_id != self._free_until
            return
        is_grammars = self._matcher.validate_tokens([token_id]) == 1
        if not is_grammars and token_id == self._thought_open:
            self.think()
        elif not is_grammars and token_id == self._call_open:
            self._is_free = True
        else:
            self._thought_open = self._call_open = None
            self._matcher.consume_token(token_id)


def _definition(grammar: Grammar) -> str:
    """As llguidance takes it. Raises ValueError."""
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
    """The vocabulary as llguidance reads it."""

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
