"""The streams of a gateway: what each request has received and its client hasn't yet taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.errors import BrioletteError, Overloaded, Unavailable
from protos.briolette.v1.inference_pb2 import FINISH_REASON_UNSPECIFIED, Generation
from protos.briolette.v1.stream_pb2 import Failure, Output

MAX_BUFFERED_TOKENS = 4096  # a client that is further behind than this is not reading


class StalledClient(Overloaded):
    """The client doesn't take what is sent to it."""


class RequestFailed(BrioletteError):
    """The decoder ended a request without an answer; carries the decoder's own status."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.sentence)
        self.status = failure.status
        self.kind = failure.kind or failure.status.lower()


class Stream:
    """One request's answer on its way to its client.

    Pieces that the client hasn't taken yet are merged into one, so a slow client costs one message
    however far behind it is, up to MAX_BUFFERED_TOKENS.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.is_finished = False  # the decoder has nothing more for it
        self._pending: Output | None = None
        self._error: BrioletteError | None = None
        self._wake = asyncio.Event()

    def push(self, output: Output) -> None:
        """Take what the decoder sent."""
        if output.HasField("failure"):
            self.fail(RequestFailed(output.failure))
            return
        self.is_finished = output.generation.finish_reason != FINISH_REASON_UNSPECIFIED
        if self._pending is None:
            self._pending = output
        else:
            merge(self._pending.generation, output.generation)
            self._pending.block_keys.extend(output.block_keys)
        self._wake.set()

    @property
    def is_behind(self) -> bool:
        """The client is too slow for what still comes."""
        if self._pending is None or self.is_finished:
            return False
        return len(self._pending.generation.token_ids) > MAX_BUFFERED_TOKENS

    def fail(self, error: BrioletteError) -> None:
        """End with an error; what was not taken yet is lost."""
        self._error = error
        self.is_finished = True
        self._wake.set()

    async def take(self) -> Output:
        """Everything new, as soon as there is something. Raises what the stream failed with."""
        await self._wake.wait()
        self._wake.clear()
        if self._error is not None:
            raise self._error
        output, self._pending = self._pending, None
        assert output is not None
        return output


def merge(answer: Generation, piece: Generation) -> None:
    """Append a piece to what is there of an answer."""
    text, thought = answer.text + piece.text, answer.thought + piece.thought
    num_calls = len(answer.tool_calls)
    answer.MergeFrom(piece)
    answer.text, answer.thought = text, thought
    del answer.tool_calls[num_calls:]
    for call in piece.tool_calls:
        if answer.tool_calls and answer.tool_calls[-1].index == call.index:
            answer.tool_calls[-1].arguments += call.arguments
        else:
            answer.tool_calls.append(call)


class Streams:
    """Every open stream by its request id; `abort(request_id)` is called for one given up here."""

    def __init__(self, abort: Callable[[str], None]) -> None:
        self._streams: dict[str, Stream] = {}
        self._abort = abort

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request_id: str) -> Stream:
        stream = self._streams[request_id] = Stream(request_id)
        return stream

    def close(self, stream: Stream) -> None:
        self._streams.pop(stream.request_id, None)

    def push(self, output: Output) -> None:
        """Hand on an output; one for a stream that has ended already is dropped."""
        stream = self._streams.get(output.request_id)
        if stream is None or stream.is_finished:
            return
        stream.push(output)
        if stream.is_behind:
            stream.fail(StalledClient("The client reads more slowly than the model writes."))
            self._abort(stream.request_id)

    def fail_all(self, reason: str) -> None:
        """End every open stream with UNAVAILABLE. The decoder is told, for a request may still be
        on its way there.
        """
        for stream in self._streams.values():
            if not stream.is_finished:
                stream.fail(Unavailable(reason))
                self._abort(stream.request_id)
