"""The two ends of the link between a gateway and the decoder.

One message per step carries what every stream of that gateway has new; requests and aborts go the
other way. Each end reads in a thread of its own, so neither the step loop nor asyncio ever waits
for the other process.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from cluster.errors import LinkError
from cluster.links import Endpoint, Link, Listener, connect
from protos.briolette.v1.stream_pb2 import FromDecoder, ToDecoder

SEND_DEADLINE_S = 2.0  # a gateway or decoder that takes nothing for so long is treated as gone
CONNECT_S = 2.0
RECONNECT_S = 0.25
HELLO = b"briolette gateway"
WELCOME = b"briolette decoder"

log = logging.getLogger(__name__)


def verify_gateway(hello: bytes) -> bytes:
    """For the Listener: the handshake has proved that the peer knows the cluster's secret."""
    if hello != HELLO:
        raise LinkError("Only gateways link to the decoder here.")
    return WELCOME


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
        self._links: dict[int, Link] = {}
        self._lock = threading.Lock()  # a link may be sent to by the step loop and by its greeter
        self._is_closed = False
        threading.Thread(target=self._accept, name="gateways", daemon=True).start()

    def send(self, gateway_id: int, message: FromDecoder) -> None:
        """Send to one gateway; one that doesn't take it is dropped. Unknown ids are no error."""
        with self._lock:
            link = self._links.get(gateway_id)
            if link is None:
                return
            try:
                link.send([message.SerializeToString()], SEND_DEADLINE_S)
            except LinkError as error:
                log.warning("Gateway %d takes no messages: %s", gateway_id, error)
                link.close()  # its reader sees that and reports the loss

    def broadcast(self, message: FromDecoder) -> None:
        """Send to every gateway."""
        for gateway_id in list(self._links):
            self.send(gateway_id, message)

    def close(self) -> None:
        self._is_closed = True
        self._listener.close()
        with self._lock:
            for link in self._links.values():
                link.close()

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
            self._links[gateway_id] = link
        self.send(gateway_id, self._greeting())
        try:
            while True:
                self._on_message(gateway_id, ToDecoder.FromString(bytes(link.recv())))
        except (LinkError, DecodeError) as error:
            if not self._is_closed:
                log.warning("Lost gateway %d: %s", gateway_id, error)
        finally:
            with self._lock:
                del self._links[gateway_id]
            link.close()
            self._on_lost(gateway_id)


class DecoderLink:
    """The gateway's end: keeps a link to the decoder and finds it again after a loss.

    `find_decoder` returns the decoder's endpoint or raises LinkError; it runs in a thread.
    `on_message(message)` and `on_lost(reason)` run on the asyncio loop, with one hop per message.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        secret: bytes,
        find_decoder: Callable[[], Endpoint],
        on_message: Callable[[FromDecoder], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._secret = secret
        self._find_decoder = find_decoder
        self._on_message = on_message
        self._on_lost = on_lost
        self._link: Link | None = None
        self._outbox: queue.SimpleQueue[ToDecoder | None] = queue.SimpleQueue()
        self._is_closed = threading.Event()
        threading.Thread(target=self._run, name="decoder link", daemon=True).start()
        threading.Thread(target=self._write, name="decoder link writer", daemon=True).start()

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
            message = FromDecoder.FromString(bytes(link.recv()))
            self._call(self._on_message, message)

    def _call(self, function: Callable[[Any], None], argument: object) -> None:
        if not self._is_closed.is_set():
            self._loop.call_soon_threadsafe(function, argument)

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
