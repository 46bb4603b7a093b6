"""Structured output: what the grammar forbids never comes, and whoever has none pays nothing."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import engine.text.grammar_compiler as grammar_compiler
import engine.text.grammars as grammars_module
from cluster.config import DEMO_MODEL_DIR
from cluster.errors import InvalidRequest
from cluster.spec import AttentionKind
from engine.batch import Batch
from engine.cache.kv_cache import KVCacheConfig
from engine.core import EngineCore
from engine.limits import SpecLimits
from engine.outputs import RequestOutput
from engine.request import FinishReason, SamplingParams
from engine.text.grammar import MAX_CHARS, Grammar
from engine.text.grammars import Grammars
from engine.text.guide import Guide
from engine.text.tokenizer import Tokenizer
from engine.text.tool_grammar import calls_grammar
from tests.support.engine.gemma_chat import make_tokenizer, spelled

TOKENIZER = make_tokenizer()
GRAMMARS = Grammars(TOKENIZER)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


class NoisyRunner:
    """Logits of a model that has learned nothing: a function of the tokens at the last position."""

    def __init__(self, vocab_size: int, width: int | None = None) -> None:
        self.shape = vocab_size, width or vocab_size

    def execute(self, batch: Batch) -> Tensor:
        positions = batch.positions[batch.logits_indices].tolist()
        token_ids = batch.input_ids[batch.logits_indices].tolist()
        rows = [torch.zeros(0, self.shape[1])]
        for position, token_id in zip(positions, token_ids, strict=True):
            generator = torch.Generator().manual_seed(1000 * position + token_id)
            rows.append(torch.randn(1, self.shape[1], generator=generator))
        return torch.cat(rows)


def make_core(
    tokenizer: Tokenizer = TOKENIZER, num_blocks: int = 200, **options: Any
) -> EngineCore:
    vocab_size = options.pop("vocab_size", tokenizer.vocab_size)
    return EngineCore(
        options.pop("runner", None) or NoisyRunner(vocab_size),
        KVCacheConfig(16, dict.fromkeys(AttentionKind, num_blocks)),
        spec_limits=SpecLimits(600, 64, vocab_size, eos_token_ids=tokenizer.eos_ids),
        tokenizer=tokenizer,
        **options,
    )


def run(core: EngineCore) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(3000):
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        if not core.has_work:
            break
    core.check_integrity()
    return outputs


def add(core: EngineCore, name: str = "x", **options: Any) -> None:
    core.add(
        request_id=name,
        prompt_ids=options.pop("prompt_ids", [40, 41]),
        output_ids=options.pop("output_ids", ()),
        seed=options.pop("seed", 7),
        chat=True,
        sampling=SamplingParams(**{"max_tokens": 400, **options}),
    )


def text_of(outputs: Sequence[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


def ids_of(outputs: Sequence[RequestOutput]) -> list[int]:
    return [i for output in outputs for i in output.new_token_ids]


FORMATS: list[dict[str, Any]] = [
    {"json_schema": json.dumps(SCHEMA)},
    {"regex": r"[0-9]{3}-[a-z]{2,4}"},
    {"lark": 'start: "yes" | "no" " " /[a-z]{3}/'},
]
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 2.0, "top_p": 0.9, "min_p": 0.01, "logprobs": 2},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
]


def is_right(text: str, wanted: dict[str, Any]) -> bool:
    if "regex" in wanted:
        return re.fullmatch(wanted["regex"], text) is not None
    if "lark" in wanted:
        return re.fullmatch("yes|no [a-z]{3}", text) is not None
    value = json.loads(text)
    return (
        set(value) == set(SCHEMA["properties"])
        and len(value["name"]) <= 5
        and 0 <= value["age"] <= 150
        and value["kind"] in ("cat", "dog")
    )


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"t{s['temperature']}-{len(s)}")
@pytest.mark.parametrize("wanted", FORMATS, ids=lambda wanted: next(iter(wanted)))
def test_a_model_that_knows_nothing_keeps_to_the_format(
    wanted: dict[str, Any], sampling: dict[str, Any]
) -> None:
    core = make_core()
    for seed in range(5):
        add(core, str(seed), seed=seed, prompt_ids=[40 + seed], **wanted, **sampling)
    for outputs in run(core).values():
        assert outputs[-1].finish_reason is FinishReason.STOP, outputs[-1].error
        assert is_right(text_of(outputs), wanted)
        assert ids_of(outputs)[-1] in TOKENIZER.eos_ids


def test_properties_come_in_the_order_of_the_schema() -> None:
    properties = {name: {"type": "null"} for name in "cab"}
    schema = {"type": "object", "properties": properties, "required": ["a", "b", "c"]}
    core = make_core()
    add(core, temperature=1.0, json_schema=json.dumps({**schema, "additionalProperties": False}))
    (outputs,) = run(core).values()
    assert list(json.loads(text_of(outputs))) == ["c", "a", "b"]


def test_any_json_object() -> None:
    core = make_core()
    add(core, json_object=True, temperature=1.0, max_tokens=500)
    (outputs,) = run(core).values()
    assert text_of(outputs).startswith("{")
    if outputs[-1].finish_reason is FinishReason.STOP:
        assert isinstance(json.loads(text_of(outputs)), dict)


@pytest.mark.parametrize("options", [{}, {"num_blocks": 8}, {"max_num_batched_tokens": 16}])
def test_others_do_not_change_a_token(options: dict[str, Any]) -> None:
    """Neither those with a format nor those without, in any batch, also when one gives way."""
    wanted = [*FORMATS, {}]
    alone = {}
    for index, wants in enumerate(wanted):
        core = make_core()
        add(core, str(index), temperature=1.0, max_tokens=60, prompt_ids=[50 + index] * 20, **wants)
        alone.update(run(core))
    core = make_core(**options)
    for index, wants in enumerate(wanted):
        add(core, str(index), temperature=1.0, max_tokens=60, prompt_ids=[50 + index] * 20, **wants)
    together = run(core)
    assert {name: ids_of(outputs) for name, outputs in together.items()} == {
        name: ids_of(outputs) for name, outputs in alone.items()
    }
    assert core.stats().num_preemptions > 0 or "num_blocks" not in options


@pytest.mark.parametrize("wanted", FORMATS, ids=lambda wanted: next(iter(wanted)))
def test_a_resumed_answer_goes_on_in_its_grammar(wanted: dict[str, Any]) -> None:
    core = make_core()
    add(core, temperature=1.0, **wanted)
    (whole,) = run(core).values()
    said = ids_of(whole)
    for num_before in range(len(said)):
        core = make_core()
        add(core, temperature=1.0, output_ids=said[:num_before], **wanted)
        (rest,) = run(core).values()
        assert ids_of(rest) == said[num_before:]


def test_logprobs_are_those_of_the_model() -> None:
    core = make_core()
    add(core, temperature=0.0, regex="z", logprobs=3)
    (outputs,) = run(core).values()
    logits = NoisyRunner(TOKENIZER.vocab_size).execute(_one(position=1, token_id=41))[0]
    assert outputs[0].logprobs is not None
    expected = float(logits.log_softmax(-1)[ids_of(outputs)[0]])
    assert outputs[0].logprobs[0].logprob == pytest.approx(expected, abs=1e-5)


def _one(position: int, token_id: int) -> Any:
    class One:
        positions, input_ids = torch.tensor([position]), torch.tensor([token_id])
        logits_indices = torch.tensor([0])

    return One()


def test_a_head_wider_than_the_vocabulary() -> None:
    wide = NoisyRunner(TOKENIZER.vocab_size, TOKENIZER.vocab_size + 100)
    core = make_core(runner=wide, vocab_size=TOKENIZER.vocab_size + 100)
    add(core, temperature=1.0, **FORMATS[0])
    (outputs,) = run(core).values()
    assert is_right(text_of(outputs), FORMATS[0])


# What can't be done


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"json_schema": "{"}, "json_schema is invalid"),
        ({"json_schema": "[]"}, "a JSON schema is an object"),
        ({"json_schema": '{"a":' * 20000 + "1" + "}" * 20000}, "nested too deeply"),
        ({"json_schema": '{"type": "foo"}'}, "Invalid type: foo"),
        ({"json_schema": '{"not": {}}'}, "json_schema can't be used"),
        ({"regex": "("}, "regex can't be used"),
        ({"lark": "start: other"}, "lark grammar can't be used"),
        ({"lark": "start: <|nothing|>"}, "lark grammar can't be used"),
        ({"regex": "a" * (MAX_CHARS + 1)}, "more than 131,072 characters"),
        ({"regex": "a", "lark": "b"}, "Give one of"),
        ({"regex": "a", "json_object": True}, "Give one of"),
    ],
)
def test_a_wrong_format_is_refused(wanted: dict[str, Any], sentence: str) -> None:
    core = make_core()
    with pytest.raises(InvalidRequest, match=sentence):
        add(core, **wanted)
    core.check_integrity()


STRING, COSTLY = {"type": "string"}, {"type": "string", "pattern": ".*7.*a{9}.*"}
CHOICES: list[dict[str, Any]] = [
    {"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(4)]} for i in range(9)
]
HUGE: dict[str, dict[str, Any]] = {
    "enum": {"enum": [f"value {i}" for i in range(8000)]},
    "properties": {"type": "object", "properties": {f"p{i}": STRING for i in range(3500)}},
    "patterns": {"type": "object", "properties": {f"p{i}": COSTLY for i in range(1800)}},
    "all of": {"allOf": CHOICES},
}


@pytest.mark.parametrize("schema", HUGE.values(), ids=HUGE)
def test_no_schema_takes_long(schema: dict[str, Any]) -> None:
    """It compiles within bounds or is refused, and so is each of its steps."""
    started = time.monotonic()
    try:
        guide = Grammars(TOKENIZER).guide(Grammar("json_schema", json.dumps(schema)))
    except InvalidRequest:
        pass
    else:
        guide.allowed()
    assert time.monotonic() - started < 10


HUNGRY = Grammar("regex", ".*a.{18}")  # takes about 1,600 of 25,000 states for each answer


def write(guide: Guide, seed: int, num_tokens: int = 200) -> None:
    letters = random.Random(seed)
    for _ in range(num_tokens):
        assert guide.allowed() is not None
        guide.advance(TOKENIZER.encode_plain(letters.choice("ab"))[0])


def test_answers_do_not_use_up_a_grammar_for_others() -> None:
    grammars = Grammars(TOKENIZER)
    for seed in range(40):
        write(grammars.guide(HUNGRY), seed)


def test_answers_at_a_time_do_not_use_up_a_grammar() -> None:
    grammars = Grammars(TOKENIZER)
    guides = [grammars.guide(HUNGRY) for _ in range(24)]
    for step in range(200):
        for seed, guide in enumerate(guides):
            write(guide, 1000 * step + seed, num_tokens=1)


def test_a_grammar_that_takes_long_to_compile_is_not_compiled_in_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its answer ends when the grammar is used up, and the next answer has a new one."""
    monkeypatch.setattr(grammars_module, "MAX_RENEW_S", 0.0)
    grammars = Grammars(TOKENIZER)
    with pytest.raises(InvalidRequest, match="got too complex"):
        for seed in range(40):
            write(grammars.guide(HUNGRY), seed)
    write(grammars.guide(HUNGRY), 0)


