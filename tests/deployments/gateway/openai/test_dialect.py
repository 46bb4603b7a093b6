"""Tools, thoughts and formats of a model in Gemma's dialect, as OpenAI's SDK meets them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.support.engine.gemma_chat import ScriptedRunner, make_tokenizer, spelled
from tests.support.gateway.fake_decoder import Decoder
from tests.support.gateway.running import running_gateway, serving
from tests.support.waiting import wait_for

TOKENIZER = make_tokenizer()
THOUGHT = "<|channel>thought\nThey ask for the weather.\n<channel|>"
CALL = '<|tool_call>call:weather{town:<|"|>Oslo<|"|>}<tool_call|>'
ASKED: Any = {"role": "user", "content": "How is it in Oslo?"}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}},
            "required": ["town"],
        },
    },
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[ScriptedRunner, openai.OpenAI]]:
    runner = ScriptedRunner(TOKENIZER.vocab_size)
    decoder = Decoder(TOKENIZER, runner=runner)
    with running_gateway(TOKENIZER, decoder.find) as gateway:
        wait_for(lambda: serving(gateway))
        with openai.OpenAI(base_url=gateway.base_url, api_key="any", max_retries=0) as client:
            yield runner, client
    decoder.close()


def play(runner: ScriptedRunner, text: str) -> None:
    runner.play(spelled(TOKENIZER, text))


def test_a_round_with_a_tool(cluster: tuple[ScriptedRunner, openai.OpenAI]) -> None:
    runner, client = cluster
    asked: Any = {"model": "counter", "tools": [WEATHER], "temperature": 0}
    play(runner, f"{THOUGHT}{CALL}<|tool_response>")
    first = client.chat.completions.create(messages=[ASKED], reasoning_effort="low", **asked)
    said = first.choices[0].message
    (call,) = said.tool_calls or []
    assert first.choices[0].finish_reason == "tool_calls" and said.content is None
    assert said.reasoning_content == "They ask for the weather."
    assert json.loads(call.function.arguments) == {"town": "Oslo"}
    answered: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    play(runner, "Sunny.<turn|>")
    history: Any = [ASKED, said.model_dump(exclude_none=True), answered]
    second = client.chat.completions.create(messages=history, **asked)
    assert second.choices[0].message.content == "Sunny."
    assert second.choices[0].finish_reason == "stop"


def test_the_same_as_a_stream(cluster: tuple[ScriptedRunner, openai.OpenAI]) -> None:
    runner, client = cluster
    play(runner, f"{CALL}<|tool_response>")
    with client.chat.completions.stream(
        model="counter", messages=[ASKED], tools=[WEATHER], temperature=0
    ) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"town": "Oslo"}
    assert final.choices[0].finish_reason == "tool_calls"


def test_a_required_call(cluster: tuple[ScriptedRunner, openai.OpenAI]) -> None:
    runner, client = cluster
    play(runner, "Not now.<turn|>")
    answer = client.chat.completions.create(
        model="counter",
        messages=[ASKED],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        temperature=0,
        max_tokens=60,
    )
    assert answer.choices[0].message.tool_calls or answer.choices[0].finish_reason == "length"
    assert not answer.choices[0].message.content


def test_a_format(cluster: tuple[ScriptedRunner, openai.OpenAI]) -> None:
    class Town(BaseModel):
        is_capital: bool

    runner, client = cluster
    play(runner, '{"is_capital": true}<turn|>')
    answer = client.chat.completions.parse(
        model="counter", messages=[ASKED], response_format=Town, temperature=0, max_tokens=100
    )
    assert answer.choices[0].message.parsed == Town(is_capital=True)
    broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        client.chat.completions.create(model="counter", messages=[ASKED], response_format=broken)
