"""Tools, calls and thoughts through a template in Gemma 4's format, against transformers' own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster.errors import CheckpointError, InvalidRequest
from engine.text.chat_messages import to_template_messages, to_template_tools
from engine.text.tokenizer import Tokenizer
from tests.support.engine.gemma_chat import (
    CONTROL_TOKENS,
    backend,
    hf_tokenizer,
    hf_wrap,
    make_tokenizer,
    spelled,
)

TOKENIZER, REFERENCE = make_tokenizer(), hf_tokenizer()
TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL: dict[str, Any] = {"id": "a", "name": "weather", "arguments": '{"city": "Paris"}'}
USER: dict[str, Any] = {"role": "user", "content": "How is it in Paris?"}
CALLED: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "thought": "I must look.",
    "tool_calls": [CALL],
}
RESULT: dict[str, Any] = {"role": "tool", "content": "sunny", "tool_call_id": "a"}
SUNNY: dict[str, Any] = {"role": "assistant", "content": "Sunny."}

plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
keys = st.text("abcXYZ_9", min_size=1, max_size=5)
schemas = st.recursive(
    plain | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(keys, schemas, max_size=3)
tools = st.lists(
    st.fixed_dictionaries({"name": st.just("t"), "description": plain, "parameters": objects}),
    max_size=1,
)


@st.composite
def conversations(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[dict[str, Any]]:
    """User and model in turn; the model may call, and think before it."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    for turn in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts)})
        for step in range(draw(st.integers(0, 2))):
            calls = [
                {"id": f"{turn}.{step}.{i}", "name": "t", "arguments": draw(objects)}
                for i in range(draw(st.integers(1, 2)))
            ]
            messages.append({"role": "assistant", "content": draw(texts), "tool_calls": calls})
            if draw(st.booleans()):
                messages[-1]["thought"] = draw(texts)
            messages += [
                {"role": "tool", "content": draw(texts), "tool_call_id": call["id"]}
                for call in calls
            ]
        messages.append({"role": "assistant", "content": draw(texts), "thought": draw(texts)})
    return messages[: draw(st.integers(1, len(messages)))]


def reference(messages: list[dict[str, Any]], **options: Any) -> list[int]:
    token_ids: list[int] = REFERENCE.apply_chat_template(
        to_template_messages(messages),
        tools=to_template_tools(options.get("tools", [])) or None,
        enable_thinking=options.get("thinking", False),
        add_generation_prompt=True,
        return_dict=False,
    )
    return token_ids


def holds_control_token(value: Any) -> bool:
    text = json.dumps(value, ensure_ascii=False).replace('\\"', '"')
    return any(token in text for token in CONTROL_TOKENS.values())


@settings(max_examples=200, deadline=None)
@given(messages=conversations(plain), tools=tools, thinking=st.booleans())
def test_equal_to_transformers(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: bool
) -> None:
    assume(not holds_control_token([messages, tools]))
    options: dict[str, Any] = {"tools": tools, "thinking": thinking}
    got = TOKENIZER.apply_chat_template(messages, **options)
    assert got == reference(messages, **options)


typed = st.lists(
    st.sampled_from([*CONTROL_TOKENS.values(), "call:t{", "}", '<|"', "|>", "a", "\n"]), max_size=6
).map("".join)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_only_the_template_writes_control_tokens(data: st.DataObject) -> None:
    """In no field does what is typed add one or take one away."""
    said = [data.draw(typed) + "a" for _ in range(9)]

    def conversation(texts: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        tool = {
            "name": "t",
            "description": texts[0],
            "parameters": {"type": texts[1], f"{texts[2]}": {"enum": [texts[3]]}},
        }
        call = {"id": texts[4], "name": "t", "arguments": {f"{texts[5]}": [texts[6], 1]}}
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": texts[7]},
            {"role": "user", "content": texts[8]},
            {"role": "assistant", "content": "", "thought": texts[0], "tool_calls": [call]},
            {"role": "tool", "content": texts[1], "tool_call_id": texts[4]},
        ]
        return messages, [tool]

    messages, tools = conversation(said)
    harmless, harmless_tools = conversation(["a"] * 9)
    got = TOKENIZER.apply_chat_template(messages, tools=tools, thinking=True)
    expected = TOKENIZER.apply_chat_template(harmless, tools=harmless_tools, thinking=True)
    control_ids = TOKENIZER.control_ids
    assert [i for i in got if i in control_ids] == [i for i in expected if i in control_ids]
    text = TOKENIZER.decode(got)
    assert all(part.strip() in text for part in (*said[:4], *said[5:]))


def test_a_control_token_typed_in_an_answer_is_not_taken_for_a_thought() -> None:
    said = "<|channel>thought\nnot one<channel|>Yes."
    token_ids = TOKENIZER.apply_chat_template(
        [USER, {"role": "assistant", "content": said}, {"role": "user", "content": "x"}]
    )
    assert said in TOKENIZER.decode(token_ids)


def test_thoughts_stay_only_while_their_turn_lasts() -> None:
    thought = TOKENIZER.encode_plain("I must look.")

    def has_thought(*messages: dict[str, Any]) -> bool:
        ids = TOKENIZER.apply_chat_template(messages)
        return any(ids[i : i + len(thought)] == thought for i in range(len(ids)))

    assert has_thought(USER, CALLED, RESULT)
    assert not has_thought(USER, CALLED, RESULT, SUNNY, USER)


