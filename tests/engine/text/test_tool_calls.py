"""Calls in Gemma's form become JSON, whatever the cuts; what is malformed ends in a defined way."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.tool_calls import ArgumentsParser, ToolCallParser

QUOTE = "\0"  # the quote token, in these tests


def feed(
    reader: ArgumentsParser | ToolCallParser, written: str, cuts: list[int] | None = None
) -> str:
    """What the reader makes of it in pieces; QUOTE is the token."""
    edges = sorted({0, len(written), *(cut % (len(written) + 1) for cut in cuts or [])})
    got = ""
    for start, end in itertools.pairwise(edges):
        for i, text in enumerate(written[start:end].split(QUOTE)):
            got += (reader.push_quote() if i else "") + (reader.push_text(text) if text else "")
    return got


def gemma(value: Any) -> str:
    """Write a value in the form of the chat templates."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{gemma(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(gemma, value)) + "]"
    return json.dumps(value)


characters = st.characters(exclude_categories=["Cs"], exclude_characters=QUOTE)
keys = st.text("abc_XYZ09é-", min_size=1, max_size=6)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(characters, max_size=12),
    st.sampled_from(['"', "\\", '{"a":', "}<tool_call|>", "\n", "\u2028", "👍🏽", ",", "]"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)
objects = st.dictionaries(keys, values, max_size=4)


@settings(max_examples=300, deadline=None)
@given(value=objects, cuts=st.lists(st.integers(0, 500), max_size=12))
def test_arguments_in_any_cut_are_the_json(value: dict[str, Any], cuts: list[int]) -> None:
    arguments = ArgumentsParser()
    assert json.loads(feed(arguments, gemma(value), cuts)) == value
    assert arguments.is_complete


@settings(max_examples=300, deadline=None)
@given(written=st.text(st.sampled_from('{}[]:,"ab1 \n.-\0'), max_size=30), name=st.booleans())
def test_anything_gives_a_whole_object_or_is_not_whole(written: str, name: bool) -> None:
    reader: ArgumentsParser | ToolCallParser = ToolCallParser() if name else ArgumentsParser()
    got = feed(reader, f"call:f{written}" if name else written)
    if reader.is_complete:
        assert isinstance(json.loads(got), dict)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("{}", {}),
        (" { a : 1 , b : [ ] } ", {"a": 1, "b": []}),
        ("{a:1,}", {"a": 1}),
        ("{a:[1,2,]}", {"a": [1, 2]}),
        ("{\0a b\0:true}", {"a b": True}),
        ("{unit:celsius,t:10:30}", {"unit": "celsius", "t": "10:30"}),
        ("{a:None,b:null}", {"a": None, "b": None}),
        ("{a:01,b:1.,c:NaN,d:-0.5e3}", {"a": "01", "b": "1.", "c": "NaN", "d": -500.0}),
        ("{a:\0\0}} and more", {"a": ""}),
    ],
)
def test_what_models_write(written: str, value: Any) -> None:
    arguments = ArgumentsParser()
    assert json.loads(feed(arguments, written)) == value
    assert arguments.is_complete


@pytest.mark.parametrize(
    "written",
    ["", "[1]", "{a}", "{a:}", "{:1}", "{a:1]", "{a:[1}", "{a:1 \0x\0}", "{a:\0x", "a{", "{a:{}"],
)
def test_what_is_malformed_is_not_whole(written: str) -> None:
    arguments = ArgumentsParser()
    feed(arguments, written)
    assert not arguments.is_complete


def test_a_string_streams_as_it_comes() -> None:
    arguments = ArgumentsParser()
    assert feed(arguments, "{text:\0one") == '{"text":"one'
    assert arguments.push_text(' "two"') == ' \\"two\\"'
    assert arguments.push_text("\n") == "\\n"
    assert arguments.push_quote() + arguments.push_text("}") == '"}'


@pytest.mark.parametrize("head", ["", ":", "call:", "call:  ", "x call:f", "call:" + "f" * 1000])
def test_a_call_without_a_name_says_nothing(head: str) -> None:
    call = ToolCallParser()
    assert feed(call, head + "{a:1}") == ""
    assert not call.is_complete and not call.name


@pytest.mark.parametrize("head", ["call:f.g", "call: f.g ", ":f.g", "f.g", "\ncall:f.g"])
def test_a_name_may_be_spelled_less_well(head: str) -> None:
    call = ToolCallParser()
    assert feed(call, head + "{a:1}") == '{"a":1}'
    assert (call.name, call.is_complete) == ("f.g", True)


@pytest.mark.parametrize("cut", range(12))
def test_the_name_comes_in_any_cut(cut: int) -> None:
    call = ToolCallParser()
    assert feed(call, "call:get.it{a:1}", [cut]) == '{"a":1}'
    assert (call.name, call.is_complete) == ("get.it", True)
