"""OpenAI's own SDK against the gateway: answers, whole and streamed, one and several."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from cluster.errors import (
    Overloaded,
)
from protos.briolette.v1.inference_pb2 import (
    Generation,
)
from tests.support.gateway.fake_decoder import Decoder
from tests.support.gateway.openai_requests import EIGHT, HELLO, PROMPT_TOKENS
from tests.support.gateway.scripted_backend import ScriptedBackend


def test_a_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=HELLO, **EIGHT)
    assert whole.choices[0].message.content == ";<=>?@AB"  # counts on from the colon
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length" and whole.model == "counter"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (PROMPT_TOKENS, 8)
    assert whole.usage.total_tokens == PROMPT_TOKENS + 8
    chunks = list(client.chat.completions.create(messages=HELLO, stream=True, **EIGHT))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ";<=>?@AB"
    assert [chunk.choices[0].delta.role for chunk in chunks][:2] == ["assistant", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1 and all(c.usage is None for c in chunks)


def test_usage_ends_a_stream_that_wants_it(client: openai.OpenAI) -> None:
    *chunks, last = client.chat.completions.create(
        messages=HELLO, stream=True, stream_options={"include_usage": True}, **EIGHT
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (PROMPT_TOKENS, 8)


def test_asynchronously(base_url: str) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0) as client:
            whole = await client.chat.completions.create(messages=HELLO, **EIGHT)
            stream = await client.chat.completions.create(messages=HELLO, stream=True, **EIGHT)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert whole.choices[0].message.content == text == ";<=>?@AB"
            completion = await client.completions.create(prompt="a", **EIGHT)
            pieces = await client.completions.create(prompt="a", stream=True, **EIGHT)
            text = "".join([piece.choices[0].text async for piece in pieces])
            assert completion.choices[0].text == text == "bcdefghi"
            assert [model.id async for model in client.models.list()] == ["counter"]

    asyncio.run(ask())


def test_completions_of_texts_and_token_ids(client: openai.OpenAI) -> None:
    for prompt in ("a", ["a"], [97], [[97]]):
        answer = client.completions.create(prompt=prompt, **EIGHT)
        assert [choice.text for choice in answer.choices] == ["bcdefghi"]
    both = client.completions.create(prompt=["a", "xa"], n=2, **EIGHT)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.usage is not None
    assert (both.usage.prompt_tokens, both.usage.completion_tokens) == (3, 32)
    short = client.completions.create(model="counter", prompt="a", temperature=0)
    assert short.usage is not None and short.usage.completion_tokens == 16  # OpenAI's default


def test_parts_of_a_message_are_one_text(client: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answer = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **EIGHT)
    assert answer.usage is not None and answer.usage.prompt_tokens == PROMPT_TOKENS


def test_stop_strings(client: openai.OpenAI) -> None:
    for stop in ("ef", ["xx", "ef"]):
        answer = client.completions.create(prompt="a", stop=stop, **EIGHT)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("bcd", "stop")


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=2, **EIGHT)
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.bytes, first.logprob) == (";", [59], pytest.approx(0.0, abs=1e-6))
    assert first.top_logprobs[0].token == ";" and len(first.top_logprobs) == 2
    plain = client.chat.completions.create(messages=HELLO, logprobs=True, **EIGHT)
    assert plain.choices[0].logprobs is not None and plain.choices[0].logprobs.content
    assert [token.token for token in plain.choices[0].logprobs.content] == list(";<=>?@AB")
    chunks = client.chat.completions.create(messages=HELLO, logprobs=True, stream=True, **EIGHT)
    tokens = [t.token for c in chunks for t in (c.choices[0].logprobs.content or ())]
    assert tokens == list(";<=>?@AB")


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt="a", logprobs=1, **EIGHT)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == list("bcdefghi")
    assert logprobs.text_offset == list(range(8)) and logprobs.top_logprobs
    assert [list(top) for top in logprobs.top_logprobs] == [[char] for char in "bcdefghi"]
    offsets: list[int] = []
    for chunk in client.completions.create(prompt="a", logprobs=1, stream=True, **EIGHT):
        assert chunk.choices[0].logprobs is not None
        offsets += chunk.choices[0].logprobs.text_offset or []
    assert offsets == list(range(8))


def test_choices_of_a_stream_come_side_by_side(client: openai.OpenAI, decoder: Decoder) -> None:
    decoder.runner.step_s = 0.005
    texts, order = ["", "", ""], []
    for chunk in client.chat.completions.create(messages=HELLO, n=3, stream=True, **EIGHT):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        order.append(choice.index)
    assert texts == [";<=>?@AB"] * 3
    assert order != sorted(order)


def test_choices_have_seeds_of_their_own(scripted: openai.OpenAI, backend: ScriptedBackend) -> None:
    def seeds(**fields: Any) -> list[int]:
        backend.adds.clear()
        scripted.chat.completions.create(model="", messages=HELLO, **fields)
        return [add.sampling.seed for add in backend.adds]

    first = seeds(n=4, seed=42)
    assert first == seeds(n=4, seed=42) and len(set(first)) == 4
    assert first[0] == 42 == seeds(seed=42)[0]
    assert all(0 <= seed < 2**63 for seed in seeds(n=2, seed=-1))
    backend.adds.clear()
    scripted.chat.completions.create(model="", messages=HELLO, n=2)
    assert not any(add.sampling.HasField("seed") for add in backend.adds)
    assert len({add.request_id for add in backend.adds}) == 2


def test_one_that_fails_ends_the_others(scripted: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = [Generation(text="a"), 0.05, Overloaded("The queue is full.")]
    with pytest.raises(openai.InternalServerError, match="queue is full"):
        scripted.chat.completions.create(model="", messages=HELLO, n=3)
    assert backend.num_running == 0
