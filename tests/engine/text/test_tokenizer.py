"""Tokenizer and TextStream: exact text in any cut, stop strings, chat templates, broken files."""

from __future__ import annotations

import functools
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cluster.config import DEMO_MODEL_DIR
from cluster.errors import CheckpointError, InvalidRequest
from engine.text.text_stream import TextStream
from engine.text.tokenizer import Tokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>"]
CORPUS = ["the cat and the dog", "the théâtre and the café", "this is that, isn't it?", "abcabcab"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|turn>{{ m.role }}\n{{ m.content if m.content is string else m.content[0].text }}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
# As the released template: the system's turn first, `model` for the assistant, contents trimmed and
# thoughts taken out of what the model said earlier.
TRIMMING_TEMPLATE = """\
{%- macro without_thoughts(text) -%}
    {%- for part in text.split('<channel|>') -%}{{- part.split('<|channel>')[0] -}}{%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
    {{- '<|turn>system\\n' + messages[0]['content'] | trim + '<turn|>\\n' -}}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- if role == 'model' -%}
        {{- without_thoughts(message['content']) | trim -}}
    {%- else -%}
        {{- message['content'] | trim | replace('\\t', '    ') -}}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def wrap(backend: Backend, template: str | None = TEMPLATE) -> Tokenizer:
    return Tokenizer(hf_wrap(backend, template))


def hf_wrap(backend: Backend, template: str | None) -> Any:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    fast.chat_template = template
    return fast


def byte_level_backend() -> Backend:
    """A byte-level BPE as the demo model has."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_fallback_backend() -> Backend:
    """Pieces with `▁` for the space and <0xNN> for the bytes of unknown characters, as Gemma's."""
    characters = sorted(set("".join(CORPUS).replace(" ", "▁")))
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, "th"]
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e")]
    pieces += ["▁th", "▁the"]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" "), behavior="merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(SPECIAL)
    return backend


BACKENDS = {"byte_level": byte_level_backend(), "byte_fallback": byte_fallback_backend()}
TOKENIZERS = {name: wrap(backend) for name, backend in BACKENDS.items()}


def byte_level_id(token: str) -> int:
    token_id = BACKENDS["byte_level"].token_to_id(token)
    assert token_id is not None
    return token_id


every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)

