"""A proxy before a Redis server that is slow, hangs up, or speaks TLS."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.store.redis import RedisAddress


class Cut:
    """Passes bytes between clients and the test's server, slowly where there is a `pause_s` after
    each piece that clients send, and hangs up within an answer.
    """

    def __init__(
        self,
        directory: Path,
        after_bytes: int,
        tls: ssl.SSLContext | None = None,
        pause_s: float = 0.0,
    ) -> None:
        self._server, self._left, self._tls = str(directory / "redis.sock"), after_bytes, tls
        self._pause_s = pause_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        if pause_s:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
        scheme, port = "rediss" if tls else "redis", self._listener.getsockname()[1]
        self.address = RedisAddress(f"{scheme}://localhost:{port}", timeout_s=1.0)
        self._start(self._accept)

    def __enter__(self) -> Cut:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _start(self, run: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=run, args=args, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                if self._tls is not None:
                    client = self._tls.wrap_socket(client, server_side=True)
            except ssl.SSLError:
                continue  # a client that doesn't trust us
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._server)
            self._start(self._pump, client, server, False)
            self._start(self._pump, server, client, True)

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        try:
            while data := source.recv(10_000):
                if is_answer and self._left > 0:
                    self._left -= len(data)
                    if self._left <= 0:
                        break
                if not is_answer:
                    time.sleep(self._pause_s)
                sink.sendall(data)
        except OSError:
            pass  # the other direction has hung up
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def make_certificate(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """For localhost, and a server's context with it."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context
