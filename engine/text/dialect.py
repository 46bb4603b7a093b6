"""Gemma 4's control tokens, by which an answer splits into text, thoughts and tool calls.

`<|channel>thought\n…<channel|>` is a thought (vLLM: reasoning), `<|tool_call>call:…<tool_call|>` a
tool call, everything else the answer's text. Token ids decide, never the text: a model may write
`<|channel>` in letters without opening a thought.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields

from engine.text.text_stream import TextStream, TokenBytes
from engine.text.tool_calls import ToolCallDelta, ToolCallParser

TURN_CLOSE = "<turn|>"  # ends every turn
CALL_CLOSE = "<tool_call|>"
RESPONSE_OPEN = "<|tool_response>"  # ends an answer with calls: the tools' results follow
THOUGHT = "thought\n"  # the channel's name and the line end after it
MAX_OPENING = 1 + len(THOUGHT)  # tokens of a thought that is open and still empty


@dataclass(frozen=True, slots=True)
class Dialect:
    """The control tokens' ids; None for a token that the vocabulary lacks, and then answers have
    no such parts.
    """

    turn_open: int | None = None
    thought_open: int | None = None
    thought_close: int | None = None
    call_open: int | None = None
    call_close: int | None = None
    quote: int | None = None  # begins and ends a string in a call
    think: int | None = None  # in a prompt: the model may think
    tool_open: int | None = None  # in a prompt: declares a tool

    @staticmethod
    def find(token_to_id: Callable[[str], int | None]) -> Dialect:
        """Look the control tokens up by their texts; released models differ in the ids only."""
        return Dialect(
            turn_open=token_to_id("<|turn>"),
            thought_open=token_to_id("<|channel>"),
            thought_close=token_to_id("<channel|>"),
            call_open=token_to_id("<|tool_call>"),
            call_close=token_to_id(CALL_CLOSE),
            quote=token_to_id('<|"|>'),
            think=token_to_id("<|think|>"),
            tool_open=token_to_id("<|tool>"),
        )

    @property
    def token_ids(self) -> set[int]:
        """The ids of all control tokens that the vocabulary has."""
        ids = (getattr(self, item.name) for item in fields(self))
        return {token_id for token_id in ids if token_id is not None}

    def open_thought(self, prompt_ids: Sequence[int]) -> Sequence[int] | None:
        """Return the tokens of the thought that a prompt leaves open, None if it leaves none open.

        Some templates open a thought after a tool's result, so that the answer begins within it.
        """
        tail = prompt_ids[-MAX_OPENING:]
        for i in reversed(range(len(tail))):
            if tail[i] == self.thought_open:
                return tail[i + 1 :]
            if tail[i] in (self.thought_close, self.call_open, self.turn_open):
                return None
        return None

    def thoughts(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return the ranges [start, stop) of the last turn's thoughts, control tokens included."""
        spans: list[tuple[int, int]] = []
        start = None
        for i in range(self._last_turn(token_ids), len(token_ids)):
            if token_ids[i] == self.thought_open and start is None:
                start = i
            elif token_ids[i] in (self.thought_close, self.call_open) and start is not None:
                spans.append((start, i + (token_ids[i] == self.thought_close)))
                start = None
        return spans if start is None else [*spans, (start, len(token_ids))]

    def _last_turn(self, token_ids: Sequence[int]) -> int:
        turns = (i for i in reversed(range(len(token_ids))) if token_ids[i] == self.turn_open)
        return next(turns, 0)


NO_DIALECT = Dialect()  # without control tokens everything is text


@dataclass(slots=True)
class AnswerDelta:
    """What one or more tokens add to an answer."""

    text: str = ""
    thought: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    matched_stop: str | None = None  # the stop string that the text has reached

    def add(self, later: AnswerDelta) -> None:
        """Append a later delta, which reached no stop string."""
        self.text += later.text
        self.thought += later.thought
        self.tool_calls += later.tool_calls