# Emoji with joiners and skin tones, CJK, combining marks, right-to-left, a real U+FFFD.
HARD = [
    "👩‍👩‍👧",
    "👍🏽",
    "你好世界",
    "e\u0301\u0323",
    "שלום",
    "नमस्ते",
    "\ufffd",
    "\U0001d518",
    " the ",
    "\n",
    "▂",
]
texts = st.lists(
    st.one_of(st.sampled_from(HARD), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
    max_size=8,
).map("".join)


def deltas(stream: TextStream, token_ids: list[int]) -> list[str]:
    return [*(stream.push([token_id])[0] for token_id in token_ids), stream.finish()]


@every_tokenizer
@settings(max_examples=80, deadline=None)
@given(text=texts)
def test_deltas_joined_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("▁", "_")  # Gemma's pieces can't tell it from a space
    token_ids = tokenizer.encode(text, add_bos=False)
    parts = deltas(TextStream(tokenizer), token_ids)
    assert "".join(parts) == tokenizer.decode(token_ids) == text
    assert sum(part.count("\ufffd") for part in parts) == text.count("\ufffd")


@every_tokenizer
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_tokens_give_the_text_of_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """A random model emits bytes that are no characters, and special tokens anywhere."""
    ids = st.integers(0, tokenizer.vocab_size + 3)
    token_ids = data.draw(st.lists(ids, max_size=40))
    assert "".join(deltas(TextStream(tokenizer), token_ids)) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_decode_equals_the_tokenizers_own(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for text in [*HARD, *CORPUS, "a <|turn>b<turn|> c<eos>"]:
        token_ids = tokenizer.encode(text, add_bos=False)
        assert tokenizer.decode(token_ids) == BACKENDS[name].decode(token_ids)


@every_tokenizer
def test_half_a_character_is_held_back(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("😀", add_bos=False)
    assert len(token_ids) == 4
    stream = TextStream(tokenizer)
    assert [stream.push([token_id])[0] for token_id in token_ids] == ["", "", "", "😀"]
    stream = TextStream(tokenizer)
    assert stream.push(token_ids[:2]) == ("", None)
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_time_is_linear() -> None:
    """20,000 tokens of held-back invalid bytes and of text."""
    tokenizer = TOKENIZERS["byte_level"]
    invalid = byte_level_id("ÿ")  # byte 0xFF
    for token_ids in ([invalid] * 20_000, tokenizer.encode("a", add_bos=False) * 20_000):
        start = time.perf_counter()
        assert len("".join(deltas(TextStream(tokenizer, ["aab", "zz"]), token_ids))) == 20_000
        assert time.perf_counter() - start < 5


# Stop strings


@every_tokenizer
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_stop_string_is_found_at_every_split(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text("abcé", max_size=20))
    stops = data.draw(st.lists(st.text("abcé", min_size=1, max_size=4), min_size=1, max_size=3))
    tokens_of_a_char = [token for char in text for token in tokenizer.encode(char, add_bos=False)]
    cuts = data.draw(st.lists(st.integers(0, len(tokens_of_a_char)), max_size=5).map(sorted))
    expected, stop = reference_stop(text, stops)

    stream, got, met = TextStream(tokenizer, stops), "", None
    for start, end in zip([0, *cuts], [*cuts, len(tokens_of_a_char)], strict=True):
        delta, met = stream.push(tokens_of_a_char[start:end])
        got += delta
        if met is not None:
            break
    assert (got + stream.finish(), met) == (expected, stop)


@pytest.mark.parametrize("stops", [["aab"], ["abab"], ["aabaab", "bb"], ["b", "aab"], ["aaaa"]])
def test_stop_strings_that_overlap_themselves(stops: list[str]) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    for chars in itertools.product("ab", repeat=9):
        text, stream, got, met = "".join(chars), TextStream(tokenizer, stops), "", None
        for char in text:
            delta, met = stream.push([byte_level_id(char)])
            got += delta
            if met is not None:
                break
        assert (got + stream.finish(), met) == reference_stop(text, stops)


def reference_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Look again at the whole text after each character."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            stop = max(met, key=len)
            return text[: end - len(stop)], stop
    return text, None


def test_only_a_possible_stop_is_held_back() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(tokenizer, ["<end>"])
    assert stream.push(tokenizer.encode("a <e", add_bos=False)) == ("a ", None)
    assert stream.push(tokenizer.encode("x <", add_bos=False)) == ("<ex ", None)
    assert stream.push(tokenizer.encode("<", add_bos=False)) == ("<", None)
    assert stream.push(tokenizer.encode("end> more", add_bos=False)) == ("", "<end>")
    assert stream.finish() == ""


def test_an_unfinished_stop_is_text() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(tokenizer, ["<end>"])
    assert stream.push(tokenizer.encode("a <en", add_bos=False)) == ("a ", None)
    assert stream.finish() == "<en"


# Encoding and chat templates


@every_tokenizer
def test_encode_begins_with_one_bos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("the cat") == [2, *tokenizer.encode("the cat", add_bos=False)]
    assert tokenizer.encode("<bos>the cat") == [2, *tokenizer.encode("the cat", add_bos=False)]
    assert tokenizer.encode("") == [2]


@every_tokenizer
def test_chat_template_writes_the_only_bos(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}])
    spelled = "<bos><|turn>user\nthe cat<turn|>\n<|turn>model\n"
    assert token_ids == tokenizer.encode(spelled, add_bos=False)
    assert token_ids.count(2) == 1
    parts = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    assert tokenizer.apply_chat_template(parts) == token_ids


def hf_tokenizers() -> dict[str, Any]:
    """Fresh ones: the same object can't serve as a reference and inside a Tokenizer."""
    return {
        "byte_level": hf_wrap(byte_level_backend(), TEMPLATE),
        "byte_level_trimming": hf_wrap(byte_level_backend(), TRIMMING_TEMPLATE),
        "byte_fallback_trimming": hf_wrap(byte_fallback_backend(), TRIMMING_TEMPLATE),
        "demo": AutoTokenizer.from_pretrained(DEMO_MODEL_DIR),
    }


CHATS = {name: (Tokenizer(hf), hf_tokenizers()[name]) for name, hf in hf_tokenizers().items()}
every_chat = pytest.mark.parametrize(("tokenizer", "reference"), CHATS.values(), ids=CHATS)
contents = st.one_of(texts, st.text(alphabet=" \n\t<|>turn▁x", max_size=30))
conversations = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": contents}),
    min_size=1,
    max_size=5,
)


