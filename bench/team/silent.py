"""Connections that say nothing, thousands of them, and what others notice of them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from deployments.process.open_files import raise_limit

NUM_OWN = 1000  # files that this process needs beside them


@contextmanager
def silent_connections(host: str, port: int, num: int) -> Iterator[list[socket.socket]]:
    """Open `num` connections, or as many of them as this process may."""
    num = min(num, raise_limit() - NUM_OWN)
    held: list[socket.socket] = []
    try:
        for _ in range(num):
            connection = socket.socket()
            held.append(connection)
            connection.settimeout(5.0)
            connection.connect((host, port))
        yield held
    finally:
        for connection in held:
            connection.close()


def num_open(connections: list[socket.socket]) -> int:
    """The connections that the server hasn't closed."""
    return sum(map(_is_open, connections))


def _is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    with suppress(ConnectionResetError):
        try:
            return bool(connection.recv(1 << 16))  # what gRPC says first
        except BlockingIOError:
            return True
    return False
