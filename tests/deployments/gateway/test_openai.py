"""OpenAI's own SDK against the gateway: with a counting engine, and with answers by script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from pydantic import BaseModel, ValidationError

from cluster.errors import (
    BrioletteError,
    ContextTooLong,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    SessionInUse,
    Unauthenticated,
    Unavailable,
)
from cluster.tenants.admission import Lease, OpenAdmission, OpenLease
from deployments.gateway.gateway import Gateway
from deployments.gateway.openai.schema import ChatBody, CompletionBody
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_TOOL_CALLS,
    TOOL_CHOICE_NONE,
    TOOL_CHOICE_REQUIRED,
    Generation,
    Sampling,
    ToolCall,
    ToolCallPiece,
    Usage,
)
from tests.support.gateway.fake_decoder import Decoder, make_tokenizer
from tests.support.gateway.http_server import running_server
from tests.support.gateway.running import running_gateway, serving
from tests.support.gateway.scripted_backend import END, ScriptedBackend
from tests.support.waiting import wait_for

HELLO: Any = [{"role": "user", "content": "hello"}]
EIGHT: Any = {"model": "counter", "temperature": 0, "max_tokens": 8}
PROMPT_TOKENS = len("user:hello\nassistant:")
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Decoder, Gateway]]:
    tokenizer = make_tokenizer()
    decoder = Decoder(tokenizer)
    with running_gateway(tokenizer, decoder.find) as gateway:
        wait_for(lambda: serving(gateway))
        yield decoder, gateway
    decoder.close()


@pytest.fixture
def decoder(cluster: tuple[Decoder, Gateway]) -> Iterator[Decoder]:
    yield cluster[0]
    cluster[0].runner.step_s = 0.0
    wait_for(lambda: not cluster[0].engine.has_work)
    cluster[0].engine.check_integrity()


@pytest.fixture
def base_url(cluster: tuple[Decoder, Gateway], decoder: Decoder) -> str:
    return f"http://127.0.0.1:{cluster[1].http_port}/v1"


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def scripted(backend: ScriptedBackend) -> Iterator[openai.OpenAI]:
    """A client of answers by script."""
    with running_server(backend) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


# Answers


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
    tokens = [t.token for c in chunks for t in (c.choices[0].logprobs.content or ())]  # type: ignore[union-attr]
    assert tokens == list(";<=>?@AB")


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt="a", logprobs=1, **EIGHT)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == list("bcdefghi")
    assert logprobs.text_offset == list(range(8)) and logprobs.top_logprobs
    assert [list(top) for top in logprobs.top_logprobs] == [[char] for char in "bcdefghi"]
    offsets = []
    for chunk in client.completions.create(prompt="a", logprobs=1, stream=True, **EIGHT):
        assert chunk.choices[0].logprobs is not None
        offsets += chunk.choices[0].logprobs.text_offset or []
    assert offsets == list(range(8))


# Several choices


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


# Requests as the engine gets them


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
    nulls = dict.fromkeys(
        ["temperature", "stop", "n", "tools", "response_format", "seed", "stream"]
    )
    scripted.chat.completions.create(model="", messages=HELLO, **nulls)  # type: ignore[call-overload]
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


# Tools and thoughts

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


# Errors


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
            client.chat.completions.create(**{"messages": HELLO, **EIGHT, **fields})  # type: ignore[call-overload]
        assert caught.value.status_code in (400, 404)


# Ends before the end


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
