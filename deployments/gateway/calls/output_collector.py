"""Outputs between the decoder and a client: collected per call, merged while the client is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from cluster.errors import BrioletteError, RequestFailed, StalledClient
from protos.briolette.v1.inference_pb2 import FINISH_REASON_UNSPECIFIED, Generation
from protos.briolette.v1.stream_pb2 import Failure, Output

MAX_BUFFERED_TOKENS = 4096  # of one answer; a client further behind than this is not reading


class OutputCollector:
    """Receives the outputs of one call's requests.

    Outputs of a request that were not taken yet are merged into one, so a slow client costs one
    message however far behind it is, up to MAX_BUFFERED_TOKENS.
    """

    def __init__(self, request_ids: Sequence[str], abort: Callable[[Sequence[str]], None]) -> None:
        """`abort` tells the decoder to end requests."""
        self._unfinished = dict.fromkeys(request_ids)  # the decoder has more for them
        self._abort = abort
        self._pending: dict[str, Output] = {}  # by request, the one that waits longest first
        self._error: BrioletteError | None = None
        self._wake = asyncio.Event()

    @property
    def is_finished(self) -> bool:
        """True if the decoder has nothing more to say."""
        return not self._unfinished

    def push(self, output: Output) -> None:
        """Receive an output; one for a request that has ended already is dropped."""
        request_id = output.request_id
        if request_id not in self._unfinished:
            return
        if output.HasField("failure"):
            del self._unfinished[request_id]
            self.fail(request_failed(output.failure))
            return
        if output.generation.finish_reason != FINISH_REASON_UNSPECIFIED:
            del self._unfinished[request_id]
        if (pending := self._pending.get(request_id)) is None:
            self._pending[request_id] = output
        else:
            merge(pending.generation, output.generation)
            pending.block_keys.extend(output.block_keys)
            self._check_backlog(pending)
        self._wake.set()

    def fail(self, error: BrioletteError) -> None:
        """End the call with an error, the first one if there are several.

        What was not taken yet is lost, and requests that have not finished are aborted.
        """
        self._error = self._error or error
        self.abort()
        self._wake.set()

    def abort(self) -> None:
        """Tell the decoder to end the requests that have not finished."""
        if self._unfinished:
            self._abort(list(self._unfinished))
            self._unfinished.clear()

    async def take(self) -> Output:
        """Return what is new of one request, as soon as there is something.

        Raises the error that the call has ended with.
        """
        await self._wake.wait()
        if self._error is not None:
            raise self._error
        output = self._pending.pop(next(iter(self._pending)))
        if not self._pending:
            self._wake.clear()
        return output

    def _check_backlog(self, pending: Output) -> None:
        is_finished = pending.request_id not in self._unfinished
        if not is_finished and len(pending.generation.token_ids) > MAX_BUFFERED_TOKENS:
            self.fail(StalledClient("The client reads more slowly than the model writes."))


def request_failed(failure: Failure) -> RequestFailed:
    """Return the error that the decoder ended a request with."""
    return RequestFailed(failure.sentence, failure.status, failure.kind)


def merge(answer: Generation, piece: Generation) -> None:
    """Append a piece to what there is of an answer."""
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
