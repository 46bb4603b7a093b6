"""A bare HTTP client for measuring servers: requests in a closed loop, events of a stream in time.

It parses no more than it must, so that the time that is measured is the server's.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any


class Connection:
    """One kept-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @staticmethod
    async def open(host: str, port: int) -> Connection:
        return Connection(*await asyncio.open_connection(host, port))

    async def ask(self, request: bytes) -> bytes:
        """The body of the answer. Raises RuntimeError for any status but 200."""
        head = await self._send(request)
        if b"transfer-encoding: chunked" in head:
            body = await self._reader.readuntil(b"0\r\n\r\n")
        else:
            length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
            body = await self._reader.readexactly(int(length))
        return body

    async def event_times(self, request: bytes) -> list[float]:
        """When each event of a stream came, from sending the request, in seconds."""
        started, times, line = time.perf_counter(), [], b""
        await self._send(request)
        while b"[DONE]" not in line:
            line = await self._reader.readline()
            if line.startswith(b"data: {"):
                times.append(time.perf_counter() - started)
        await self._reader.readuntil(b"0\r\n\r\n")
        return times

    def close(self) -> None:
        self._writer.close()

    async def _send(self, request: bytes) -> bytes:
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(f"The server answered {head.splitlines()[0].decode()}.")
        return head


def post(path: str, body: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON request."""
    data = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    ).encode() + data


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()


async def requests_per_s(
    host: str, port: int, request: bytes, num_clients: int, seconds: float
) -> float:
    """How many answers come in a second, of clients that each ask again once they have one."""
    connections = [await Connection.open(host, port) for _ in range(num_clients)]
    num_done, give_up_at = 0, time.perf_counter() + seconds

    async def ask_again(connection: Connection) -> None:
        nonlocal num_done
        while time.perf_counter() < give_up_at:
            await connection.ask(request)
            num_done += 1

    started = time.perf_counter()
    await asyncio.gather(*map(ask_again, connections))
    elapsed_s = time.perf_counter() - started
    for connection in connections:
        connection.close()
    return num_done / elapsed_s
