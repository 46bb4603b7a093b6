"""Thoughts, text and tool calls by token id: read as they stream, through the engine and gRPC."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.spec import AttentionKind
from deployments.gateway.calls.output_collector import merge
from deployments.gateway.gateway import Gateway
from engine.cache.kv_cache import KVCacheConfig
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.outputs import RequestOutput
from engine.request import FinishReason, SamplingParams
from engine.text.dialect import AnswerDelta, AnswerStream
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_STOP,
    FINISH_REASON_TOOL_CALLS,
    TOOL_CHOICE_NONE,
    TOOL_CHOICE_REQUIRED,
    ChatRequest,
    Generation,
    Message,
    Sampling,
    Tool,
    ToolCallPiece,
)
from protos.briolette.v1.inference_pb2_grpc import InferenceStub
from tests.support.engine.gemma_chat import CONTROL_TOKENS, ScriptedRunner, make_tokenizer, spelled
from tests.support.gateway.fake_decoder import Decoder
from tests.support.gateway.requests import failure
from tests.support.gateway.running import running_gateway, serving
from tests.support.waiting import wait_for

TOKENIZER = make_tokenizer()
DIALECT = TOKENIZER.dialect
CALL = '<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
ARGUMENTS = {"city": "Paris", "days": 3}
THOUGHT = "<|channel>thought\nIt rains.\n\nOr not.\n<channel|>"


def ids(text: str) -> list[int]:
    return spelled(TOKENIZER, text)


def stream(stop: Sequence[str] = ()) -> AnswerStream:
    return AnswerStream(TOKENIZER, DIALECT, stop)


def read(text: str, stop: Sequence[str] = ()) -> tuple[AnswerDelta, AnswerStream]:
    """All parts of an answer that came token by token."""
    reader, parts = stream(stop), AnswerDelta()
    for token_id in ids(text):
        new = reader.push([token_id])
        parts.add(new)
        if new.matched_stop is not None:
            break
    parts.add(reader.finish())
    return parts, reader


def arguments_of(pieces: Iterable[Any]) -> dict[int, str]:
    joined: dict[int, str] = {}
    for piece in pieces:
        joined[piece.index] = joined.get(piece.index, "") + piece.arguments
    return joined


# The parts of an answer


def test_an_answer_is_told_apart() -> None:
    parts, reader = read(f"{THOUGHT}One moment.{CALL}")
    assert (parts.thought, parts.text) == ("It rains.\n\nOr not.", "One moment.")
    assert [(p.id, p.name) for p in parts.tool_calls if p.name] == [("call_0", "weather")]
    assert json.loads(arguments_of(parts.tool_calls)[0]) == ARGUMENTS
    assert reader.has_calls
    assert reader.num_thought_tokens == len(ids(THOUGHT))


def test_several_calls() -> None:
    parts, reader = read(f"{CALL}{CALL}<|tool_call>call:now{{}}<tool_call|>")
    got = {index: json.loads(text) for index, text in arguments_of(parts.tool_calls).items()}
    assert got == {0: ARGUMENTS, 1: ARGUMENTS, 2: {}}
    assert [piece.name for piece in parts.tool_calls if piece.name] == ["weather", "weather", "now"]
    assert reader.has_calls


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_cut_gives_the_same_parts(data: st.DataObject) -> None:
    """For any tokens, also those of a model that writes malformed answers."""
    tokens = st.sampled_from([*ids(f"{THOUGHT}a{CALL}"), *range(len(CONTROL_TOKENS))])
    token_ids = data.draw(st.lists(tokens, max_size=40))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(token_ids)), max_size=5)))
    one_by_one, at_once = stream(), stream()
    got, expected = AnswerDelta(), AnswerDelta()
    for token_id in token_ids:
        expected.add(one_by_one.push([token_id]))
    for start, end in zip([0, *cuts], [*cuts, len(token_ids)], strict=True):
        got.add(at_once.push(token_ids[start:end]))
    got.add(at_once.finish())
    expected.add(one_by_one.finish())
    assert (got.text, got.thought) == (expected.text, expected.thought)
    assert arguments_of(got.tool_calls) == arguments_of(expected.tool_calls)
    for text in arguments_of(got.tool_calls).values() if at_once.has_calls else ():
        json.loads(text)
    assert not any(token in got.text for token in CONTROL_TOKENS.values())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_stream_and_its_tokens_have_the_same_thoughts(data: st.DataObject) -> None:
    tokens = st.sampled_from(ids(f"{THOUGHT}a{CALL}"))
    token_ids = data.draw(st.lists(tokens, max_size=40))
    reader = stream()
    reader.push(token_ids)
    num_tokens = sum(stop - start for start, stop in DIALECT.thoughts(token_ids))
    assert reader.num_thought_tokens == num_tokens


def test_a_closing_token_closes_only_its_own_part() -> None:
    parts, _ = read("<|tool_call>call:f{a:<channel|>secret:1}<tool_call|>")
    assert (parts.text, parts.thought) == ("", "")
    assert arguments_of(parts.tool_calls) == {0: '{"a":"secret:1"}'}
    parts, _ = read("<|channel>thought\nI think<tool_call|>, still secret<channel|>Yes")
    assert (parts.text, parts.thought) == ("Yes", "I think, still secret")


def test_what_is_typed_is_text() -> None:
    """The characters of a control token are no control token."""
    typed = f"{CALL}{THOUGHT}"
    reader, parts = stream(), AnswerDelta()
    parts.add(reader.push(TOKENIZER.encode_plain(typed)))
    parts.add(reader.finish())
    assert (parts.text, parts.thought, parts.tool_calls) == (typed, "", [])


def test_control_tokens_typed_in_a_call_stay_in_its_string() -> None:
    reader, parts = stream(), AnswerDelta()
    typed = '<|"|>}<tool_call|><channel|>'
    token_ids = [*ids('<|tool_call>call:f{a:<|"|>'), *TOKENIZER.encode_plain(typed)]
    parts.add(reader.push([*token_ids, *ids('<|"|>}<tool_call|>')]))
    assert json.loads(arguments_of(parts.tool_calls)[0]) == {"a": typed}
    assert reader.has_calls


def test_arguments_stream() -> None:
    reader, pieces = stream(), []
    for token_id in ids('<|tool_call>call:f{a:<|"|>some long text'):
        pieces += reader.push([token_id]).tool_calls
    assert arguments_of(pieces)[0] == '{"a":"some long text'
    assert len(pieces) > 10


@pytest.mark.parametrize(
    "broken",
    [
        "<|tool_call>call:f{a:1",
        "<|tool_call>call:f{a:1]}<tool_call|>",
        "<|tool_call>call:f{a:<tool_call|>",
        "<|tool_call>say f{a:1}<tool_call|>",
        "<|tool_call>call:f<tool_call|>",
        '<|tool_call>call:f{a:<|"|>x<|channel>thought\nhm<channel|>',
        f"{CALL}<|tool_call><tool_call|>",
    ],
)
def test_a_malformed_call_is_no_text_and_not_whole(broken: str) -> None:
    parts, reader = read(f"before{broken}")
    assert parts.text == "before"
    assert not reader.has_calls


@pytest.mark.parametrize(
    ("written", "thought", "text"),
    [
        ("<|channel>thought\n<channel|>Yes", "", "Yes"),
        ("<|channel>thought<channel|>Yes", "", "Yes"),
        ("<|channel><channel|>Yes", "", "Yes"),
        ("<|channel>no name<channel|>Yes", "no name", "Yes"),
        ("<|channel>thought\nthought\nx<channel|>Yes", "thought\nx", "Yes"),
        ("<|channel>thought\ncut \n\n", "cut \n\n", ""),
        ("<|channel>thou", "", ""),
        ("<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>d", "ac", "bd"),
        ("<channel|>Yes<tool_call|>", "", "Yes"),
    ],
)
def test_thoughts(written: str, thought: str, text: str) -> None:
    parts, _ = read(written)
    assert (parts.thought, parts.text) == (thought, text)


@pytest.mark.parametrize(
    ("prompt", "said", "thought", "text"),
    [
        ("<|turn>model\n<|channel>thought\n", "hm\n<channel|>Yes", "hm", "Yes"),
        ("<|turn>model\n<|channel>", "thought\nhm\n<channel|>Yes", "hm", "Yes"),
        ("<|turn>model\n<|channel>thought\n", "<|channel>thought\nhm<channel|>Yes", "hm", "Yes"),
        ("<|turn>model\n<|channel>thought\n", "hm", "hm", ""),
        ("<|turn>model\n<|channel>thought\n<channel|>", "Yes", "", "Yes"),
        ("<|turn>model\n", "Yes", "", "Yes"),
    ],
)
def test_an_answer_may_begin_in_a_thought(prompt: str, said: str, thought: str, text: str) -> None:
    reader, parts = AnswerStream(TOKENIZER, DIALECT, prompt_ids=ids(prompt)), AnswerDelta()
    parts.add(reader.push(ids(said)))
    parts.add(reader.finish())
    assert (parts.thought, parts.text) == (thought, text)


def test_a_stop_string_ends_the_text_only() -> None:
    written = '<|channel>thought\nSTOP\n<channel|><|tool_call>call:f{a:<|"|>STOP<|"|>}<tool_call|>'
    parts, _ = read(f"{written}a STOP b", ["STOP"])
    assert (parts.text, parts.thought, parts.matched_stop) == ("a ", "STOP", None)
    assert json.loads(arguments_of(parts.tool_calls)[0]) == {"a": "STOP"}


def test_a_character_cut_by_a_call_is_completed_nowhere() -> None:
    cut = TOKENIZER.encode_plain("é")
    reader, parts = stream(), AnswerDelta()
    parts.add(reader.push([cut[0], *ids(CALL)]))
    parts.add(reader.finish())
    assert parts.text == "\ufffd"
    assert json.loads(arguments_of(parts.tool_calls)[0]) == ARGUMENTS


# Through the engine


def make_core() -> tuple[EngineCore, ScriptedRunner]:
    runner = ScriptedRunner(TOKENIZER.vocab_size)
    core = EngineCore(
        runner,
        KVCacheConfig(16, dict.fromkeys(AttentionKind, 100)),
        spec_limits=SpecLimits(512, 64, TOKENIZER.vocab_size, eos_token_ids=TOKENIZER.eos_ids),
        tokenizer=TOKENIZER,
    )
    return core, runner


def answer_of(
    said: str, *, num_before: int = 0, chat: bool = True, **sampling: Any
) -> tuple[list[RequestOutput], AnswerDelta]:
    """What the engine makes of a script, after another engine has brought `num_before` tokens."""
    core, runner = make_core()
    script = ids(said)
    runner.play(script[num_before:])
    core.add(
        request_id="x",
        prompt_ids=[40, 41],
        output_ids=script[:num_before],
        sampling=SamplingParams(temperature=0.0, **sampling),
        chat=chat,
    )
    outputs = []
    while core.has_work:
        outputs += core.step()
    core.check_integrity()
    parts = AnswerDelta()
    for output in outputs:
        parts.add(AnswerDelta(output.text, output.thought, output.tool_calls))
    return outputs, parts


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (f"{THOUGHT}{CALL}<|tool_response>", FinishReason.TOOL_CALLS),
        (f"{CALL}<turn|>", FinishReason.TOOL_CALLS),
        (f"{THOUGHT}Yes.<turn|>", FinishReason.STOP),
        ("<|tool_call>call:f{a:<turn|>", FinishReason.STOP),
        ("<|channel>thought\nhm<turn|>", FinishReason.STOP),
        ("<|tool_response>", FinishReason.STOP),
    ],
)
def test_how_an_answer_ends(said: str, reason: FinishReason) -> None:
    outputs, _ = answer_of(said)
    assert outputs[-1].finish_reason is reason
    assert [i for output in outputs for i in output.new_token_ids] == ids(said)


def test_a_cut_answer_has_what_came() -> None:
    outputs, parts = answer_of(THOUGHT, max_tokens=14, logprobs=0)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert outputs[-1].num_thought_tokens == 14
    assert (parts.thought, parts.text) == ("It rai", "")
    assert sum(len(output.logprobs or []) for output in outputs) == 14
    outputs, parts = answer_of(CALL, max_tokens=len(ids(CALL)))
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert json.loads(arguments_of(parts.tool_calls)[0]) == ARGUMENTS


def test_a_completion_has_no_parts() -> None:
    outputs, parts = answer_of(f"{THOUGHT}{CALL}<turn|>", chat=False)
    assert (parts.thought, parts.tool_calls) == ("", [])
    assert parts.text == TOKENIZER.decode(ids(f"{THOUGHT}{CALL}"))
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].num_thought_tokens == 0


@pytest.mark.parametrize("num_before", range(0, 60, 7))
def test_a_resumed_answer_goes_on_with_its_parts(num_before: int) -> None:
    said = f"{THOUGHT}Hm.{CALL}<turn|>"
    _, whole = answer_of(said)
    outputs, rest = answer_of(said, num_before=num_before)
    reader, before = stream(), AnswerDelta()
    before.add(reader.push(ids(said)[:num_before]))
    assert before.text + rest.text == whole.text
    assert before.thought + rest.thought == whole.thought
    joined = arguments_of([*before.tool_calls, *rest.tool_calls])
    assert json.loads(joined[0]) == ARGUMENTS
    assert outputs[-1].finish_reason is FinishReason.TOOL_CALLS
    assert outputs[-1].num_thought_tokens == len(ids(THOUGHT))


# Over gRPC

WEATHER = Tool(
    name="weather",
    description="The weather.",
    parameters=json.dumps(
        {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        }
    ),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[ScriptedRunner, Gateway]]:
    runner = ScriptedRunner(TOKENIZER.vocab_size)
    decoder = Decoder(TOKENIZER, runner=runner)
    with running_gateway(TOKENIZER, decoder.find) as gateway:
        wait_for(lambda: serving(gateway))
        yield runner, gateway
    decoder.close()


@pytest.fixture
def runner(cluster: tuple[ScriptedRunner, Gateway]) -> ScriptedRunner:
    return cluster[0]


@pytest.fixture
def stub(cluster: tuple[ScriptedRunner, Gateway]) -> Iterator[InferenceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{cluster[1].port}") as channel:
        yield InferenceStub(channel)


def chat(*messages: Message, **fields: Any) -> ChatRequest:
    sampling = Sampling(**{"temperature": 0.0, "max_tokens": 200, **fields.pop("sampling", {})})
    said = messages or (Message(role="user", content="How is it in Paris?"),)
    return ChatRequest(messages=said, sampling=sampling, **fields)


def test_a_tool_loop(runner: ScriptedRunner, stub: InferenceStub) -> None:
    runner.play(ids(f"{THOUGHT}{CALL}<|tool_response>"))
    asked = Message(role="user", content="How is it in Paris?")
    first = stub.ChatOnce(chat(asked, tools=[WEATHER], thinking=True))
    assert (first.text, first.thought) == ("", "It rains.\n\nOr not.")
    assert first.finish_reason == FINISH_REASON_TOOL_CALLS
    assert first.usage.thought_tokens == len(ids(THOUGHT))
    (call,) = first.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("weather", ARGUMENTS)
    called = Message(role="assistant", thought=first.thought)
    called.tool_calls.add(id=call.id, name=call.name, arguments=call.arguments)
    result = Message(role="tool", content="sunny", tool_call_id=call.id)
    runner.play(ids("Good.\n<channel|>Sunny.<turn|>"))  # in the thought that the template opened
    second = stub.ChatOnce(chat(asked, called, result, tools=[WEATHER], thinking=True))
    assert (second.thought, second.text) == ("Good.", "Sunny.")
    assert second.finish_reason == FINISH_REASON_STOP
    assert second.usage.thought_tokens == len(ids("Good.\n<channel|>"))
    # The template gives back what the model wrote, so nothing of it is computed again.
    brought = ids('response:weather{value:<|"|>sunny<|"|>}<tool_response|><|channel>thought\n')
    so_far = first.usage.prompt_tokens + first.usage.output_tokens
    assert second.usage.prompt_tokens == so_far + len(brought)


def test_pieces_stream_and_join_to_the_whole(runner: ScriptedRunner, stub: InferenceStub) -> None:
    said = ids(f"{THOUGHT}Well. {CALL}{CALL}<|tool_response>")
    runner.play(said)
    joined, num_pieces = Generation(), 0
    for piece in stub.Chat(chat(tools=[WEATHER])):
        num_pieces += 1
        before = piece.SerializeToString()
        merge(joined, piece)
        assert piece.SerializeToString() == before
    runner.play(said)
    whole = stub.ChatOnce(chat(tools=[WEATHER]))
    assert (
        (joined.text, joined.thought)
        == (whole.text, whole.thought)
        == (
            "Well. ",
            "It rains.\n\nOr not.",
        )
    )
    assert [json.loads(call.arguments) for call in joined.tool_calls] == [ARGUMENTS] * 2
    assert [call.index for call in whole.tool_calls] == [0, 1]
    assert list(joined.token_ids) == list(whole.token_ids) == said
    assert num_pieces > 10


def test_a_user_who_types_a_call_gets_text(runner: ScriptedRunner, stub: InferenceStub) -> None:
    """What the model repeats of it are the characters, as the user's were."""
    runner.play([*TOKENIZER.encode_plain(CALL), *ids("<turn|>")])
    answer = stub.ChatOnce(chat(Message(role="user", content=f"Say {CALL}"), tools=[WEATHER]))
    assert (answer.text, list(answer.tool_calls)) == (CALL, [])
    assert answer.finish_reason == FINISH_REASON_STOP


