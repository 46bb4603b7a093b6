"""What a socket and a Redis server give alone: no client, no checksum, memory used again."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from statistics import median
from urllib.parse import urlsplit

from cluster.store.redis import RedisAddress

HEAD_BYTES = 64  # room for what stands around a value in a reply


class RawWire:
    """One blocking connection; closes at the end of a `with` block."""

    def __init__(self, address: RedisAddress) -> None:
        url = urlsplit(address.url)
        if url.scheme == "unix":
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(url.path)
        else:
            self._socket = socket.create_connection((url.hostname, url.port))

    def set(self, name: bytes, value: bytes) -> None:
        """Write a value and wait for the answer."""
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n"
        self._socket.sendall(head % (len(name), name, len(value)))
        self._socket.sendall(value)
        self._socket.sendall(b"\r\n")
        assert self._socket.recv(HEAD_BYTES) == b"+OK\r\n"

    def get(self, name: bytes, num_bytes: int, memory: memoryview) -> None:
        """Read a value of this length, and what stands around it, into memory with HEAD_BYTES to
        spare.
        """
        self._socket.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(name), name))
        end = len(b"$%d\r\n" % num_bytes) + num_bytes + 2
        position = 0
        while position < end:
            position += self._socket.recv_into(memory[position:end])

    def __enter__(self) -> RawWire:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def raw_read_rate(address: RedisAddress, values: Sequence[bytes], num_rounds: int = 5) -> float:
    """Bytes per second of reading these values one after the other, the median round's."""
    memory = memoryview(bytearray(max(map(len, values)) + HEAD_BYTES))
    names = [b"raw-wire-%d" % i for i in range(len(values))]
    times = []
    with RawWire(address) as wire:
        for name, value in zip(names, values, strict=True):
            wire.set(name, value)
        for _ in range(num_rounds):
            start = time.perf_counter()
            for name, value in zip(names, values, strict=True):
                wire.get(name, len(value), memory)
            times.append(time.perf_counter() - start)
    with address.client() as client:
        client.delete(*names)
    return sum(map(len, values)) / median(times)
