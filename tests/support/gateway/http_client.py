"""What tests of the HTTP server send, and how they see that a connection has ended."""

from __future__ import annotations

import socket

from deployments.gateway.gateway import Gateway

CHAT = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 8}


def url(gateway: Gateway, path: str = "/v1/chat/completions") -> str:
    return f"http://127.0.0.1:{gateway.http_port}{path}"


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has ended it; what it said before is read away."""
    connection.setblocking(False)
    try:
        while connection.recv(1 << 20):
            pass
        return True
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