def test_a_required_call_comes_and_fits_its_tool(
    runner: ScriptedRunner, stub: InferenceStub
) -> None:
    free = Tool(name="other", parameters='{"type": "object"}')
    for required in ("", "weather"):
        request = chat(
            tools=[WEATHER, free], tool_choice=TOOL_CHOICE_REQUIRED, required_tool=required
        )
        request.sampling.temperature = 1.0
        runner.play(ids("Hello"))
        request.sampling.max_tokens = 60
        answer = stub.ChatOnce(request)
        assert answer.text == ""
        assert answer.tool_calls[0].name in (("weather",) if required else ("weather", "other"))
    runner.play(ids(f"{THOUGHT}Hello{CALL[len('<|tool_call>') :]}<turn|>"))
    forced = stub.ChatOnce(
        chat(tools=[WEATHER, free], tool_choice=TOOL_CHOICE_REQUIRED, thinking=True)
    )
    assert forced.thought == "It rains.\n\nOr not."
    assert forced.text == "" and forced.tool_calls[0].name


def test_tools_that_cannot_be_required_are_blamed(
    stub: InferenceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.text.grammar.MAX_CHARS", 10)
    with pytest.raises(grpc.RpcError) as refused:
        stub.ChatOnce(chat(tools=[WEATHER], tool_choice=TOOL_CHOICE_REQUIRED))
    sentence = "These tools can't be required. The lark grammar has more than 10 characters."
    assert refused.value.details() == sentence


def test_no_calls_where_none_are_wanted(runner: ScriptedRunner, stub: InferenceStub) -> None:
    runner.play(ids(f"{CALL}<turn|>"))
    request = chat(tools=[WEATHER], tool_choice=TOOL_CHOICE_NONE)
    answer = stub.ChatOnce(request)
    assert not answer.tool_calls
    without = stub.ChatOnce(chat(sampling={"max_tokens": 1}))
    assert answer.usage.prompt_tokens == without.usage.prompt_tokens


def test_a_format_leaves_thoughts_and_calls_free(
    runner: ScriptedRunner, stub: InferenceStub
) -> None:
    wanted = {"json_schema": '{"type": "object", "properties": {"a": {"type": "integer"}}}'}
    runner.play(ids(f'{THOUGHT}{{"a":4}}<turn|>'))
    answer = stub.ChatOnce(chat(sampling=wanted, thinking=True))
    assert (answer.thought, answer.text) == ("It rains.\n\nOr not.", '{"a":4}')
    runner.play(ids(f"{THOUGHT}{CALL}<|tool_response>"))
    answer = stub.ChatOnce(chat(sampling=wanted, thinking=True, tools=[WEATHER]))
    assert answer.finish_reason == FINISH_REASON_TOOL_CALLS
    called = Message(role="assistant")
    called.tool_calls.add(id="a", name="weather", arguments="{}")
    result = Message(role="tool", content="sunny", tool_call_id="a")
    runner.play(ids('hm\n<channel|>{"a":4}<turn|>'))  # in the thought that the template opened
    request = chat(Message(role="user", content="?"), called, result, sampling=wanted)
    request.thinking = True
    answer = stub.ChatOnce(request)
    assert (answer.thought, answer.text) == ("hm", '{"a":4}')
    runner.play(ids(f"{THOUGHT}{{}}<turn|>"))
    answer = stub.ChatOnce(chat(sampling={**wanted, "max_tokens": 30}))  # it wasn't told to think
    assert answer.thought == "" and answer.text.startswith("{")


BAD = [
    (chat(tools=[WEATHER, WEATHER]), "same name"),
    (chat(tools=[Tool(name="a b")]), "letters, digits"),
    (chat(tools=[Tool(name="a", parameters="{")]), "not JSON"),
    (chat(tools=[Tool(name="a", parameters="[]")]), "not a JSON object"),
    (chat(tools=[Tool(name="a", parameters='{"a": "\\udc00"}')]), "unpaired surrogate"),
    (chat(tools=[Tool(name="a", parameters='{"a":' * 5000 + "1" + "}" * 5000)]), "recursion"),
    (chat(tool_choice=TOOL_CHOICE_REQUIRED), "needs tools"),
    (chat(tools=[WEATHER], required_tool="weather"), "REQUIRED"),
    (chat(tools=[WEATHER], tool_choice=TOOL_CHOICE_REQUIRED, required_tool="x"), "no tool 'x'"),
    (
        chat(Message(role="tool", content="x", tool_call_id="y")),
        "call 'y', which no earlier message",
    ),
    (chat(sampling={"json_schema": "{"}), "json_schema is invalid"),
    (chat(sampling={"lark": 'start: "a'}), "lark grammar can't be used"),
    (chat(sampling={"regex": "a", "ignore_eos": True}), "ignore_eos is not supported"),
    (
        chat(sampling={"regex": "a"}, tools=[WEATHER], tool_choice=TOOL_CHOICE_REQUIRED),
        "can't both",
    ),
]


@pytest.mark.parametrize(("request_", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_what_is_wrong_is_told(stub: InferenceStub, request_: ChatRequest, sentence: str) -> None:
    status, details = failure(lambda: stub.ChatOnce(request_))
    assert status == "INVALID_ARGUMENT"
    assert sentence in details


def test_merge_joins_pieces_of_a_call() -> None:
    answer = Generation()
    for index, text in ((0, "{"), (0, "}"), (1, "{}")):
        merge(answer, Generation(tool_calls=[ToolCallPiece(index=index, arguments=text)]))
    assert [call.arguments for call in answer.tool_calls] == ["{}", "{}"]
