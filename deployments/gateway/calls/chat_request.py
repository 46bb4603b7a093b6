"""What a chat request asks of the chat template and of the sampler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.errors import InvalidRequest
from engine.text.dialect import Dialect
from engine.text.tool_grammar import calls_grammar
from protos.briolette.v1.inference_pb2 import (
    TOOL_CHOICE_NONE,
    TOOL_CHOICE_REQUIRED,
    ChatRequest,
    Message,
    Sampling,
)

NO_CALLS = r"(?s:.*)"  # any text, and so no control token


def to_chat_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Turn messages into `engine.text.chat_messages.ChatMessage`s, which sessions keep too."""
    return [_chat_message(message) for message in messages]


def to_options(request: ChatRequest) -> dict[str, Any]:
    """What beside its messages the template writes, as the tokenizer takes it."""
    hides_tools = request.tool_choice == TOOL_CHOICE_NONE
    tools = [
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        for tool in ([] if hides_tools else request.tools)
    ]
    return {"tools": tools, "thinking": request.thinking}


def to_sampling(request: ChatRequest, dialect: Dialect) -> Sampling:
    """The request's, with a grammar for calls that have to come, or that mustn't.

    Raises InvalidRequest.
    """
    sampling = Sampling()
    sampling.CopyFrom(request.sampling)
    has_format = sampling.WhichOneof("format") is not None
    if request.tool_choice == TOOL_CHOICE_REQUIRED:
        if has_format:
            raise InvalidRequest("An answer can't both be a tool call and have a format.")
        sampling.lark = calls_grammar(_required(request), dialect).text
    elif request.required_tool:
        raise InvalidRequest("required_tool needs the tool_choice REQUIRED.")
    elif request.tool_choice == TOOL_CHOICE_NONE and request.tools and not has_format:
        sampling.regex = NO_CALLS
    return sampling


def _required(request: ChatRequest) -> list[dict[str, Any]]:
    """The tools of which one has to be called."""
    tools: list[dict[str, Any]] = to_options(request)["tools"]
    chosen = [tool for tool in tools if request.required_tool in ("", tool["name"])]
    if not tools:
        raise InvalidRequest("The tool_choice REQUIRED needs tools.")
    if not chosen:
        raise InvalidRequest(f"There is no tool {request.required_tool!r} to be required.")
    return chosen


def _chat_message(message: Message) -> dict[str, Any]:
    chat_message: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thought:
        chat_message["thought"] = message.thought
    if message.tool_calls:
        chat_message["tool_calls"] = [
            {"id": call.id, "name": call.name, "arguments": call.arguments}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        chat_message["tool_call_id"] = message.tool_call_id
    return chat_message
