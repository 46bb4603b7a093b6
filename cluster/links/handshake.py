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
    sock: socket.socket, transport: str, secret: bytes, hello: bytes, timeout_s: float
) -> bytes:
    """Shake hands as the connector, on a fresh socket.

    Args:
        sock: The connected socket; the caller keeps it.
        transport: The transport to ask for, one of TRANSPORTS.
        secret: The cluster's secret.
        hello: What the acceptor is told, at most MAX_HELLO_BYTES.
        timeout_s: Seconds for the whole handshake.

    Returns:
        The acceptor's welcome.

    Raises:
        LinkRefused: If either side refuses the other, with the reason.
        LinkError: If the other side is silent, gone, or speaks another protocol.
    """
    assert len(hello) <= MAX_HELLO_BYTES
    stream = _Timed(sock, timeout_s)
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
    sock: socket.socket, secret: bytes, verify: Callable[[bytes], bytes], timeout_s: float
) -> tuple[str, bytes]:
    """Shake hands as the acceptor, on an accepted socket.

    Args:
        sock: The accepted socket; the caller keeps it.
        secret: The cluster's secret.
        verify: Returns the welcome for a hello, or raises LinkError with the reason to refuse it.
        timeout_s: Seconds for the whole handshake.

    Returns:
        The transport that the connector asked for, and its hello.

    Raises:
        LinkError: If the connector fails any step, or is refused.
    """
    stream = _Timed(sock, timeout_s)
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
    """Reads and writes of exact lengths on a socket, all within one timeout."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock, self._end_at = sock, time.monotonic() + timeout_s

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
        left_s = self._end_at - time.monotonic()
        if left_s <= 0:
            raise LinkError("The handshake timed out.")
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
        raise LinkError(f"Hello of {size} bytes exceeds the limit of {MAX_HELLO_BYTES}.")
    return size