def test_an_answer_that_uses_up_its_grammar_alone_ends() -> None:
    with pytest.raises(InvalidRequest, match="got too complex"):
        write(Grammars(TOKENIZER).guide(HUNGRY), 0, num_tokens=20_000)


def test_looking_for_grammars_drives_none_out() -> None:
    grammars, kept = Grammars(TOKENIZER), Grammar("regex", "yes")
    grammars.compile(kept)
    for i in range(100):
        assert not grammars.is_compiled(Grammar("regex", f"no{i}"))
    assert grammars.is_compiled(kept)
    for i in range(100):
        grammars.compile(Grammar("regex", f"no{i}"))
    assert not grammars.is_compiled(kept)


def test_the_vocabulary_is_taken_in_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other thread runs meanwhile, for as long as a second."""
    grammars = Grammars(TOKENIZER)
    monkeypatch.setattr(grammar_compiler, "LLTokenizer", None)
    grammars.compile(Grammar("regex", "yes"))


def test_a_wrong_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(TOKENIZER)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="regex can't be used"):
            grammars.compile(Grammar("regex", "("))
        monkeypatch.setattr(grammar_compiler, "LLMatcher", None)


def test_a_model_without_an_end_has_no_formats() -> None:
    backend = Backend(models.BPE(vocab={"a": 0}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    endless = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(InvalidRequest, match="end-of-sequence token"):
        Grammars(endless).guide(Grammar("regex", "a"))


def few_characters() -> Tokenizer:
    """A vocabulary that can write {, } and the letter a."""
    backend = Backend(models.BPE(vocab={"<eos>": 0, "{": 1, "}": 2, "a": 3, "<unk>": 4}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<unk>"])
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    )


def test_what_the_vocabulary_cannot_write_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="vocabulary can't write"):
        Grammars(few_characters()).compile(Grammar("regex", "[0-9]+"))


def test_a_dead_end_ends_its_own_request_with_a_sentence() -> None:
    core = make_core(few_characters())
    add(core, "dead", prompt_ids=[3], json_schema='{"required": ["a"], "type": "object"}')
    add(core, "alive", prompt_ids=[3], regex="a{4}")
    outputs = run(core)
    assert outputs["dead"][-1].finish_reason is FinishReason.ERROR
    assert "vocabulary can't write" in (outputs["dead"][-1].error or "")
    assert outputs["dead"][-1].error_status == "INVALID_ARGUMENT"
    assert text_of(outputs["alive"]) == "aaaa"


def test_the_demo_model_can_write_json() -> None:
    tokenizer = Tokenizer.load(DEMO_MODEL_DIR)
    core = make_core(tokenizer)
    add(core, temperature=1.0, **FORMATS[0])
    (outputs,) = run(core).values()
    assert is_right(text_of(outputs), FORMATS[0])


# Thoughts


def thinking_guide(*more: str) -> Guide:
    """A guide whose answer is within its thought."""
    prompt_ids = spelled(TOKENIZER, "".join(["<|think|>", *more]))
    guide = GRAMMARS.guide(Grammar("regex", "yes"), prompt_ids)
    for token_id in spelled(TOKENIZER, "<|channel>thought\nhm"):
        guide.advance(token_id)
    return guide


def test_a_thought_has_no_control_token_but_the_one_that_closes_it() -> None:
    guide = thinking_guide("<|tool>")
    allowed = guide.allowed()
    assert allowed is not None
    is_text = [TOKENIZER.token_bytes(i) != b"" for i in range(TOKENIZER.vocab_size)]
    thought_close = TOKENIZER.dialect.thought_close
    assert [i for i in range(len(allowed)) if allowed[i] and not is_text[i]] == [thought_close]
    assert all(allowed[i] for i in range(len(allowed)) if is_text[i])


def test_a_call_after_a_thought_is_free_to_the_end() -> None:
    guide = thinking_guide("<|tool>")
    for token_id in spelled(TOKENIZER, "<channel|><|tool_call>call:f{}<tool_call|><channel|>"):
        guide.advance(token_id)
        is_called = token_id == TOKENIZER.dialect.call_open or guide.allowed() is None
    assert is_called and guide.allowed() is None


def test_an_answer_that_thinks_keeps_to_its_format() -> None:
    """A model that has learned nothing would soon end in its thought, or call."""
    core = make_core()
    for seed in range(5):
        prompt_ids = spelled(TOKENIZER, "<|think|><|channel>thought\n")
        add(core, str(seed), seed=seed, prompt_ids=prompt_ids, regex="yes", temperature=1.0)
    for outputs in run(core).values():
        assert not any(output.tool_calls for output in outputs)
        is_cut = outputs[-1].finish_reason is FinishReason.LENGTH
        assert text_of(outputs) == "yes" or (is_cut and "yes".startswith(text_of(outputs)))


# Required calls


TOOLS: list[dict[str, Any]] = [
    {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"enum": ["c", "f", "", 3, None]},
                "place": {
                    "properties": {"x": {"type": ["number", "null"]}, "in": {"$ref": "#/$defs/p"}},
                    "required": ["x"],
                },
                "flags": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"const": 1}]}},
                "odd key:": {"type": "string", "nullable": True},
            },
            "required": ["city", "days"],
            "$defs": {
                "p": {
                    "type": "object",
                    "properties": {"p": {"type": "array", "items": {"$ref": "#/$defs/p"}}},
                }
            },
        },
    },
    {"name": "free", "parameters": ""},
    {"name": "none", "parameters": '{"type": "object", "additionalProperties": false}'},
]
CALLS = Grammars(TOKENIZER), calls_grammar(TOOLS, TOKENIZER.dialect)


def accepts(call: str, grammar: Grammar = CALLS[1]) -> bool:
    """Whether the grammar lets a model write this, and end there."""
    grammars, _ = CALLS
    guide = grammars.guide(grammar)
    for token_id in spelled(TOKENIZER, f"<|tool_call>call:{call}<tool_call|><turn|>"):
        allowed = guide.allowed()
        if allowed is None or not allowed[token_id]:
            return False
        guide.advance(token_id)
    return True


@pytest.mark.parametrize(
    ("call", "is_allowed"),
    [
        ('weather{city:<|"|>"Paris", {x}\n<|"|>,days:4}', True),
        ('weather{city:<|"|><|"|>,days:-4,unit:<|"|>c<|"|>}', True),
        ('weather{city:<|"|>a<|"|>,days:4,unit:<|"|><|"|>}', True),
        ('weather{city:<|"|>a<|"|>,days:4,unit:3}', True),
        ('weather{city:<|"|>a<|"|>,days:4,unit:null}', True),
        ('weather{city:<|"|>a<|"|>,days:4,place:{in:{p:[{},{p:[]}]},x:null}}', True),
        ('weather{city:<|"|>a<|"|>,days:4,flags:[true,1]}'.replace(",flags:[true,1]", ""), True),
        ('weather{city:<|"|>a<|"|>,days:4,<|"|>odd key:<|"|>:null}', True),
        ('free{a:[1.5e3,<|"|>x<|"|>,{b:true}],c:null}', True),
        ("free{}", True),
        ("none{}", True),
        ("none{a:1}", False),
        ("weather{}", False),
        ('weather{city:<|"|>a<|"|>}', False),
        ("weather{city:Paris,days:4}", False),
        ('weather{city:<|"|>a<|"|>,days:4.5}', False),
        ('weather{city:<|"|>a<|"|>,days:4,unit:<|"|>k<|"|>}', False),
        ('weather{city:<|"|>a<|"|>,days:4,more:1}', False),
        ("other{}", False),
    ],
)
def test_required_calls_fit_their_schema(call: str, is_allowed: bool) -> None:
    assert accepts(call) == is_allowed


@pytest.mark.parametrize("pointer", ["#/$defs/a~1b/anyOf/1", "#/%24defs/a%7E1b/anyOf/1"])
def test_a_reference_is_a_json_pointer(pointer: str) -> None:
    schema = {
        "properties": {"x": {"$ref": pointer}},
        "$defs": {"a/b": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}},
    }
    grammar = calls_grammar([{"name": "t", "parameters": schema}], TOKENIZER.dialect)
    assert accepts("t{x:true}", grammar) and not accepts("t{x:null}", grammar)


def test_the_grammar_of_nested_lists_of_types_stays_small() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        schema = {"type": ["array", "array"], "items": schema}
    tool = {"name": "t", "parameters": {"properties": {"a": schema}}}
    assert len(calls_grammar([tool], TOKENIZER.dialect).text) < 5000


@pytest.mark.parametrize("properties", [{}, {"b": {"type": "boolean"}}])
def test_what_is_required_must_come_though_nothing_describes_it(properties: Any) -> None:
    schema = {"properties": properties, "required": ["a"]}
    grammar = calls_grammar([{"name": "t", "parameters": schema}], TOKENIZER.dialect)
    assert accepts("t{a:[1]}", grammar) and not accepts("t{}", grammar)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_what_a_required_call_may_be_is_read_as_a_call(seed: int) -> None:
    core = make_core()
    add(core, seed=seed, temperature=1.0, lark=CALLS[1].text, max_tokens=300)
    (outputs,) = run(core).values()
    assert text_of(outputs) == ""
    pieces = [piece for output in outputs for piece in output.tool_calls]
    assert pieces and pieces[0].name in ("weather", "free", "none")
    if outputs[-1].finish_reason is not FinishReason.LENGTH:
        assert outputs[-1].finish_reason is FinishReason.TOOL_CALLS
        last = max(piece.index for piece in pieces)
        for index in range(last + 1):
            json.loads("".join(piece.arguments for piece in pieces if piece.index == index))


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ('{"properties": [1]}', "are not a JSON schema"),
        ('{"required": "a"}', "are not a JSON schema"),
        ('{"required": [{}]}', "are not a JSON schema"),
        ('{"anyOf": [{}], "properties": {"a": {"$ref": "#/anyOf/1"}}}', "which does not exist"),
        ('{"properties": {"a": {"$ref": "#/$defs/b"}}}', "'#/\\$defs/b', which does not exist"),
        ('{"properties": {"a": {"$ref": "http://x"}}}', "'http://x', which does not exist"),
        ('{"properties": {"a": ' * 400 + "{}" + "}}" * 400, "nested too deeply"),
    ],
)
def test_a_schema_that_no_call_can_follow_is_refused(parameters: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        calls_grammar([{"name": "t", "parameters": parameters}], TOKENIZER.dialect)


def test_calls_need_a_model_that_has_them() -> None:
    with pytest.raises(InvalidRequest, match="no tokens for tool calls"):
        calls_grammar(TOOLS, few_characters().dialect)
