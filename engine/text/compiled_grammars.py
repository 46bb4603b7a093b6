"""Compiled grammars: kept for the next answers, made anew when they are used up."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from llguidance import LLMatcher

from cluster.errors import InvalidRequest

if TYPE_CHECKING:
    from engine.text.grammar import Grammar

NUM_KEPT = 64  # the last used ones
MAX_RENEW_S = 0.02  # a step may wait so long for a grammar that is compiled anew


class CompiledGrammars:
    """Any thread may call."""

    def __init__(self, compile_one: Callable[[Grammar], LLMatcher]) -> None:
        """`compile_one` may raise InvalidRequest, which is kept as well."""
        self._compile_one = compile_one
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, grammar: Grammar) -> CompiledGrammar:
        """The one that is kept or, from now on, a new one, which isn't compiled yet."""
        with self._lock:
            if grammar not in self._kept:
                self._kept[grammar] = CompiledGrammar(partial(self._compile_one, grammar))
                if len(self._kept) > NUM_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(grammar)
            return self._kept[grammar]

    def is_compiled(self, grammar: Grammar) -> bool:
        """Looking takes no place from another one."""
        with self._lock:
            if grammar not in self._kept:
                return False
            self._kept.move_to_end(grammar)
            return self._kept[grammar].is_compiled


class CompiledGrammar:
    """A grammar's matcher, or what is wrong with it, as soon as somebody has asked for it.

    The copies of a matcher share the states of its lexer, which are limited and only get more: in
    the end it is used up for all of them.
    """

    def __init__(self, compile_it: Callable[[], LLMatcher]) -> None:
        self._compile, self._lock = compile_it, threading.Lock()
        self._compiled: LLMatcher | InvalidRequest | None = None
        self._compile_s = 0.0

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def matcher(self) -> LLMatcher:
        """To be copied. Raises InvalidRequest."""
        with self._lock:
            compiled = self._compiled
            if compiled is None:
                compiled = self._compiled = self._first()
        if isinstance(compiled, InvalidRequest):
            raise InvalidRequest(str(compiled))
        return compiled

    def renew(self, used_up: LLMatcher) -> LLMatcher | None:
        """One that is shared with nobody, for an answer under way; None if the step would wait for
        it. New answers get no copy of the one that is used up.
        """
        with self._lock:
            if self._compiled is used_up:
                self._compiled = None
        return self._compile() if self._compile_s < MAX_RENEW_S else None

    def _first(self) -> LLMatcher | InvalidRequest:
        started = time.monotonic()
        try:
            return self._compile()
        except InvalidRequest as error:
            return error
        finally:
            self._compile_s = time.monotonic() - started
