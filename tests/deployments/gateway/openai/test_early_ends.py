"""OpenAI's clients that go away or wait too long, and signs of life."""

from __future__ import annotations

import httpx2 as httpx
import openai
import pytest

from protos.briolette.v1.inference_pb2 import (
    Generation,
)
from tests.support.gateway.fake_decoder import Decoder
from tests.support.gateway.openai_requests import EIGHT, HELLO
from tests.support.gateway.scripted_backend import END, ScriptedBackend
from tests.support.waiting import wait_for


def test_a_client_that_goes_is_aborted_within_a_step(
    client: openai.OpenAI, decoder: Decoder
) -> None:
    decoder.runner.step_s = 0.1
    fields = {**EIGHT, "max_tokens": 400}
    stream = client.chat.completions.create(messages=HELLO, n=3, stream=True, **fields)
    next(iter(stream))
    num_begun = decoder.runner.num_steps
    stream.close()
    wait_for(lambda: not decoder.engine.has_work)
    assert decoder.runner.num_steps - num_begun <= 3


def test_so_is_one_that_waits_for_a_whole_answer(base_url: str, decoder: Decoder) -> None:
    decoder.runner.step_s = 0.1
    fields = {**EIGHT, "messages": HELLO, "max_tokens": 400}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{base_url}/chat/completions", json=fields, timeout=0.5)
    num_begun = decoder.runner.num_steps
    wait_for(lambda: not decoder.engine.has_work)
    assert decoder.runner.num_steps - num_begun <= 3


def test_a_deadline(client: openai.OpenAI, decoder: Decoder) -> None:
    decoder.runner.step_s = 0.02
    late = client.with_options(default_headers={"x-request-timeout": "0.2"})
    fields = {**EIGHT, "max_tokens": 400}
    with pytest.raises(openai.InternalServerError, match="deadline") as caught:
        late.chat.completions.create(messages=HELLO, **fields)
    assert caught.value.status_code == 504
    with pytest.raises(openai.APIError, match="deadline"):
        list(late.chat.completions.create(messages=HELLO, stream=True, **fields))
    wrong = client.with_options(default_headers={"x-request-timeout": "soon"})
    with pytest.raises(openai.BadRequestError, match="x-request-timeout"):
        wrong.chat.completions.create(messages=HELLO, **EIGHT)


def test_a_deadline_of_a_decoder_that_hangs(
    scripted: openai.OpenAI, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.gateway.calls.client_call.GRACE_S", 0.1)
    backend.script = [30.0]
    late = scripted.with_options(default_headers={"x-request-timeout": "0.1"})
    for n in (1, 2):
        with pytest.raises(openai.InternalServerError, match="deadline"):
            late.chat.completions.create(model="", messages=HELLO, n=n)
    assert backend.num_running == 0


def test_signs_of_life_while_nothing_comes(
    scripted: openai.OpenAI, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.gateway.http.event_stream.HEARTBEAT_S", 0.05)
    backend.script = [0.3, Generation(text="a"), END]
    body = {"messages": HELLO, "stream": True}
    text = httpx.post(f"{scripted.base_url}chat/completions", json=body).text
    assert text.startswith(": wait\n\n") and text.endswith("data: [DONE]\n\n")
    (chunk, _) = scripted.chat.completions.create(model="", messages=HELLO, stream=True)
    assert chunk.choices[0].delta.content == "a"
