"""Tools and thoughts in OpenAI's dialect."""

from __future__ import annotations

import json
from typing import Any

import openai

from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_TOOL_CALLS,
    TOOL_CHOICE_NONE,
    TOOL_CHOICE_REQUIRED,
    Generation,
    ToolCall,
    ToolCallPiece,
    Usage,
)
from tests.support.gateway.openai_requests import HELLO, WEATHER
from tests.support.gateway.scripted_backend import END, ScriptedBackend

CALLING = [
    Generation(token_ids=[1]),  # nothing to show yet
    Generation(thought="They want "),
    Generation(thought="the weather."),
    Generation(text="Let me look."),
    Generation(tool_calls=[ToolCallPiece(index=0, id="call_1", name="weather", arguments='{"to')]),
    Generation(tool_calls=[ToolCallPiece(index=0, arguments='wn": "Oslo"}')]),
    Generation(
        tool_calls=[ToolCallPiece(index=1, id="call_2", name="weather", arguments="{}")],
        finish_reason=FINISH_REASON_TOOL_CALLS,
        usage=Usage(prompt_tokens=5, output_tokens=20, thought_tokens=4),
    ),
]


def test_a_round_with_tools(scripted: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = CALLING
    answer = scripted.chat.completions.create(
        model="", messages=HELLO, tools=[WEATHER], parallel_tool_calls=True
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content == "Let me look."
    assert message.reasoning_content == "They want the weather."  # type: ignore[attr-defined]
    calls: Any = message.tool_calls
    assert [(call.type, call.function.name) for call in calls] == [("function", "weather")] * 2
    assert len({call.id for call in calls}) == 2
    assert [call.function.arguments for call in calls] == ['{"town": "Oslo"}', "{}"]
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 4
    (tool,) = backend.requests[0].tools  # type: ignore[union-attr]
    assert (tool.name, tool.description) == ("weather", "Of a town.")
    assert json.loads(tool.parameters) == WEATHER["function"]["parameters"]

    backend.script = [Generation(text="It rains."), END]
    said: Any = message.model_dump(exclude_none=True)
    result: Any = {"role": "tool", "tool_call_id": calls[0].id, "content": "rain"}
    last = scripted.chat.completions.create(model="", messages=[*HELLO, said, result])
    assert last.choices[0].message.content == "It rains."
    _, assistant, answered = backend.requests[1].messages  # type: ignore[union-attr]
    assert assistant.thought == "They want the weather."
    assert assistant.tool_calls[0] == ToolCall(
        id=calls[0].id, name="weather", arguments='{"town": "Oslo"}'
    )
    assert (answered.tool_call_id, answered.content) == (calls[0].id, "rain")


def test_tool_calls_of_a_stream(scripted: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = CALLING
    with scripted.chat.completions.stream(model="", messages=HELLO, tools=[WEATHER]) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        final = stream.get_final_completion()  # what the SDK puts together
    calls: Any = final.choices[0].message.tool_calls
    assert [call.function.arguments for call in calls] == ['{"town": "Oslo"}', "{}"]
    assert len({call.id for call in calls}) == 2
    assert final.choices[0].message.content == "Let me look."
    assert final.choices[0].finish_reason == "tool_calls"
    thoughts = [getattr(chunk.choices[0].delta, "reasoning_content", "") for chunk in chunks]
    assert "".join(thoughts) == "They want the weather." and len(chunks) == 6


def test_only_calls_are_no_content(scripted: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = CALLING[4:]
    answer = scripted.chat.completions.create(model="", messages=HELLO, tools=[WEATHER])
    assert answer.choices[0].message.content is None and answer.choices[0].message.tool_calls


def test_tool_choice(scripted: openai.OpenAI, backend: ScriptedBackend) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("none", "required", named):
        scripted.chat.completions.create(
            model="", messages=HELLO, tools=[WEATHER], tool_choice=choice
        )
    asked = [(r.tool_choice, r.required_tool) for r in backend.requests]  # type: ignore[union-attr]
    assert asked == [
        (TOOL_CHOICE_NONE, ""),
        (TOOL_CHOICE_REQUIRED, ""),
        (TOOL_CHOICE_REQUIRED, "weather"),
    ]
