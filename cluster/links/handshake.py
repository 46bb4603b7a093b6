"""The handshake of a link: both sides prove that they know the secret, then say who they are.

    connector -> acceptor   magic, version, transport asked for, nonce
    acceptor  -> connector  magic, version, nonce, proof
    connector -> acceptor   proof over the hello, the hello
    acceptor  -> connector  verdict, proof over it, the welcome or the reason of a refusal

A proof is an HMAC-SHA256 over a role, both nonces, the transport and the text. Until its proof has
been checked, a peer can make us read a few fixed fields and a hello of at most MAX_HELLO_BYTES.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
import time
from collections.abc import Callable

from cluster.errors import LinkError, LinkRefused

MAGIC = b"BRIOLINK"
VERSION = 1
NONCE_BYTES = PROOF_BYTES = 32
MAX_HELLO_BYTES = 64 * 1024
TRANSPORTS = ("shm", "unix", "tcp")
ACCEPTED, REFUSED = 1, 2

_OPENING = struct.Struct(f"<8sHB{NONCE_BYTES}s")
_CHALLENGE = struct.Struct(f"<8sH{NONCE_BYTES}s{PROOF_BYTES}s")
_ANSWER = struct.Struct(f"<{PROOF_BYTES}sI")
_VERDICT = struct.Struct(f"<B{PROOF_BYTES}sI")


def offer(
    sock: socket.socket, transport: str, secret: bytes, hello: bytes, deadline_s: float
) -> bytes:
    """The connector's side, on a fresh socket; returns the acceptor's welcome.

    `deadline_s`: seconds from now. Raises LinkRefused with the reason when either side says no,
    LinkError when the other side is silent, gone, or speaks something else.
    """
    assert len(hello) <= MAX_HELLO_BYTES
    stream = _Timed(sock, deadline_s)
    nonce = os.urandom(NONCE_BYTES)
    stream.send(_OPENING.pack(MAGIC, VERSION, TRANSPORTS.index(transport), nonce))
    magic, version, peer_nonce, proof = _CHALLENGE.unpack(stream.receive(_CHALLENGE.size))
    _check_protocol(magic, version)
    context = transport.encode() + nonce + peer_nonce
    if not hmac.compare_digest(proof, _prove(secret, b"acceptor", context, b"")):
        raise LinkRefused("The other side doesn't know this cluster's secret.")
    stream.send(_ANSWER.pack(_prove(secret, b"connector", context, hello), len(hello)) + hello)
    verdict, proof, size = _VERDICT.unpack(stream.receive(_VERDICT.size))
    text = stream.receive(_check_size(size))
    if not hmac.compare_digest(proof, _prove(secret, b"verdict%d" % verdict, context, text)):
        raise LinkError("The handshake was tampered with.")
    if verdict != ACCEPTED:
        raise LinkRefused(text.decode(errors="replace"))
    return text


def answer(
    sock: socket.socket, secret: bytes, verify: Callable[[bytes], bytes], deadline_s: float
) -> tuple[str, bytes]:
    """The acceptor's side; returns the transport asked for and the connector's hello.

    `verify(hello)` returns the welcome or raises LinkError with the reason, which the connector is
    told. Raises LinkError when the peer fails any step.
    """
    stream = _Timed(sock, deadline_s)
    magic, version, transport_id, peer_nonce = _OPENING.unpack(stream.receive(_OPENING.size))
    _check_protocol(magic, version)
    if transport_id >= len(TRANSPORTS):
        raise LinkError("The peer asked for an unknown transport.")
    transport, nonce = TRANSPORTS[transport_id], os.urandom(NONCE_BYTES)
    context = transport.encode() + peer_nonce + nonce
    proof = _prove(secret, b"acceptor", context, b"")
    stream.send(_CHALLENGE.pack(MAGIC, VERSION, nonce, proof))
    proof, size = _ANSWER.unpack(stream.receive(_ANSWER.size))
    hello = stream.receive(_check_size(size))
    if not hmac.compare_digest(proof, _prove(secret, b"connector", context, hello)):
        raise LinkError("The peer doesn't know this cluster's secret.")
    try:
        verdict, text = ACCEPTED, verify(hello)
    except LinkError as error:
        verdict, text = REFUSED, str(error).encode()[:MAX_HELLO_BYTES]
    proof = _prove(secret, b"verdict%d" % verdict, context, text)
    stream.send(_VERDICT.pack(verdict, proof, len(text)) + text)
    if verdict != ACCEPTED:
        raise LinkRefused(text.decode(errors="replace"))
    return transport, hello


class _Timed:
    """Exact reads and writes on a socket, all within one deadline."""

    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        self._sock, self._end = sock, time.monotonic() + deadline_s

    def send(self, data: bytes) -> None:
        self._arm()
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise LinkError(f"The handshake broke off: {error}.") from None

    def receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._arm()
            try:
                part = self._sock.recv(size - len(data))
            except OSError as error:
                raise LinkError(f"The handshake broke off: {error}.") from None
            if not part:
                raise LinkError("The other side closed the link during the handshake.")
            data += part
        return bytes(data)

    def _arm(self) -> None:
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise LinkError("The handshake took too long.")
        self._sock.settimeout(left_s)


def _prove(secret: bytes, role: bytes, context: bytes, text: bytes) -> bytes:
    return hmac.digest(secret, b"\0".join((MAGIC, role, context, text)), "sha256")


def _check_protocol(magic: bytes, version: int) -> None:
    if magic != MAGIC:
        raise LinkError("The other side doesn't speak Briolette's link protocol.")
    if version != VERSION:
        raise LinkRefused(f"The other side speaks link protocol {version}, this one {VERSION}.")


def _check_size(size: int) -> int:
    if size > MAX_HELLO_BYTES:
        raise LinkError(f"The peer announced a hello of {size} bytes; {MAX_HELLO_BYTES} is most.")
    return size