class AnswerStream:
    """Splits the tokens of one answer into text, thoughts and tool calls as they come.

    Stop strings are looked for in the text only. A closing token closes its own kind of part only.
    An opening token also ends the part before it: what there was of a thought stands, and a call
    stays incomplete.
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        dialect: Dialect = NO_DIALECT,
        stop: Sequence[str] = (),
        *,
        call_id: str = "call",
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """Begin an answer.

        Args:
            tokenizer: Gives the bytes of a token.
            dialect: The control tokens; without it everything is text.
            stop: Strings that end the text.
            call_id: Prefix of the calls' ids; the call's index follows.
            prompt_ids: The prompt, which may have opened a thought.
        """
        self.num_thought_tokens = 0  # control tokens included
        self._tokenizer, self._dialect, self._call_id = tokenizer, dialect, call_id
        self._text = TextStream(tokenizer, stop)
        self._thought: _ThoughtStream | None = None  # the open one
        self._call: ToolCallParser | None = None  # the open one
        self._call_text = TextStream(tokenizer)
        self._num_calls = 0  # closed ones that have a name
        self._are_complete = True  # the closed calls
        if (opening := dialect.open_thought(prompt_ids)) is not None:
            self._thought = _ThoughtStream(tokenizer)
            for token_id in opening:
                self._thought.push(token_id)

    @property
    def has_calls(self) -> bool:
        """True if the answer has tool calls and all of them are complete."""
        is_complete = self._call is None or self._call.is_complete
        num_named = self._num_calls + (self._call is not None and self._call.name != "")
        return num_named > 0 and self._are_complete and is_complete

    def push(self, token_ids: Iterable[int]) -> AnswerDelta:
        """Take tokens, up to a stop string; returns what can't change any more."""
        delta = AnswerDelta()
        for token_id in token_ids:
            self._push_token(token_id, delta)
            if delta.matched_stop is not None:
                break
        return delta

    def finish(self) -> AnswerDelta:
        """End the answer; returns the text that was held back."""
        delta = AnswerDelta()
        self._close(delta)
        delta.text = self._text.finish()
        return delta

    def _push_token(self, token_id: int, delta: AnswerDelta) -> None:
        dialect = self._dialect
        is_in_thought = self._thought is not None and token_id != dialect.call_open
        if is_in_thought or token_id == dialect.thought_open:
            self.num_thought_tokens += 1
        if token_id == dialect.thought_open:
            self._close(delta)
            self._thought = _ThoughtStream(self._tokenizer)
        elif token_id == dialect.call_open:
            self._close(delta)
            self._call, self._call_text = ToolCallParser(), TextStream(self._tokenizer)
        elif self._thought is not None:
            if token_id == dialect.thought_close:
                self._close(delta, is_closed=True)
            else:
                delta.thought += self._thought.push(token_id)
        elif self._call is not None:
            if token_id == dialect.call_close:
                self._close(delta, is_closed=True)
            else:
                self._push_call_token(self._call, token_id, delta)
        else:
            text, delta.matched_stop = self._text.push([token_id])
            delta.text += text

    def _push_call_token(self, call: ToolCallParser, token_id: int, delta: AnswerDelta) -> None:
        if token_id != self._dialect.quote:
            text, _ = self._call_text.push([token_id])
            self._push_call_text(call, text, delta)
            return
        self._push_call_text(call, self._call_text.finish(), delta)
        self._call_text = TextStream(self._tokenizer)
        self._add_arguments(call, call.push_quote(), delta)

    def _push_call_text(self, call: ToolCallParser, text: str, delta: AnswerDelta) -> None:
        was_named = call.name != ""
        arguments = call.push_text(text)
        if call.name and not was_named:
            call_id = f"{self._call_id}_{self._num_calls}"
            delta.tool_calls.append(
                ToolCallDelta(self._num_calls, arguments, id=call_id, name=call.name)
            )
        else:
            self._add_arguments(call, arguments, delta)

    def _add_arguments(self, call: ToolCallParser, arguments: str, delta: AnswerDelta) -> None:
        if call.name and arguments:
            delta.tool_calls.append(ToolCallDelta(self._num_calls, arguments))

    def _close(self, delta: AnswerDelta, is_closed: bool = False) -> None:
        """End the open thought or call; `is_closed` if its own closing token ends it."""
        if self._thought is not None:
            delta.thought += self._thought.finish(is_closed)
            self._thought = None
        if self._call is not None:
            self._push_call_text(self._call, self._call_text.finish(), delta)
            self._are_complete &= self._call.is_complete
            self._num_calls += self._call.name != ""
            self._call = None


class _ThoughtStream:
    """A thought's text without the channel's name and the line end before the closing token."""

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._text = TextStream(tokenizer)
        self._held = ""  # may belong to the name or be the last line end
        self._is_begun = False  # the name has ended

    def push(self, token_id: int) -> str:
        self._held += self._text.push([token_id])[0]
        if not self._is_begun:
            if len(self._held) < len(THOUGHT) and THOUGHT.startswith(self._held):
                return ""
            self._is_begun = True
            self._held = self._held.removeprefix(THOUGHT)
        text = self._held.removesuffix("\n")
        self._held = self._held[len(text) :]
        return text

    def finish(self, is_closed: bool) -> str:
        held = self._held + self._text.finish()
        if not self._is_begun:
            return "" if THOUGHT.startswith(held) else held
        return held.removesuffix("\n") if is_closed else held
