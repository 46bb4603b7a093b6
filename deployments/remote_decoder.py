"""The decoder as a gateway sees it: its status, the answers it works on, the link to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from cluster.errors import Unavailable
from cluster.links import Endpoint
from deployments.decoder_link import DecoderLink
from deployments.streams import Streams
from protos.briolette.v1.admin_pb2 import ClusterStatus
from protos.briolette.v1.inference_pb2 import FINISH_REASON_UNSPECIFIED, Generation
from protos.briolette.v1.stream_pb2 import Add, FromDecoder, ToDecoder

log = logging.getLogger(__name__)


class RemoteDecoder:
    """Sends requests to the decoder and keeps what it says; runs on one asyncio loop."""

    def __init__(
        self, find: Callable[[], Endpoint], secret: bytes, on_status: Callable[[], None]
    ) -> None:
        """`find` returns the decoder's endpoint or raises LinkError; it runs in a thread.

        `on_status` is called whenever there is a new `status`.
        """
        self.status = ClusterStatus(reason="The decoder is still loading the model.")
        self._find = find
        self._secret = secret
        self._on_status = on_status
        self._streams = Streams(self._abort)

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

    def close(self) -> None:
        self._link.close()

    def problem(self) -> str | None:
        """What no reconnecting will mend; None while all is well."""
        return None if self._link.is_alive else "The link to the decoder has no thread any more."

    async def generate(self, add: Add) -> AsyncGenerator[Generation, None]:
        """The pieces of one answer; leaving early aborts the request. Gives `add` its id.

        Raises Unavailable while the decoder isn't ready.
        """
        if not self.status.ready:
            raise Unavailable(self.status.reason)
        stream = self._streams.open()
        try:
            add.request_id = stream.request_id
            self._link.send(ToDecoder(adds=[add]))
            is_last = False
            while not is_last:
                piece = await stream.take()
                is_last = piece.finish_reason != FINISH_REASON_UNSPECIFIED
                yield piece
        finally:
            self._streams.close(stream)
            if not stream.is_finished:
                self._abort(stream.request_id)

    def _abort(self, request_id: str) -> None:
        self._link.send(ToDecoder(aborts=[request_id]))

    def _on_message(self, message: FromDecoder) -> None:
        for output in message.outputs:
            self._streams.push(output)
        if message.HasField("status"):
            self._set_status(message.status)

    def _on_lost(self, reason: str) -> None:
        log.warning("No link to the decoder: %s", reason)
        self._streams.fail_all("The decoder that worked on this answer is gone; ask again.")
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
