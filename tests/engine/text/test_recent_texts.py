"""Long texts are encoded once for a tenant, with the same ids, in bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster.config import DEMO_MODEL_DIR
from engine.text.recent_texts import MIN_CHARS, RecentTexts
from engine.text.tokenizer import Tokenizer

LONG = "One long text, <|turn> and all. é 😀 " * 40


class Recording(Tokenizer):
    """Notes the long texts that are really encoded."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self.encoded: list[str] = []
        super().__init__(hf_tokenizer)

    def encode_plain(self, text: str) -> list[int]:
        if len(text) >= MIN_CHARS:
            self.encoded.append(text)
        return super().encode_plain(text)


@pytest.fixture
def tokenizer() -> Recording:
    return Recording(AutoTokenizer.from_pretrained(DEMO_MODEL_DIR))


def test_a_chat_that_goes_on_has_the_same_ids_and_only_what_is_new_is_encoded(
    tokenizer: Recording,
) -> None:
    turns = [
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": LONG + "!"},
        {"role": "user", "content": LONG + "?"},
    ]
    expected = [tokenizer.apply_chat_template(turns[:num]) for num in (1, 3)]
    tokenizer.encoded.clear()
    for _ in range(2):
        assert tokenizer.apply_chat_template(turns[:1], tenant="anna") == expected[0]
    assert len(tokenizer.encoded) == 1
    for _ in range(2):
        assert tokenizer.apply_chat_template(turns, tenant="anna") == expected[1]
    assert len(tokenizer.encoded) == 3


def test_a_plain_prompt_too(tokenizer: Recording) -> None:
    text = "a" * MIN_CHARS
    expected = tokenizer.encode(text)
    assert [tokenizer.encode(text, tenant="anna") for _ in range(3)] == [expected] * 3
    assert tokenizer.encoded == [text] * 2


def test_no_tenant_finds_what_another_sent(tokenizer: Recording) -> None:
    text = "a" * MIN_CHARS
    tokenizer.encode(text, tenant="anna")
    tokenizer.encode(text, tenant="bert")
    assert tokenizer.encoded == [text] * 2


def test_found_ids_are_a_copy_that_the_caller_may_change_them() -> None:
    recent, text = RecentTexts(), "a" * MIN_CHARS
    recent.add("anna", text, [1, 2])
    found = recent.find("anna", text)
    assert found == [1, 2]
    found.append(3)
    assert recent.find("anna", text) == [1, 2]


def test_what_was_not_used_for_long_makes_room() -> None:
    recent = RecentTexts(max_bytes=3000)
    texts = [char * 600 for char in "abcdefgh"]
    recent.add("anna", texts[0], [1])
    for text in texts[1:]:
        recent.add("anna", text, [2])
        assert recent.find("anna", texts[0]) == [1]
        assert recent.num_bytes <= 3000
    assert [text[0] for text in texts if recent.find("anna", text)] == ["a", "f", "g", "h"]


def test_short_texts_and_those_larger_than_all_room_are_not_kept() -> None:
    recent = RecentTexts(max_bytes=1000)
    for text in ("short", "a" * 5000):
        recent.add("anna", text, [1])
        assert recent.find("anna", text) is None
    assert recent.num_bytes == 0