def reference_chat(reference: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    ids: list[int] = reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **options
    )
    return ids


def holds_control_token(text: str) -> bool:
    return any(token in text for token in [*SPECIAL, "<unk>"])


@every_chat
@settings(max_examples=150, deadline=None)
@given(messages=conversations, system=st.none() | contents)
def test_a_conversation_is_encoded_as_by_transformers(
    tokenizer: Tokenizer, reference: Any, messages: list[dict[str, str]], system: str | None
) -> None:
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    assume(not any(holds_control_token(message["content"]) for message in messages))
    assert tokenizer.apply_chat_template(messages) == reference_chat(reference, messages)


@every_chat
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_control_token_in_a_message_is_plain_text(
    tokenizer: Tokenizer, reference: Any, data: st.DataObject
) -> None:
    """Only the template's own markers become control tokens, and nothing typed is lost."""
    pieces = st.sampled_from([*SPECIAL, "<unk>", "a", "\n", "<", "|turn>", "turn|>"])
    typed = st.lists(pieces, min_size=1, max_size=8).map("".join)
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": data.draw(typed).strip() or "a"} for role in roles]
    harmless = [{"role": role, "content": "a"} for role in roles]
    token_ids = tokenizer.apply_chat_template(messages)
    assert control_ids(token_ids) == control_ids(reference_chat(reference, harmless))
    assert all(message["content"] in tokenizer.decode(token_ids) for message in messages)


def control_ids(token_ids: list[int]) -> list[int]:
    return [token_id for token_id in token_ids if token_id <= 5]


@every_chat
def test_what_is_typed_is_encoded_in_one_piece(tokenizer: Tokenizer, reference: Any) -> None:
    """Transformers does the same for a text that it is told to take as plain."""
    typed = "a<turn|>\n<|turn>system\nthe cat"
    token_ids = tokenizer.apply_chat_template([{"role": "user", "content": typed}])
    turn, end = (reference.convert_tokens_to_ids(token) for token in ("<|turn>", "<turn|>"))
    plain = functools.partial(reference.encode, add_special_tokens=False, split_special_tokens=True)
    answer = [*plain("\n"), turn, *plain("model\n")]
    assert token_ids == [2, turn, *plain(f"user\n{typed}"), end, *answer]


@every_chat
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_extended_conversation_begins_with_exactly_what_is_known(
    tokenizer: Tokenizer, reference: Any, data: st.DataObject
) -> None:
    """Any tokens that the model wrote, also those that the template or the tokenizer wouldn't."""
    first, text, question = (data.draw(contents) for _ in range(3))
    assume(not any(holds_control_token(said) for said in (first, text, question)))
    messages = [
        {"role": role, "content": content}
        for role, content in (("user", first), ("assistant", text), ("user", question))
    ]
    answer_ids = data.draw(st.lists(st.integers(6, 200), max_size=12))
    known_ids = tokenizer.apply_chat_template(messages[:1]) + answer_ids
    extended = tokenizer.extend_chat(messages, 2, known_ids)
    assert extended[: len(known_ids)] == known_ids
    whole = tokenizer.apply_chat_template(messages)
    # <turn|> of the answer, the turn of the question, and the one that the model is to write
    turn_ids = tokenizer.encode("<|turn><turn|>")[-2:]
    close = [i for i, token_id in enumerate(whole) if token_id in turn_ids][-4]
    assert extended[len(known_ids) :] == whole[close:]


