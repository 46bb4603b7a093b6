"""Errors as OpenAI's clients see them, before and in the middle of an answer."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import openai
import pytest
from pydantic import BaseModel, ValidationError

from cluster.errors import (
    BrioletteError,
    ContextTooLong,
    PermissionDenied,
    QuotaExceeded,
    SessionInUse,
    Unauthenticated,
    Unavailable,
)
from cluster.tenants.admission import Lease, OpenAdmission, OpenLease
from deployments.gateway.openai.schema import ChatBody, CompletionBody
from protos.briolette.v1.inference_pb2 import (
    Generation,
)
from tests.support.gateway.http_server import running_server
from tests.support.gateway.openai_requests import EIGHT, HELLO
from tests.support.gateway.scripted_backend import ScriptedBackend


class Refusing(OpenAdmission):
    """An admission by script."""

    is_open = False

    def __init__(self) -> None:
        self.error: BrioletteError | None = None
        self.keys: list[str | None] = []

    def admit(self, key: str | None) -> Lease:
        self.keys.append(key)
        if self.error is not None:
            raise self.error
        return OpenLease()


def test_who_is_refused_and_how() -> None:
    quota = QuotaExceeded("The tenant has used up its tokens.")
    quota.retry_after_s = 12.3
    cases: list[tuple[BrioletteError, type[openai.APIStatusError], str | None]] = [
        (Unauthenticated("No such key."), openai.AuthenticationError, None),
        (PermissionDenied("Not this model."), openai.PermissionDeniedError, None),
        (quota, openai.RateLimitError, "13"),
    ]
    admission, backend = Refusing(), ScriptedBackend()
    with running_server(backend, admission) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="the key", max_retries=0)
        client.chat.completions.create(model="", messages=HELLO)
        assert admission.keys == ["the key"]
        for admission.error, kind, retry_after in cases:
            with pytest.raises(kind) as caught:
                client.chat.completions.create(model="", messages=HELLO)
            assert str(admission.error) in str(caught.value)
            assert caught.value.response.headers.get("retry-after") == retry_after
            assert caught.value.request_id
    assert len(backend.requests) == 1


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (ContextTooLong("Too long."), openai.BadRequestError, "context_length_exceeded"),
        (SessionInUse("In use."), openai.ConflictError, None),
        (Unavailable("No decoder."), openai.InternalServerError, None),
        (BrioletteError("A bug."), openai.InternalServerError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token(
    scripted: openai.OpenAI,
    backend: ScriptedBackend,
    error: BrioletteError,
    kind: type[openai.APIStatusError],
    code: str | None,
    stream: bool,
) -> None:
    backend.script = [error]
    with pytest.raises(kind, match=str(error)) as caught:
        scripted.chat.completions.create(model="", messages=HELLO, stream=stream)
    assert caught.value.code == code
    assert ("retry-after" in caught.value.response.headers) == (error.status == "UNAVAILABLE")


def test_an_error_in_the_middle_of_a_stream(
    scripted: openai.OpenAI, backend: ScriptedBackend
) -> None:
    backend.script = [Generation(text="a"), Unavailable("The decoder is gone.")]
    pieces = []
    with pytest.raises(openai.APIError, match="decoder is gone"):
        for chunk in scripted.chat.completions.create(model="", messages=HELLO, stream=True):
            pieces.append(chunk.choices[0].delta.content)
    assert pieces == ["a"]
    raw = httpx.post(
        f"{scripted.base_url}chat/completions", json={"messages": HELLO, "stream": True}
    )
    assert "event: error\n" in raw.text and "[DONE]" not in raw.text


IMAGE: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"messages": IMAGE}, "messages", "Only text"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role", "Input should be"),
        ({"messages": "hello"}, "messages", "list"),
        ({"logit_bias": {"1": 5.0}}, "logit_bias", "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities", "text only"),
        ({"functions": [{}]}, "functions", "tools"),
        ({"n": 0}, "n", "greater"),
        ({"top_k": 0}, "top_k", "at least 1"),
        ({"max_tokens": 2**40}, "max_tokens", "less"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"messages": HELLO * 5000}, "messages", "at most 4096"),
    ],
)
def test_what_is_refused_in_a_chat(
    scripted: openai.OpenAI, fields: dict[str, Any], param: str, sentence: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence) as caught:
        scripted.post(
            "/chat/completions", body={"messages": HELLO, **fields}, cast_to=httpx.Response
        )
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt.texts.1"),
        ({"prompt": [[1], [1, "x"]]}, "prompt.id_lists.1.1"),
        ({"echo": True}, "echo"),
        ({"suffix": "!"}, "suffix"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
    ],
)
def test_what_is_refused_in_a_completion(
    scripted: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        scripted.post("/completions", body={"prompt": "a", **fields}, cast_to=httpx.Response)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionBody, {"prompt": [{}] * 300_000}),
        (CompletionBody, {"prompt": [1, *["x"] * 300_000]}),
        (CompletionBody, {"prompt": "a", "stop": [1] * 300_000}),
        (ChatBody, {"messages": [{}] * 300_000}),
        (ChatBody, {"messages": [{**HELLO[0], "content": [{}] * 300_000}]}),
    ],
)
def test_a_bad_item_is_told_once_and_not_for_each(
    model: type[BaseModel], body: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() < 5


def test_out_of_the_engines_range(client: openai.OpenAI) -> None:
    for fields, sentence in (
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"model": "gpt-4"}, "serves counter"),
        ({"messages": []}, "message"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
    ):
        with pytest.raises(openai.APIStatusError, match=sentence) as caught:
            client.chat.completions.create(**{"messages": HELLO, **EIGHT, **fields})
        assert caught.value.status_code in (400, 404)
