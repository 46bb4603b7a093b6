"""Follows one answer through its grammar: the tokens that may come next."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidRequest
from engine.text.dialect import NO_DIALECT, Dialect

if TYPE_CHECKING:
    from llguidance import LLMatcher  # requests carry a guide, and few have one

STATES_EXHAUSTED = "too many states"  # part of llguidance's error message

TokenMask = NDArray[np.bool_]  # [vocab_size]; True for tokens that may come


class Guide:
    """Follows one answer through its grammar, token by token.

    The grammar governs the answer's text. Before the text the answer may hold a thought, or tool
    calls in its place, where the prompt allows them; these needn't match the grammar.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        dialect: Dialect = NO_DIALECT,
        *,
        may_think: bool = False,
        may_call: bool = False,
        renew: Callable[[], LLMatcher | None] = lambda: None,
        thought_mask: TokenMask | None = None,
    ) -> None:
        """Start at the beginning of an answer.

        Args:
            matcher: A copy of the compiled grammar for this answer alone.
            dialect: The control tokens that open and close thoughts and calls.
            may_think: True if a thought may come before the text.
            may_call: True if tool calls may come in place of the text.
            renew: Returns a fresh matcher when the lexer states of this one are exhausted; None
                where there is none.
            thought_mask: Tokens that may come within a thought; None allows all.
        """
        self._matcher, self._dialect = matcher, dialect
        self._renew: Callable[[], LLMatcher | None] | None = renew
        self._consumed: list[int] = []  # the tokens that the matcher has taken
        # Control tokens that may still come, until the text has begun
        self._thought_open = dialect.thought_open if may_think else None
        self._call_open = dialect.call_open if may_call else None
        self._thought_mask = thought_mask
        self._is_thinking = False
        self._is_calling = False  # without a grammar, to the end of the answer

    def allowed(self) -> TokenMask | None:
        """Return which tokens may come next; None allows all.

        Raises:
            InvalidRequest: No token may come, or the grammar has become too complex.
        """
        if self._is_calling:
            return None
        if self._is_thinking:
            return self._thought_mask
        allowed = np.unpackbits(self._bitmask(), bitorder="little").view(np.bool_)
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

    def begin_thought(self) -> None:
        """Note that a thought has begun; no other may follow it."""
        self._thought_open, self._is_thinking = None, True

    def advance(self, token_id: int) -> None:
        """Take the next token of the answer."""
        if self._is_calling:
            return
        if self._is_thinking:
            self._is_thinking = token_id != self._dialect.thought_close
            return
        is_in_grammar = self._matcher.validate_tokens([token_id]) == 1
        if not is_in_grammar and token_id == self._thought_open:
            self.begin_thought()
        elif not is_in_grammar and token_id == self._call_open:
            self._is_calling = True
        else:
            self._thought_open = self._call_open = None
            self._consumed.append(token_id)
            self._matcher.consume_token(token_id)
            self._renew_exhausted()

    def _bitmask(self) -> NDArray[np.uint8]:
        matcher, bits = self._matcher, self._matcher.compute_bitmask()
        self._renew_exhausted()
        if self._matcher is not matcher:
            bits = self._matcher.compute_bitmask()
        return np.frombuffer(bits, np.uint8)

    def _renew_exhausted(self) -> None:
        """Replace a matcher whose states other answers have exhausted; once per answer."""
        if self._renew is None or STATES_EXHAUSTED not in self._matcher.get_error():
            return
        matcher, self._renew = self._renew(), None
        if matcher is not None:
            self._matcher = matcher
            matcher.consume_tokens(self._consumed)