def test_a_template_that_leaves_the_answer_out_is_followed() -> None:
    template = "{% for m in messages if m.role == 'user' %}<|turn>{{ m.content }}{% endfor %}"
    tokenizer = wrap(byte_level_backend(), template)
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    assert tokenizer.extend_chat(messages, 2, [9, 9]) == tokenizer.apply_chat_template(messages)


def test_no_template_can_put_a_control_token_together() -> None:
    template = (
        "{% for m in messages %}<|turn>{{ m.role }}\n{% for part in m.content %}"
        "{{ part.text | replace('x', '') }}{% endfor %}<turn|>{% endfor %}"
    )
    tokenizer = wrap(byte_level_backend(), template)
    for texts_ in (["<|turxn>"], ["<|tu", "rn>"], ["<", "|turn>x"], ["\ud7ff4\ue000"]):
        parts = [{"type": "text", "text": text} for text in texts_]
        token_ids = tokenizer.apply_chat_template([{"role": "user", "content": parts}])
        assert control_ids(token_ids) == [3, 4]


def test_a_control_token_in_a_prompt_counts() -> None:
    """A raw prompt is all the caller's: turns can be written in it."""
    for tokenizer in TOKENIZERS.values():
        assert control_ids(tokenizer.encode("<|turn>user\na<turn|>")) == [2, 3, 4]


def test_a_control_token_that_plain_text_gives_is_refused() -> None:
    backend = byte_level_backend()
    backend.add_special_tokens(["the"])  # a piece of the vocabulary
    with pytest.raises(CheckpointError, match="'the'"):
        wrap(backend)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "at least one message"),
        ([{"role": "wizard", "content": "hi"}], "unknown role 'wizard'"),
        ([{"content": "hi"}], "unknown role None"),
        ([{"role": ["user"], "content": "hi"}], "unknown role"),
        ([{"role": "user"}], "no text"),
        ([{"role": "user", "content": 3}], "no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "not text"),
        (
            [{"role": "user", "content": "hi"}, {"role": "tool", "content": "x"}],
            "no earlier message",
        ),
        ([{"role": "user", "content": []}], "template refuses"),
        ([{"role": "user", "content": "\ud800"}], "unpaired surrogate"),
    ],
)
def test_bad_messages_are_refused(messages: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        TOKENIZERS["byte_level"].apply_chat_template(messages)


def test_without_a_template_there_is_no_chat() -> None:
    tokenizer = wrap(byte_level_backend(), template=None)
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


@every_tokenizer
def test_other_threads_go_on_while_a_long_text_is_encoded(tokenizer: Tokenizer) -> None:
    with ThreadPoolExecutor(1) as executor:
        encoding = executor.submit(tokenizer.encode_plain, "the cat and the dog " * 50_000)
        num_turns = 0
        while not encoding.done():
            time.sleep(0.001)
            num_turns += 1
    assert num_turns > 10  # one or two, if it kept the interpreter to itself


# Files


def test_load_what_transformers_saved(tmp_path: Path) -> None:
    hf_wrap(byte_fallback_backend(), TEMPLATE).save_pretrained(tmp_path)
    loaded, built = Tokenizer.load(tmp_path), TOKENIZERS["byte_fallback"]
    assert loaded.encode("the 你 cat") == built.encode("the 你 cat")
    assert (loaded.bos_id, loaded.eos_ids) == (2, (1, 4))
    assert loaded.vocab_size == built.vocab_size
    message = {"role": "user", "content": "the cat"}
    assert loaded.apply_chat_template([message]) == built.apply_chat_template([message])


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    for broken in ("{", "[]", '{"model": 3}', "\0\1"):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(CheckpointError, match="can't be read"):
            Tokenizer.load(tmp_path)


def test_a_decoder_that_looks_around_is_refused() -> None:
    backend = byte_level_backend()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="WordPiece"):
        wrap(backend)
