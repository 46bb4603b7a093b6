"""The decoder as a gateway sees it: its status, the answers it works on, the link to it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from cluster.errors import BrioletteError, Unavailable
from cluster.links.connect import Endpoint
from deployments.gateway.calls.output_collector import OutputCollector, request_failed
from deployments.gateway.decoder_link import DecoderLink
from protos.briolette.v1.admin_pb2 import ClusterStatus
from protos.briolette.v1.inference_pb2 import Sampling
from protos.briolette.v1.stream_pb2 import (
    Add,
    FromDecoder,
    Missing,
    SessionAnswer,
    SessionCall,
    SessionTrace,
    Spent,
    ToDecoder,
)

MAX_TRACED = 1024  # sessions whose traces wait to be written down

log = logging.getLogger(__name__)


class DecoderRequest(NamedTuple):
    """A request that was checked and tokenized."""

    add: Add  # without the prompt
    prompt_ids: Sequence[int]


class RemoteDecoder:
    """Sends requests to the decoder and keeps what it says; runs on one asyncio loop."""

    def __init__(
        self,
        find: Callable[[], Endpoint],
        secret: bytes,
        on_status: Callable[[], None],
        on_spent: Callable[[Spent], None],
    ) -> None:
        """`find` returns the decoder's endpoint or raises LinkError; it runs in a thread.

        `on_status` is called whenever there is a new `status`, `on_spent` at the end of each
        request that the decoder accepted, however it ended.
        """
        self.status = ClusterStatus(reason="The decoder is still loading the model.")
        self._find = find
        self._secret = secret
        self._on_status = on_status
        self._on_spent = on_spent
        self._collectors: dict[str, OutputCollector] = {}  # by request
        self._calls: dict[str, asyncio.Future[SessionAnswer]] = {}
        self._traces: dict[tuple[str, str], set[bytes]] = {}

    def connect(self) -> None:
        """Keep a link from now on, calling back on the loop that runs."""
        self._link = DecoderLink(
            asyncio.get_running_loop(),
            self._secret,
            self._find,
            self._on_message,
            self._on_lost,
            self._on_silent,
        )

    async def settle(self, timeout_s: float) -> None:
        """End every stream, and wait until the decoder has told what each has cost."""
        self._fail_all("The gateway is stopping; ask again.")
        with suppress(BrioletteError):
            await self.call(SessionCall(), timeout_s)  # answered after all that was sent before

    def close(self) -> None:
        self._link.close()

    def problem(self) -> str | None:
        """What no reconnecting will mend; None while all is well."""
        return None if self._link.is_alive else "The link to the decoder has no thread any more."

    @contextmanager
    def generate(self, requests: Sequence[DecoderRequest]) -> Iterator[OutputCollector]:
        """Start a call's requests, and abort those that have not finished at the end of the block.

        Args:
            requests: with `same_prompt`, one shares the prompt and the format of the one before.

        Raises:
            Unavailable: the decoder isn't ready.
        """
        if not self.status.ready:
            raise Unavailable(self.status.reason)
        request_ids = [add.request_id for add, _ in requests]
        collector = OutputCollector(request_ids, self._abort)
        self._collectors |= dict.fromkeys(request_ids, collector)
        try:
            self._add(requests)
            yield collector
        finally:
            for request_id in request_ids:
                del self._collectors[request_id]
            collector.abort()

    async def call(self, call: SessionCall, timeout_s: float) -> SessionAnswer:
        """Ask what memory holds, or to free it. Gives `call` its id. Raises Unavailable."""
        if not self.status.ready:
            raise Unavailable(self.status.reason)
        call.call_id = uuid.uuid4().hex
        answer = self._calls[call.call_id] = asyncio.get_running_loop().create_future()
        self._link.send(ToDecoder(session_calls=[call]))
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise Unavailable("The decoder does not answer right now.") from None
        finally:
            del self._calls[call.call_id]

    def tell_missing(self, tenant: str, keys: Sequence[bytes]) -> None:
        """The store lacks these values: what the decoder has of them, it saves again."""
        if keys:
            self._link.send(ToDecoder(missing=[Missing(tenant=tenant, keys=keys)]))

    def traces(self, tenant: str, session: str) -> frozenset[bytes]:
        """Keys of what turns of a session may have left in the store, until they are forgotten."""
        return frozenset(self._traces.get((tenant, session), ()))

    def forget_traces(self, tenant: str, session: str, keys: frozenset[bytes]) -> None:
        """These are written down; others may have come meanwhile."""
        left = self._traces.pop((tenant, session), set()) - keys
        if left:
            self._traces[tenant, session] = left

    def _add(self, requests: Sequence[DecoderRequest]) -> None:
        """Send one message for each prompt."""
        messages: list[ToDecoder] = []
        for add, prompt_ids in requests:
            if add.same_prompt:
                add.sampling.CopyFrom(_seed_alone(add.sampling))
            else:
                add.prompt_ids.extend(prompt_ids)
                messages.append(ToDecoder())
            messages[-1].adds.append(add)
        for message in messages:
            self._link.send(message)

    def _abort(self, request_ids: Sequence[str]) -> None:
        self._link.send(ToDecoder(aborts=request_ids))

    def _fail_all(self, reason: str) -> None:
        """End every call with UNAVAILABLE, and abort its requests, which may be on their way."""
        for collector in list(self._collectors.values()):
            if not collector.is_finished:
                collector.fail(Unavailable(reason))

    def _on_message(self, message: FromDecoder) -> None:
        for trace in message.session_traces:
            self._note(trace)
        for spent in message.spent:
            self._on_spent(spent)
        for output in message.outputs:
            if (collector := self._collectors.get(output.request_id)) is not None:
                collector.push(output)
        for answer in message.session_answers:
            self._take_answer(answer)
        if message.HasField("status"):
            self._set_status(message.status)

    def _note(self, trace: SessionTrace) -> None:
        self._traces.setdefault((trace.tenant, trace.session), set()).update(trace.keys)
        if len(self._traces) > MAX_TRACED:  # they expire in the store
            del self._traces[next(iter(self._traces))]

    def _take_answer(self, answer: SessionAnswer) -> None:
        waiting = self._calls.get(answer.call_id)
        if waiting is None or waiting.done():
            return  # nobody waits any more
        if answer.HasField("failure"):
            waiting.set_exception(request_failed(answer.failure))
        else:
            waiting.set_result(answer)

    def _on_lost(self, reason: str) -> None:
        log.warning("No link to the decoder: %s", reason)
        gone = "The decoder that worked on this answer is gone; ask again."
        self._fail_all(gone)
        for waiting in self._calls.values():
            if not waiting.done():
                waiting.set_exception(Unavailable(gone))
        self._set_unready("The decoder is not reachable right now.")

    def _on_silent(self) -> None:
        """Streams stay open: it may go on."""
        self._set_unready("The decoder does not answer right now.")

    def _set_unready(self, reason: str) -> None:
        status = ClusterStatus()
        status.CopyFrom(self.status)
        status.ready = False
        status.reason = reason
        self._set_status(status)

    def _set_status(self, status: ClusterStatus) -> None:
        self.status = status
        self._on_status()


def _seed_alone(sampling: Sampling) -> Sampling:
    return Sampling(seed=sampling.seed if sampling.HasField("seed") else None)
