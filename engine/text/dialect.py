"""Gemma 4's dialect: the parts of an answer, told apart by token ids and never by text.

`<|channel>thought\n…<channel|>` is what the model thinks, `<|tool_call>call:…<tool_call|>` a call,
all else is the answer's text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields

from engine.text.text_stream import TextStream, TokenBytes
from engine.text.tool_calls import Call, CallPiece

TURN_CLOSE = "<turn|>"  # ends every turn
CALL_CLOSE = "<tool_call|>"
RESPONSE_OPEN = "<|tool_response>"  # after its calls the model writes this, and waits
THOUGHT = "thought\n"  # the channel's name, and where it ends
MAX_OPENING = 1 + len(THOUGHT)  # tokens of a thought that is open and empty


@dataclass(frozen=True, slots=True)
class Dialect:
    """Token ids; None for what the vocabulary lacks, and then there are no such parts."""

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
        """By the texts of the tokens: released models differ in nothing else."""
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
        ids = (getattr(self, item.name) for item in fields(self))
        return {token_id for token_id in ids if token_id is not None}

    def open_thought(self, prompt_ids: Sequence[int]) -> Sequence[int] | None:
        """What a prompt has of a thought that it leaves open; None where there is none. After a
        tool's result some templates open it, so that the answer begins inside.
        """
        tail = prompt_ids[-MAX_OPENING:]
        for i in reversed(range(len(tail))):
            if tail[i] == self.thought_open:
                return tail[i + 1 :]
            if tail[i] in (self.thought_close, self.call_open, self.turn_open):
                return None
        return None

    def thoughts(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Where [start, stop) the thoughts of the last turn are, with the tokens around them."""
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


NO_DIALECT = Dialect()  # everything is text


@dataclass(slots=True)
class Parts:
    """What tokens add to an answer."""

    text: str = ""
    thought: str = ""
    tool_calls: list[CallPiece] = field(default_factory=list)
    matched_stop: str | None = None  # the stop string that the text met

    def add(self, later: Parts) -> None:
        """Append what came later; nothing met a stop string since."""
        self.text += later.text
        self.thought += later.thought
        self.tool_calls += later.tool_calls


class AnswerStream:
    """Turns the tokens of one answer into its parts, as they come.

    Stop strings end the text only. A closing token closes its own part only. What an opening token
    cuts short stands as far as it came: a thought, and the pieces of a call, which then isn't
    whole.
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
        """The calls' ids are `call_id` and the call's index. The prompt tells whether the answer
        begins in a thought.
        """
        self.num_thought_tokens = 0  # with the tokens around them
        self._tokenizer, self._dialect, self._call_id = tokenizer, dialect, call_id
        self._text = TextStream(tokenizer, stop)
        self._thought: _Thought | None = None  # the one that is open
        self._call: Call | None = None  # the same
        self._call_text = TextStream(tokenizer)
        self._num_calls = 0  # with a name
        self._are_whole = True
        if (opening := dialect.open_thought(prompt_ids)) is not None:
            self._thought = _Thought(tokenizer)
            for token_id in opening:
                self._thought.push(token_id)

    @property
    def has_calls(self) -> bool:
        """There are calls, and every one is whole."""
        is_whole = self._call is None or self._call.is_whole
        num_named = self._num_calls + (self._call is not None and self._call.name != "")
        return num_named > 0 and self._are_whole and is_whole

    def push(self, token_ids: Iterable[int]) -> Parts:
        """Add tokens; returns what is now certain. Takes none after a stop string."""
        parts = Parts()
        for token_id in token_ids:
            self._push(token_id, parts)
            if parts.matched_stop is not None:
                break
        return parts

    def finish(self) -> Parts:
        """End the answer; returns what was held back."""
        parts = Parts()
        self._close(parts)
        parts.text = self._text.finish()
        return parts

    def _push(self, token_id: int, parts: Parts) -> None:
        dialect = self._dialect
        is_in_thought = self._thought is not None and token_id != dialect.call_open
        if is_in_thought or token_id == dialect.thought_open:
            self.num_thought_tokens += 1
        if token_id == dialect.thought_open:
            self._close(parts)
            self._thought = _Thought(self._tokenizer)
        elif token_id == dialect.call_open:
            self._close(parts)
            self._call, self._call_text = Call(), TextStream(self._tokenizer)
        elif self._thought is not None:
            if token_id == dialect.thought_close:
                self._close(parts, is_closed=True)
            else:
                parts.thought += self._thought.push(token_id)
        elif self._call is not None:
            if token_id == dialect.call_close:
                self._close(parts, is_closed=True)
            else:
                self._push_call(self._call, token_id, parts)
        else:
            text, parts.matched_stop = self._text.push([token_id])
            parts.text += text

    def _push_call(self, call: Call, token_id: int, parts: Parts) -> None:
        if token_id != self._dialect.quote:
            text, _ = self._call_text.push([token_id])
            self._add(call, text, parts)
            return
        self._add(call, self._call_text.finish(), parts)
        self._call_text = TextStream(self._tokenizer)
        self._append(call, call.quote(), parts)

    def _add(self, call: Call, text: str, parts: Parts) -> None:
        was_named = call.name != ""
        arguments = call.text(text)
        if call.name and not was_named:
            head = f"{self._call_id}_{self._num_calls}", call.name
            parts.tool_calls.append(CallPiece(self._num_calls, *head, arguments))
        else:
            self._append(call, arguments, parts)

    def _append(self, call: Call, arguments: str, parts: Parts) -> None:
        if call.name and arguments:
            parts.tool_calls.append(CallPiece(self._num_calls, "", "", arguments))

    def _close(self, parts: Parts, is_closed: bool = False) -> None:
        """End the thought or the call that is open; `is_closed` by its own token."""
        if self._thought is not None:
            parts.thought += self._thought.finish(is_closed)
            self._thought = None
        if self._call is not None:
            self._add(self._call, self._call_text.finish(), parts)
            self._are_whole &= self._call.is_whole
            self._num_calls += self._call.name != ""
            self._call = None


class _Thought:
    """A thought's text without the channel's name and the line end that closes it."""

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._text = TextStream(tokenizer)
        self._held: str = ""  # may be part of either
        self._is_begun = False  # past the name

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
