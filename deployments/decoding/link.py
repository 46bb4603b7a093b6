"""The two ends of the link between a gateway and the decoder.

One message per step carries what every stream of that gateway has new; requests and aborts go the
other way. Each end reads and writes in threads of its own, so neither the step loop nor asyncio
ever waits for the other process.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from google.protobuf.message import DecodeError

from cluster.errors import LinkError
from cluster.links import Endpoint, Link, LinkTimeout, Listener, connect
from protos.briolette.v1.stream_pb2 import FromDecoder, ToDecoder

SEND_DEADLINE_S = 2.0  # a gateway or decoder that takes nothing for so long is treated as gone
CONNECT_S = 2.0
RECONNECT_S = 0.25
SILENCE_S = 10.0  # the decoder speaks once a second, unless a step takes longer
MAX_OUTBOX = 1024  # messages that wait for a gateway: far more than come in SEND_DEADLINE_S
HELLO = b"briolette gateway"
WELCOME = b"briolette decoder"

log = logging.getLogger(__name__)


def verify_gateway(hello: bytes) -> bytes:
    """For the Listener: the handshake has proved that the peer knows the cluster's secret."""
    if hello != HELLO:
        raise LinkError("Only gateways link to the decoder here.")
    return WELCOME


class _GatewayLink:
    """One gateway as the decoder sends to it."""

    def __init__(self, gateway_id: int, link: Link) -> None:
        self.link = link
        self._gateway_id = gateway_id
        self._outbox: queue.Queue[FromDecoder | None] = queue.Queue(MAX_OUTBOX)
        name = f"gateway {gateway_id} writer"
        self._writer = threading.Thread(target=self._write, name=name, daemon=True)
        self._writer.start()

    def send(self, message: FromDecoder) -> None:
        """Send without waiting; the link of a gateway that takes nothing is closed."""
        try:
            self._outbox.put_nowait(message)
        except queue.Full:
            self._give_up("its messages pile up")

    def finish(self) -> None:
        """Close, once what waits has been sent, if the gateway takes it."""
        with suppress(queue.Full):
            self._outbox.put_nowait(None)
            self._writer.join(SEND_DEADLINE_S)
        self.close()

    def close(self) -> None:
        """Its reader sees that and reports the loss."""
        self.link.close()
        with suppress(queue.Full):  # then the writer is busy, and fails on the closed link
            self._outbox.put_nowait(None)

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self.link.send([message.SerializeToString()], SEND_DEADLINE_S)
            except LinkError as error:
                self._give_up(str(error))
                return

    def _give_up(self, reason: str) -> None:
        log.warning("Gateway %d takes no messages: %s", self._gateway_id, reason)
        self.link.close()


class GatewayLinks:
    """The decoder's end: accepts gateways, hands on what they say, sends them what is new.

    `on_message(gateway_id, message)` and `on_lost(gateway_id)` run in reader threads; `greeting()`
    gives the first message to a new gateway.
    """

    def __init__(
        self,
        listener: Listener,
        greeting: Callable[[], FromDecoder],
        on_message: Callable[[int, ToDecoder], None],
        on_lost: Callable[[int], None],
    ) -> None:
        self._listener = listener
        self._greeting = greeting
        self._on_message = on_message
        self._on_lost = on_lost
        self._links: dict[int, _GatewayLink] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        threading.Thread(target=self._accept, name="gateways", daemon=True).start()

    def send(self, gateway_id: int, message: FromDecoder) -> None:
        """Send to one gateway without waiting. Unknown ids are no error."""
        with self._lock:
            link = self._links.get(gateway_id)
        if link is not None:
            link.send(message)

    def broadcast(self, message: FromDecoder) -> None:
        """Send to every gateway."""
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.send(message)

    def close(self) -> None:
        """Hang up, once the gateways have what was sent to them."""
        with self._lock:
            self._is_closed = True
            links = list(self._links.values())
        self._listener.close()
        for link in links:
            link.finish()

    def _accept(self) -> None:
        gateway_id = 0
        while not self._is_closed:
            try:
                sock = self._listener.accept_socket()
            except LinkError:
                return  # the listener is closed
            gateway_id += 1
            name = f"gateway {gateway_id}"
            threading.Thread(
                target=self._serve, args=(gateway_id, sock), name=name, daemon=True
            ).start()

    def _serve(self, gateway_id: int, sock: socket.socket) -> None:
        try:
            link = self._listener.welcome(sock)
        except LinkError as error:
            log.warning("Refused a gateway: %s", error)
            return
        with self._lock:
            if self._is_closed:
                link.close()
                return
            gateway = self._links[gateway_id] = _GatewayLink(gateway_id, link)
            gateway.send(self._greeting())
        try:
            while True:
                self._on_message(gateway_id, ToDecoder.FromString(bytes(link.recv())))
        except (LinkError, DecodeError) as error:
            if not self._is_closed:
                log.warning("Lost gateway %d: %s", gateway_id, error)
        finally:
            with self._lock:
                del self._links[gateway_id]
            gateway.close()
            self._on_lost(gateway_id)


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
                self._link = connect(self._find_decoder(), self._secret, HELLO, CONNECT_S)
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
