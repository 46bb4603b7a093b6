"""Messages and tools as a chat template takes them, all of it known to be plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
TOOL_NAME = re.compile(r"[\w./:-]{1,128}")  # in a call the name ends where the arguments begin

Turn = dict[str, Any]


def to_turns(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """What the template is given of each message, and nothing else.

    Raises InvalidRequest for what is no message, or no text.
    """
    if not messages:
        raise InvalidRequest("A chat needs at least one message.")
    called: dict[str, str] = {}  # ids of the calls so far, and the names of their tools
    turns = [_turn(message, f"messages[{i}]", called) for i, message in enumerate(messages)]
    check_text(turns)
    return turns


def to_declarations(tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The tools (`name`, `description`, `parameters`: a JSON schema) as the template takes them.

    Raises InvalidRequest.
    """
    declared: list[Turn] = []
    for index, tool in enumerate(tools):
        function: Turn = {
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
    """A JSON object that may have come as text. Raises InvalidRequest, which begins with `what`."""
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} are not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{what} are no JSON object.")
    return value


def check_text(value: Any) -> None:
    """All strings in a JSON value are text. Raises InvalidRequest."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest("The text has a lone surrogate, which is no character.") from None
    except RecursionError:
        raise InvalidRequest("The tools or the calls are nested too deeply.") from None


def _turn(message: Mapping[str, Any], where: str, called: dict[str, str]) -> Turn:
    role = message.get("role")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise InvalidRequest(f"{where} has the unknown role {role!r}; use {known}.")
    calls = message.get("tool_calls") or ()
    turn = {"role": role, "content": _content(message.get("content"), where, bool(calls))}
    if role in ("assistant", "model"):
        if message.get("thought"):  # released templates have read the one or the other
            turn["reasoning"] = turn["reasoning_content"] = _text(message["thought"], where)
        if calls:
            turn["tool_calls"] = [_call(call, where) for call in calls]
            called.update((call["id"], call["function"]["name"]) for call in turn["tool_calls"])
    elif role == "tool":
        call_id = turn["tool_call_id"] = message.get("tool_call_id")
        if call_id not in called:
            raise InvalidRequest(f"{where} answers the call {call_id!r}, which nobody has made.")
        turn["name"] = called[call_id]
    return turn


def _call(call: Mapping[str, Any], where: str) -> Turn:
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


def _content(content: Any, where: str, has_calls: bool) -> str | list[Turn]:
    if isinstance(content, list):
        return [{"type": "text", "text": _part_text(part, where)} for part in content]
    return "" if content is None and has_calls else _text(content, where)


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        raise InvalidRequest(f"{where} has a part that is not text.")
    return _text(part.get("text"), where)


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise InvalidRequest(f"{where} has no text.")
    return text
