"""The gateway's end of its link to the decoder: found again after a loss.

Requests and aborts go to the decoder; one message per step brings what every stream of this
gateway has new. Threads of its own read and write, so asyncio never waits for the other process.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable

from google.protobuf.message import DecodeError

from cluster.errors import LinkError, LinkTimeout
from cluster.links.connect import Endpoint, Link, connect
from deployments.messages import GATEWAY_HELLO, SEND_DEADLINE_S
from protos.briolette.v1.stream_pb2 import FromDecoder, ToDecoder

CONNECT_S = 2.0
RECONNECT_S = 0.25
SILENCE_S = 10.0  # the decoder speaks once a second, unless a step takes longer

log = logging.getLogger(__name__)


class DecoderLink:
    """The gateway's end: keeps a link to the decoder and finds it again after a loss.

    `find_decoder` returns the decoder's endpoint or raises LinkError; it runs in a thread.
    `on_message(message)`, `on_lost(reason)` and, when the decoder says nothing for SILENCE_S,
    `on_silent()` run on the asyncio loop, with one hop per message.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        secret: bytes,
        find_decoder: Callable[[], Endpoint],
        on_message: Callable[[FromDecoder], None],
        on_lost: Callable[[str], None],
        on_silent: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._secret = secret
        self._find_decoder = find_decoder
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_silent = on_silent
        self._link: Link | None = None
        self._outbox: queue.SimpleQueue[ToDecoder | None] = queue.SimpleQueue()
        self._is_closed = threading.Event()
        self._threads = (
            threading.Thread(target=self._run, name="decoder link", daemon=True),
            threading.Thread(target=self._write, name="decoder link writer", daemon=True),
        )
        for thread in self._threads:
            thread.start()

    @property
    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def send(self, message: ToDecoder) -> None:
        """Send without waiting; lost together with the link if that breaks."""
        self._outbox.put(message)

    def close(self) -> None:
        self._is_closed.set()
        self._outbox.put(None)
        if self._link is not None:
            self._link.close()

    def _run(self) -> None:
        was_linked = True  # so that the first failure is told, and then each loss once
        while not self._is_closed.is_set():
            try:
                self._link = connect(self._find_decoder(), self._secret, GATEWAY_HELLO, CONNECT_S)
                was_linked = True
                self._read(self._link)
            except (LinkError, DecodeError) as error:
                if was_linked:
                    self._call(self._on_lost, str(error))
                was_linked = False
            finally:
                if self._link is not None:
                    self._link.close()
                    self._link = None
            self._is_closed.wait(RECONNECT_S)

    def _read(self, link: Link) -> None:
        while True:
            try:
                message = FromDecoder.FromString(bytes(link.recv(SILENCE_S)))
            except LinkTimeout:  # it hangs, or works on a long step: the link is good for later
                self._call(self._on_silent)
            else:
                self._call(self._on_message, message)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._is_closed.is_set():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            link = self._link
            if link is None:
                continue  # the streams of a lost link have been told already
            try:
                link.send([message.SerializeToString()], SEND_DEADLINE_S)
            except LinkError as error:
                log.warning("The decoder takes no messages: %s", error)
                link.close()
