"""OpenAI's fields as the engine gets them."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from protos.briolette.v1.inference_pb2 import (
    ChatRequest,
    Generation,
    Sampling,
)
from tests.support.gateway.openai_requests import HELLO
from tests.support.gateway.scripted_backend import END, ScriptedBackend


def test_every_field_reaches_the_engine(scripted: openai.OpenAI, backend: ScriptedBackend) -> None:
    scripted.chat.completions.create(
        model="scripted",
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": "hello"},
        ],
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        max_completion_tokens=9,
        max_tokens=5,
        seed=3,
        stop=["a", "b"],
        logprobs=True,
        top_logprobs=2,
        user="me",
        metadata={"a": "b"},
        store=True,
        extra_body={
            "top_k": 7,
            "min_p": 0.01,
            "repetition_penalty": 1.1,
            "priority": -2,
            "no_such_field": 1,
        },
    )
    (request,) = backend.requests
    assert isinstance(request, ChatRequest)
    assert request.model == "scripted" and request.priority == -2
    assert [message.role for message in request.messages] == ["developer", "user"]
    assert request.sampling == Sampling(
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        seed=3,
        logprobs=2,
        stop=["a", "b"],
        max_tokens=9,
    )


def test_null_is_the_same_as_absent(scripted: openai.OpenAI, backend: ScriptedBackend) -> None:
    nulls: dict[str, Any] = dict.fromkeys(
        ["temperature", "stop", "n", "tools", "response_format", "seed", "stream"]
    )
    scripted.chat.completions.create(model="", messages=HELLO, **nulls)
    scripted.chat.completions.create(model="", messages=HELLO, extra_body={"top_k": -1})
    assert [request.sampling for request in backend.requests] == [Sampling(), Sampling()]


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}, False),
    ],
)
def test_thinking_is_asked_for(
    scripted: openai.OpenAI, backend: ScriptedBackend, fields: dict[str, Any], thinks: bool
) -> None:
    scripted.chat.completions.create(model="", messages=HELLO, extra_body=fields)
    assert backend.requests[0].thinking is thinks  # type: ignore[union-attr]


def test_formats(scripted: openai.OpenAI, backend: ScriptedBackend) -> None:
    class Town(BaseModel):
        name: str
        population: int

    backend.script = [Generation(text='{"name": "Oslo", "population": 700000}'), END]
    parsed = scripted.chat.completions.parse(model="", messages=HELLO, response_format=Town)
    assert parsed.choices[0].message.parsed == Town(name="Oslo", population=700000)
    schema = json.loads(backend.requests[0].sampling.json_schema)
    assert schema["properties"].keys() == {"name", "population"}
    scripted.chat.completions.create(
        model="", messages=HELLO, response_format={"type": "json_object"}
    )
    assert backend.requests[1].sampling.json_object
    scripted.chat.completions.create(model="", messages=HELLO, response_format={"type": "text"})
    assert backend.requests[2].sampling.WhichOneof("format") is None
