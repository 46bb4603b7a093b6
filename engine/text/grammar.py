"""Structured output: which tokens may come next, by JSON schema, regular expression or grammar.

llguidance compiles a grammar against the vocabulary and follows it token by token. Both have
limits here, so that no grammar holds up a step for long.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from cluster.errors import InvalidRequest
from engine.text.compiled_grammars import CompiledGrammars
from engine.text.dialect import NO_DIALECT, Dialect

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # a type only

MAX_CHARS = 1 << 17  # of a grammar: about a second to compile, at worst
LIMITS = LLParserLimits(
    max_lexer_states=25_000,  # up to 2 KB each
    step_max_items=10_000,  # of the parser: some 35 ms for a mask, at worst
    verbose_errors=False,
)
USED_UP = "too many states"  # as llguidance says it
# A model that is at a loss writes spaces for ever, so they are counted.
JSON_STYLE: JsonCompileOptions = {"whitespace_pattern": r"[ \t\r\n]{1,32}"}

GrammarKind = Literal["json_schema", "regex", "lark"]
Allowed = NDArray[np.bool_]  # [vocab_size]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a text must be, as the user wrote it."""

    kind: GrammarKind
    text: str

    @property
    def noun(self) -> str:
        """What errors call it."""
        return "lark grammar" if self.kind == "lark" else self.kind

    def check_size(self) -> None:
        """Raises InvalidRequest."""
        if len(self.text) > MAX_CHARS:
            raise InvalidRequest(f"The {self.noun} has more than {MAX_CHARS:,} characters.")


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
        self._vocabulary = vocabulary
        self._compiled = CompiledGrammars(self._compile)
        # Now, though it takes a second for a large vocabulary: no other thread runs meanwhile
        self._tokenizer = _tokenizer(vocabulary, eos_ids)
        self._in_thought = _in_thought(vocabulary)

    def compile(self, grammar: Grammar) -> None:
        """Takes up to a second; from then on `guide` takes none, while it is kept.

        Raises InvalidRequest for a grammar that is wrong, too large, or that this vocabulary
        can't write.
        """
        self._compiled.get(grammar).matcher()

    def is_compiled(self, grammar: Grammar) -> bool:
        """Whether `compile` and `guide` take no time."""
        return self._compiled.is_compiled(grammar)

    def guide(self, grammar: Grammar, prompt_ids: Sequence[int] = ()) -> Guide:
        """A new answer's guide. What its prompt allows beside a text, a thought before it or calls
        in its place, needn't fit the grammar. Raises InvalidRequest.
        """
        dialect = self._vocabulary.dialect
        may_think = dialect.think is not None and dialect.think in prompt_ids
        may_call = dialect.tool_open is not None and dialect.tool_open in prompt_ids
        compiled = self._compiled.get(grammar)
        matcher = compiled.matcher()
        guide = Guide(
            matcher.deep_copy(),
            dialect,
            may_think=may_think,
            may_call=may_call,
            renew=partial(compiled.renew, matcher),
            in_thought=self._in_thought,
        )
        if dialect.open_thought(prompt_ids) is not None:
            guide.think()
        return guide

    def _compile(self, grammar: Grammar) -> LLMatcher:
        grammar.check_size()
        if self._tokenizer is None:
            raise InvalidRequest("Structured output needs a model with an end-of-sequence token.")
        try:
            matcher = LLMatcher(self._tokenizer, _definition(grammar), limits=LIMITS)
        except ValueError as error:
            raise InvalidRequest(f"The {grammar.noun} is wrong: {error}.") from None
        if matcher.is_error():
            reason = matcher.get_error().strip().split("\n")[0]
            raise InvalidRequest(f"The {grammar.noun} can't be used: {reason}.")
        Guide(matcher).allowed()
        return matcher


class Guide:
    """Follows one answer through its grammar."""

    def __init__(
        self,
        matcher: LLMatcher,
        dialect: Dialect = NO_DIALECT,
        *,
        may_think: bool = False,
        may_call: bool = False,
        renew: Callable[[], LLMatcher | None] = lambda: None,
        in_thought: Allowed | None = None,
    ) -> None:
        """`renew` brings a matcher for when this one is used up; `in_thought` are the tokens that
        a thought may have.
        """
        self._matcher, self._dialect = matcher, dialect
        self._renew: Callable[[], LLMatcher | None] | None = renew
        self._written: list[int] = []  # of the grammar
        # Tokens that may open something free as long as the text hasn't begun
        self._thought_open = dialect.thought_open if may_think else None
        self._call_open = dialect.call_open if may_call else None
        self._in_thought = in_thought
        self._is_thinking = False
        self._is_calling = False  # freely, to the end

    def allowed(self) -> Allowed | None:
        """The next tokens that may come; None: all.

        Raises InvalidRequest where there is none, and where the grammar has got too complex.
        """
        if self._is_calling:
            return None
        if self._is_thinking:
            return self._in_thought
        bits = self._bits()
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
        self._thought_open, self._is_thinking = None, True

    def advance(self, token_id: int) -> None:
        """Take the token that came."""
        if self._is_calling:
            return
        if self._is_thinking:
            self._is_thinking = token_id != self._dialect.thought_close
            return
        is_grammars = self._matcher.validate_tokens([token_id]) == 1
        if not is_grammars and token_id == self._thought_open:
            self.think()
        elif not is_grammars and token_id == self._call_open:
            self._is_calling = True
        else:
            self._thought_open = self._call_open = None
            self._written.append(token_id)
            self._matcher.consume_token(token_id)
            self._renew_used_up()

    def _bits(self) -> NDArray[np.uint8]:
        matcher, bits = self._matcher, self._matcher.compute_bitmask()
        self._renew_used_up()
        if self._matcher is not matcher:
            bits = self._matcher.compute_bitmask()
        return np.frombuffer(bits, np.uint8)

    def _renew_used_up(self) -> None:
        """Others may have used up the matcher: an answer goes on, once, with one of its own."""
        if self._renew is None or USED_UP not in self._matcher.get_error():
            return
        matcher, self._renew = self._renew(), None
        if matcher is not None:
            self._matcher = matcher
            matcher.consume_tokens(self._written)


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


def _in_thought(vocabulary: Vocabulary) -> Allowed:
    """[vocab_size]: text and what closes the thought, no other control token. One that ended the
    answer or opened a call there would pass by the grammar.
    """
    texts = map(vocabulary.token_bytes, range(vocabulary.vocab_size))
    allowed = np.fromiter((bool(text) for text in texts), np.bool_)
    if (thought_close := vocabulary.dialect.thought_close) is not None:
        allowed[thought_close] = True
    allowed.flags.writeable = False
    return allowed


def _tokenizer(vocabulary: Vocabulary, more_eos_ids: Sequence[int]) -> LLTokenizer | None:
    eos_ids = list(dict.fromkeys((*vocabulary.eos_ids, *more_eos_ids)))
    if not eos_ids:
        return None
    tokens: Any = _Tokens(vocabulary, eos_ids[0])
    return LLTokenizer(tokens, n_vocab=vocabulary.vocab_size, eos_token=eos_ids)


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
