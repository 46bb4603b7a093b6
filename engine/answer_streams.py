"""AnswerStreams: the answers of all requests, token by token: their parts, formats and ends."""

from __future__ import annotations

from collections.abc import Collection, Set
from typing import NamedTuple

from engine.request import FinishReason, Request
from engine.text.dialect import NO_DIALECT, AnswerDelta, AnswerStream
from engine.text.grammars import Grammars
from engine.text.tokenizer import Tokenizer


class End(NamedTuple):
    """The end of an answer with its last token."""

    reason: FinishReason
    matched_stop: str | int | None = None  # the stop string or stop token id that ended it


class AnswerStreams:
    """Appends sampled tokens to their requests and turns them into parts of the answers."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        grammars: Grammars | None,
        eos_token_ids: Collection[int],
    ) -> None:
        """Without a tokenizer answers have token ids only, and there are no grammars."""
        self._tokenizer, self._grammars = tokenizer, grammars
        self._eos_token_ids = eos_token_ids
        self._streams: dict[str, AnswerStream] = {}

    @property
    def request_ids(self) -> Set[str]:
        """Ids of the requests whose answers are open."""
        return self._streams.keys()

    def begin(self, request: Request, chat: bool) -> End | None:
        """Open a request's answer; returns its end if its last output token is one.

        Output that it comes with is taken into account, but not returned again.
        """
        self._guide(request)
        self._open(request, chat)
        if not request.output_ids:
            return None
        is_stop = self._is_stop_token(request, request.output_ids[-1])
        delta = self._push(request, request.output_ids[:-1] if is_stop else request.output_ids)
        return self._end_of(request, delta.matched_stop)

    def append(self, request: Request, token_id: int) -> tuple[AnswerDelta, End | None]:
        """Append a sampled token; returns what it adds to the answer, and the end if it is one."""
        request.output_ids.append(token_id)
        if request.guide is not None:
            request.guide.advance(token_id)
        delta = AnswerDelta()
        if not self._is_stop_token(request, token_id):  # the answer doesn't include it
            delta = self._push(request, [token_id])
        return delta, self._end_of(request, delta.matched_stop)

    def finish(self, request: Request) -> AnswerDelta:
        """Close the answer of a finished request; returns the rest that was held back."""
        stream = self._streams.pop(request.request_id, None)
        delta = AnswerDelta() if stream is None else stream.finish()
        self._set_lasting_tokens(request)
        return delta

    def withdraw(self, request: Request) -> None:
        """Undo `begin`, also one that failed halfway."""
        self._streams.pop(request.request_id, None)

    def _guide(self, request: Request) -> None:
        """Begin to follow the request's grammar, if it has one."""
        grammar = request.sampling.grammar
        if grammar is not None and self._grammars is not None:
            request.guide = self._grammars.guide(grammar, request.prompt_ids)
            for token_id in request.output_ids:
                request.guide.advance(token_id)

    def _open(self, request: Request, chat: bool) -> None:
        if self._tokenizer is not None:
            self._streams[request.request_id] = AnswerStream(
                self._tokenizer,
                self._tokenizer.dialect if chat else NO_DIALECT,
                request.sampling.stop,
                call_id=f"call_{request.request_id}",
                prompt_ids=request.prompt_ids,
            )

    def _push(self, request: Request, token_ids: list[int]) -> AnswerDelta:
        stream = self._streams.get(request.request_id)
        if stream is None:
            return AnswerDelta()
        delta = stream.push(token_ids)
        request.num_thought_tokens = stream.num_thought_tokens
        return delta

    def _end_of(self, request: Request, matched: str | None) -> End | None:
        """Return the end that the last output token is; `matched` is a stop string it completes."""
        last = request.output_ids[-1]
        if self._is_stop_token(request, last):
            stream = self._streams.get(request.request_id)
            if stream is not None and stream.has_calls:
                return End(FinishReason.TOOL_CALLS)
            is_asked_for = last in request.sampling.stop_token_ids
            return End(FinishReason.STOP, last if is_asked_for else None)
        if matched is not None:
            return End(FinishReason.STOP, matched)
        if len(request.output_ids) >= request.max_tokens:
            return End(FinishReason.LENGTH)
        return None

    def _is_stop_token(self, request: Request, token_id: int) -> bool:
        sampling = request.sampling
        is_eos = token_id in self._eos_token_ids and not sampling.ignore_eos
        return is_eos or token_id in sampling.stop_token_ids

    def _set_lasting_tokens(self, request: Request) -> None:
        """Record how many tokens its session goes on with: not the thoughts of a turn that ended.

        After tool calls the turn goes on.
        """
        is_turn_over = request.finish_reason is not FinishReason.TOOL_CALLS
        if request.session is not None and self._tokenizer is not None and is_turn_over:
            thoughts = self._tokenizer.thoughts(request.token_ids(0, request.num_tokens))
            request.num_lasting_tokens = thoughts[0][0] if thoughts else None
