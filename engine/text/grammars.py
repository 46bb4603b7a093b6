"""Structured output: keeps compiled grammars and gives each answer its guide."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cluster.errors import InvalidRequest
from engine.text.grammar import Grammar
from engine.text.grammar_compiler import GrammarCompiler, Vocabulary
from engine.text.guide import Guide, TokenMask

if TYPE_CHECKING:
    from llguidance import LLMatcher

NUM_KEPT = 64  # compiled grammars, the most recently used ones
MAX_RENEW_S = 0.02  # a step may wait this long for a grammar to be compiled again


class Grammars:
    """The most recently used grammars, compiled for one vocabulary. Threads may share it."""

    def __init__(self, vocabulary: Vocabulary, extra_eos_ids: Sequence[int] = ()) -> None:
        """Prepare the vocabulary.

        Args:
            vocabulary: The model's tokenizer.
            extra_eos_ids: Token ids that end an answer, besides the vocabulary's own.
        """
        # Here, since no other thread runs while the vocabulary is loaded.
        self._compiler = GrammarCompiler(vocabulary, extra_eos_ids)
        self._dialect = vocabulary.dialect
        self._thought_mask = _thought_mask(vocabulary)
        self._kept: OrderedDict[Grammar, _CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> None:
        """Compile and keep a grammar, which takes up to a second, so that `guide` is quick.

        Raises:
            InvalidRequest: The grammar is invalid or too large, or this vocabulary can't write it.
        """
        self._find(grammar).matcher()

    def is_compiled(self, grammar: Grammar) -> bool:
        """Return whether `compile` and `guide` would take no time; a miss evicts no other."""
        with self._lock:
            if grammar not in self._kept:
                return False
            self._kept.move_to_end(grammar)
            return self._kept[grammar].is_compiled

    def guide(self, grammar: Grammar, prompt_ids: Sequence[int] = ()) -> Guide:
        """Return a guide for a new answer; compiles the grammar if it isn't kept.

        Args:
            grammar: What the answer's text must match.
            prompt_ids: The prompt, which may allow thoughts and calls or leave a thought open.

        Raises:
            InvalidRequest: See `compile`.
        """
        dialect = self._dialect
        compiled = self._find(grammar)
        matcher = compiled.matcher()
        guide = Guide(
            matcher.deep_copy(),
            dialect,
            may_think=dialect.think is not None and dialect.think in prompt_ids,
            may_call=dialect.tool_open is not None and dialect.tool_open in prompt_ids,
            renew=partial(compiled.renew, matcher),
            thought_mask=self._thought_mask,
        )
        if dialect.open_thought(prompt_ids) is not None:
            guide.begin_thought()
        return guide

    def _find(self, grammar: Grammar) -> _CompiledGrammar:
        """The kept entry, or a new one, which isn't compiled yet."""
        with self._lock:
            if grammar not in self._kept:
                compile_grammar = partial(self._compiler.compile, grammar)
                self._kept[grammar] = _CompiledGrammar(compile_grammar)
                if len(self._kept) > NUM_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(grammar)
            return self._kept[grammar]


class _CompiledGrammar:
    """One grammar's matcher, or the error that it gave; compiled on first use.

    The copies of a matcher share the states of its lexer. These are limited and only grow, so in
    the end they are exhausted for all copies.
    """

    def __init__(self, compile_grammar: Callable[[], LLMatcher]) -> None:
        """`compile_grammar` may raise InvalidRequest, which is kept as well."""
        self._compile, self._lock = compile_grammar, threading.Lock()
        self._compiled: LLMatcher | InvalidRequest | None = None
        self._compile_s = 0.0

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def matcher(self) -> LLMatcher:
        """Return the matcher, for the caller to copy. Raises InvalidRequest."""
        with self._lock:
            if self._compiled is None:
                self._compiled = self._compile_timed()
            compiled = self._compiled
        if isinstance(compiled, InvalidRequest):
            raise InvalidRequest(str(compiled))
        return compiled

    def renew(self, exhausted: LLMatcher) -> LLMatcher | None:
        """Return a fresh matcher for an answer under way, shared with no other; None if compiling
        it would hold up the step. New answers no longer get copies of `exhausted`.
        """
        with self._lock:
            if self._compiled is exhausted:
                self._compiled = None
        return self._compile() if self._compile_s < MAX_RENEW_S else None

    def _compile_timed(self) -> LLMatcher | InvalidRequest:
        started_at = time.monotonic()
        try:
            return self._compile()
        except InvalidRequest as error:
            return error
        finally:
            self._compile_s = time.monotonic() - started_at


def _thought_mask(vocabulary: Vocabulary) -> TokenMask:
    """[vocab_size]: text and the token that closes the thought. Any other control token might end
    the answer or open a call, and so bypass the grammar.
    """
    texts = map(vocabulary.token_bytes, range(vocabulary.vocab_size))
    allowed = np.fromiter((bool(text) for text in texts), np.bool_)
    if (thought_close := vocabulary.dialect.thought_close) is not None:
        allowed[thought_close] = True
    allowed.flags.writeable = False
    return allowed
