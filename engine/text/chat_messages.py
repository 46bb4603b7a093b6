"""Chat messages and tools: checked, and turned into the form that chat templates read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
TOOL_NAME = re.compile(r"[\w./:-]{1,128}")  # nothing that could begin the arguments of a call

# One message of a conversation, as callers send it and sessions keep it:
#   role          one of ROLES
#   content       a string, or a list of {"type": "text", "text": …}
#   thought       optional, an assistant's: what it thought before the content and the calls
#   tool_calls    optional, an assistant's: a list of {"id", "name", "arguments"}; the arguments are
#                 a JSON object, parsed or as text
#   tool_call_id  a tool's: the call whose result the content is
ChatMessage = Mapping[str, Any]

# One tool: "name", "description", and "parameters": a JSON schema, parsed or as text
ToolDefinition = Mapping[str, Any]

TemplateObject = dict[str, Any]  # a message or a tool with the keys that Hugging Face templates use


def to_template_messages(messages: Sequence[ChatMessage]) -> list[TemplateObject]:
    """Check messages and give each only the keys that a template reads.

    Raises:
        InvalidRequest: A message is malformed, or holds what is not valid text.
    """
    if not messages:
        raise InvalidRequest("A chat needs at least one message.")
    call_names: dict[str, str] = {}  # the tool's name by the id of each call so far
    converted = [_message(item, f"messages[{i}]", call_names) for i, item in enumerate(messages)]
    check_text(converted)
    return converted


def to_template_tools(tools: Sequence[ToolDefinition]) -> list[TemplateObject]:
    """Check tools and turn each into a function declaration.

    Raises:
        InvalidRequest: A tool is malformed, or two have the same name.
    """
    declared: list[TemplateObject] = []
    for index, tool in enumerate(tools):
        function: TemplateObject = {
            "name": _tool_name(tool.get("name"), f"tools[{index}]"),
            "description": tool.get("description") or "",
        }
        if tool.get("parameters"):
            where = f"The parameters of the tool {function['name']!r}"
            function["parameters"] = to_object(tool["parameters"], where)
        declared.append({"type": "function", "function": function})
    names = [declaration["function"]["name"] for declaration in declared]
    if len(set(names)) < len(names):
        raise InvalidRequest("Two tools have the same name.")
    check_text(declared)
    return declared


def to_object(given: Any, what: str) -> dict[str, Any]:
    """Parse a JSON object that may be given as text.

    Raises:
        InvalidRequest: It isn't one; the message begins with `what`, a plural noun.
    """
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} are not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{what} are not a JSON object.")
    return value


def check_text(value: Any) -> None:
    """Raise InvalidRequest if a string in a JSON value is not valid Unicode text."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest("A string contains an unpaired surrogate.") from None
    except RecursionError:
        raise InvalidRequest("The tools or the calls are nested too deeply.") from None


def _message(message: ChatMessage, where: str, call_names: dict[str, str]) -> TemplateObject:
    role = message.get("role")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise InvalidRequest(f"{where} has the unknown role {role!r}; use {known}.")
    calls = message.get("tool_calls") or ()
    converted = {"role": role, "content": _content(message.get("content"), where, bool(calls))}
    if role in ("assistant", "model"):
        if message.get("thought"):  # released templates read either of two keys
            thought = _text(message["thought"], where)
            converted |= {"reasoning": thought, "reasoning_content": thought}
        if calls:
            converted["tool_calls"] = [_call(call, where) for call in calls]
            for call in converted["tool_calls"]:
                call_names[call["id"]] = call["function"]["name"]
    elif role == "tool":
        call_id = message.get("tool_call_id")
        if call_id not in call_names:
            raise InvalidRequest(
                f"{where} answers the call {call_id!r}, which no earlier message has made."
            )
        converted |= {"tool_call_id": call_id, "name": call_names[call_id]}
    return converted


def _call(call: Mapping[str, Any], where: str) -> TemplateObject:
    name = _tool_name(call.get("name"), where)
    arguments = to_object(call.get("arguments") or {}, f"{where}: the arguments of {name!r}")
    function = {"name": name, "arguments": arguments}
    return {"id": _text(call.get("id"), where), "type": "function", "function": function}


def _tool_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise InvalidRequest(
            f"{where}: the tool's name {name!r} must have 1 to 128 letters, digits or any of _./:-."
        )
    return name


def _content(content: Any, where: str, has_calls: bool) -> str | list[TemplateObject]:
    if isinstance(content, list):
        return [{"type": "text", "text": _part_text(part, where)} for part in content]
    return "" if content is None and has_calls else _text(content, where)


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        raise InvalidRequest(f"{where} has a part that is not text; only text is supported.")
    return _text(part.get("text"), where)


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise InvalidRequest(f"{where} has no text.")
    return text
