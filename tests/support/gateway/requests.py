"""Requests over gRPC, and the status of a call that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from protos.briolette.v1.inference_pb2 import ChatRequest, CompleteRequest, Message, Sampling

GREEDY = Sampling(temperature=0.0, max_tokens=8)


def chat(content: str = "a", role: str = "user", **sampling: Any) -> ChatRequest:
    settings = {"temperature": 0.0, "max_tokens": 8, **sampling}
    message = Message(role=role, content=content)
    return ChatRequest(messages=[message], sampling=Sampling(**settings))


def complete(text: str = "a", **sampling: Any) -> CompleteRequest:
    settings = {"temperature": 0.0, "max_tokens": 8, **sampling}
    return CompleteRequest(text=text, sampling=Sampling(**settings))


def failure(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code().name, caught.value.details() or ""
