"""The decoder's end of its links to the gateways.

One message per step and gateway carries the new tokens of all its streams; requests and aborts come
the other way. Each link reads and writes in threads of its own, so the step loop never waits for a
gateway. The other end is `deployments/gateway/decoder_link.py`.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from google.protobuf.message import DecodeError

from cluster.errors import LinkError
from cluster.links.connect import Link, Listener
from deployments.messages import DECODER_WELCOME, GATEWAY_HELLO, SEND_DEADLINE_S
from protos.briolette.v1.stream_pb2 import FromDecoder, ToDecoder

MAX_OUTBOX = 1024  # messages that wait for a gateway: far more than come in SEND_DEADLINE_S

log = logging.getLogger(__name__)


def verify_gateway(hello: bytes) -> bytes:
    """Return the welcome for a gateway's hello; `Listener` calls it after the handshake.

    Raises:
        LinkError: The peer isn't a gateway.
    """
    if hello != GATEWAY_HELLO:
        raise LinkError("This port of the decoder is for gateways only.")
    return DECODER_WELCOME


class _GatewayLink:
    """The link to one gateway, with a queue and a thread that sends."""

    def __init__(self, gateway_id: int, link: Link) -> None:
        self.link = link
        self._gateway_id = gateway_id
        self._outbox: queue.Queue[FromDecoder | None] = queue.Queue(MAX_OUTBOX)
        name = f"gateway {gateway_id} writer"
        self._writer = threading.Thread(target=self._write, name=name, daemon=True)
        self._writer.start()

    def send(self, message: FromDecoder) -> None:
        """Queue a message; a full queue closes the link."""
        try:
            self._outbox.put_nowait(message)
        except queue.Full:
            self._give_up("its queue is full")

    def finish(self) -> None:
        """Send what is queued, if the gateway takes it in time, and close."""
        with suppress(queue.Full):
            self._outbox.put_nowait(None)
            self._writer.join(SEND_DEADLINE_S)
        self.close()

    def close(self) -> None:
        """Close the link; its reader then reports the loss."""
        self.link.close()
        with suppress(queue.Full):  # full: the writer is busy, and fails on the closed link
            self._outbox.put_nowait(None)

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self.link.send([message.SerializeToString()], SEND_DEADLINE_S)
            except LinkError as error:
                self._give_up(str(error))
                return

    def _give_up(self, reason: str) -> None:
        log.warning("Gateway %d does not receive its messages: %s", self._gateway_id, reason)
        self.link.close()


class GatewayLinks:
    """The links to all gateways: accepts them, receives from them, sends to them."""

    def __init__(
        self,
        listener: Listener,
        greeting: Callable[[], FromDecoder],
        on_message: Callable[[int, ToDecoder], None],
        on_lost: Callable[[int], None],
    ) -> None:
        """Start to accept gateways.

        Args:
            listener: Where they connect; closed by `close`.
            greeting: Returns the first message to a new gateway.
            on_message: Called with (gateway id, message), in a thread of that gateway.
            on_lost: Called with a gateway id after its last message, in the same thread.
        """
        self._listener = listener
        self._greeting = greeting
        self._on_message = on_message
        self._on_lost = on_lost
        self._links: dict[int, _GatewayLink] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        threading.Thread(target=self._accept, name="gateways", daemon=True).start()

    def send(self, gateway_id: int, message: FromDecoder) -> None:
        """Send to one gateway without waiting; unknown ids are ignored."""
        with self._lock:
            link = self._links.get(gateway_id)
        if link is not None:
            link.send(message)

    def broadcast(self, message: FromDecoder) -> None:
        """Send to every gateway without waiting."""
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.send(message)

    def close(self) -> None:
        """Close every link, once its gateway has what was sent to it."""
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