# Conversations of which the beginning is known as ids


def text_of(token_ids: list[int]) -> str:
    decoded: str = REFERENCE.decode(token_ids)
    return decoded


def test_results_are_appended_to_the_call_that_the_model_wrote() -> None:
    wrote = '<|channel>thought\nhm<channel|>Wait.<|tool_call>call:weather{city: <|"|>P<|"|>}'
    known = [*TOKENIZER.apply_chat_template([USER]), *spelled(TOKENIZER, f"{wrote}<tool_call|>")]
    extended = TOKENIZER.extend_chat([USER, CALLED, RESULT], 2, known, tools=[TOOL])
    assert extended[: len(known)] == known
    assert text_of(extended[len(known) :]) == (
        '<|tool_response>response:weather{value:<|"|>sunny<|"|>}<tool_response|>'
    )
    thinking = TOKENIZER.extend_chat([USER, CALLED, RESULT], 2, known, tools=[TOOL], thinking=True)
    assert text_of(thinking[len(extended) :]) == "<|channel>thought\n"


def test_several_calls_and_results() -> None:
    calls = [{**CALL, "id": name} for name in "abc"]
    results = [{**RESULT, "tool_call_id": name, "content": f"result {name}"} for name in "cab"]
    messages = [USER, {**CALLED, "tool_calls": calls}, *results]
    extended = TOKENIZER.extend_chat(messages, 2, [9, 9])
    assert text_of(extended[2:]) == "".join(
        f'<|tool_response>response:weather{{value:<|"|>result {name}<|"|>}}<tool_response|>'
        for name in "cab"
    )


def test_a_turn_without_calls_is_closed() -> None:
    extended = TOKENIZER.extend_chat([USER, CALLED, RESULT, SUNNY, USER], 4, [9, 9])
    assert text_of(extended[2:]) == (
        "<turn|>\n<|turn>user\nHow is it in Paris?<turn|>\n<|turn>model\n"
        "<|channel>thought\n<channel|>"
    )


@settings(max_examples=100, deadline=None)
@given(content=typed.map(lambda text: text + "a"))
def test_what_a_tool_brings_is_plain_text(content: str) -> None:
    messages = [USER, CALLED, {**RESULT, "content": content}]
    extended = TOKENIZER.extend_chat(messages, 2, [9, 9])
    harmless = TOKENIZER.extend_chat([USER, CALLED, RESULT], 2, [9, 9])
    control_ids = TOKENIZER.control_ids
    assert [i for i in extended if i in control_ids] == [i for i in harmless if i in control_ids]
    assert content in TOKENIZER.decode(extended)


def test_thoughts_of_the_last_turn_are_found() -> None:
    turns = "<|turn>model\n<|channel>thought\nold<channel|>a<turn|>\n<|turn>model\n"
    written = "<|channel>thought\n<channel|>x<|channel>thought\nnew<channel|>y<|channel>thought\nc"
    token_ids = spelled(TOKENIZER, turns + written)
    found = [text_of(token_ids[start:stop]) for start, stop in TOKENIZER.thoughts(token_ids)]
    assert found == ["<|channel>thought\nnew<channel|>", "<|channel>thought\nc"]
    cut_by_a_call = spelled(TOKENIZER, "<|turn>model\n<|channel>thought\nx<|tool_call>call:f{}")
    ((start, stop),) = TOKENIZER.thoughts(cut_by_a_call)
    assert text_of(cut_by_a_call[start:stop]) == "<|channel>thought\nx"
    (span,) = TOKENIZER.thoughts(spelled(TOKENIZER, "<|turn>model\n<|channel>thought\n"))
    assert span[1] - span[0] > 1


# What a model can't do


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tools": [TOOL]}, "does not support tools"),
        ({"thinking": True}, "does not support thinking"),
    ],
)
def test_a_template_without_it_says_so(options: dict[str, Any], sentence: str) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert tokenizer.apply_chat_template([USER])
    with pytest.raises(InvalidRequest, match=sentence):
        tokenizer.apply_chat_template([USER], **options)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({**CALLED, "tool_calls": [{**CALL, "name": "a{"}]}, "letters, digits"),
        ({**CALLED, "tool_calls": [{**CALL, "arguments": "[1]"}]}, "not a JSON object"),
        ({**CALLED, "tool_calls": [{**CALL, "arguments": "{"}]}, "not JSON"),
        ({**CALLED, "tool_calls": [{**CALL, "id": None}]}, "no text"),
        ({**CALLED, "tool_calls": [{**CALL, "arguments": {"\udc00": 1}}]}, "surrogate"),
        ({**CALLED, "thought": "\udc01"}, "surrogate"),
        ({**CALLED, "thought": 3}, "no text"),
        ({**RESULT, "tool_call_id": "b"}, "'b', which no earlier message has made"),
    ],
)
def test_bad_calls_are_refused(message: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        TOKENIZER.apply_chat_template([USER, CALLED, message])


def test_a_quote_token_that_plain_text_gives_is_refused() -> None:
    """Were it no special token, whoever types it could end a string."""
    made = backend(special=[token for token in CONTROL_TOKENS.values() if token != '<|"|>'])
    made.add_tokens(['<|"|>'])
    names = {name: token for name, token in CONTROL_TOKENS.items() if name != "escape_token"}
    with pytest.raises(CheckpointError, match=r'<\|"\|>'):
        Tokenizer(hf_wrap(made, names))
