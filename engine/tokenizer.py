"""Text to token ids and back: chat template, incremental detokenizer, stop strings."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from cluster.errors import CheckpointError, InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
TURN_CLOSE = "<turn|>"  # ends every turn in Gemma 4's chat format


class Tokenizer:
    """One model's tokenizer. Encoding and decoding keep no state, so threads may share it."""

    def __init__(self, hf_tokenizer: Any) -> None:
        """Wrap a fast transformers tokenizer (a `PreTrainedTokenizerFast`).

        Raises CheckpointError when its decoder is of a kind that Gemma doesn't use.
        """
        self._hf = hf_tokenizer
        self._backend: Any = hf_tokenizer.backend_tokenizer
        self._special_ids = {
            token_id
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        } | set(hf_tokenizer.all_special_ids)
        self._token_to_bytes = _token_to_bytes(json.loads(self._backend.decoder.__getstate__()))
        self._id_to_bytes: dict[int, bytes] = {}  # filled as ids are met
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.bos_id: int | None = hf_tokenizer.bos_token_id
        ends = (hf_tokenizer.eos_token_id, self._backend.token_to_id(TURN_CLOSE))
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ends if i is not None))

    @staticmethod
    def load(model_dir: Path) -> Tokenizer:
        """Read the tokenizer files of a local model directory.

        Raises CheckpointError when they are missing or broken.
        """
        from transformers import AutoTokenizer  # takes seconds to import

        if not (model_dir / "tokenizer.json").is_file():
            raise CheckpointError(f"{model_dir} has no tokenizer.json.")
        try:
            hf_tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception for a broken file
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(
                f"The tokenizer in {model_dir} can't be read: {reason}"
            ) from error
        return Tokenizer(hf_tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text for completion, begun by BOS where the model has one."""
        ids = self._encode(text)
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of token ids, special tokens skipped; U+FFFD for bytes that are no character."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the model's answer begins.

        A message has a `role` and a `content`: a string or a list of `{"type": "text", "text": …}`.
        Raises InvalidRequest for a conversation that the template can't express.
        """
        _check_messages(messages)
        if not self._hf.chat_template:
            raise InvalidRequest("This model has no chat template; ask for a completion instead.")
        try:
            text: str = self._hf.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(f"The chat template refuses the messages: {error}") from error
        return self._encode(text)  # the template has written BOS

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; none for special and unknown ids."""
        data = self._id_to_bytes.get(token_id)
        if data is None:
            token = None if token_id in self._special_ids else self._backend.id_to_token(token_id)
            data = b"" if token is None else self._token_to_bytes(token)
            self._id_to_bytes[token_id] = data
        return data

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("The text has a lone surrogate, which is no character.") from None
        return list(self._backend.encode(text, add_special_tokens=False).ids)


class TextStream:
    """Turns the tokens of one request into text deltas, in time linear in the tokens.

    The deltas joined are what `Tokenizer.decode` gives for all tokens, cut before the first stop
    string. The unfinished bytes of a character and text that may yet become a stop string are held
    back; U+FFFD appears for bytes that no later token can complete. A stop string is found
    where it is first complete, however the tokens cut it, and is no part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_StopMatcher(text) for text in stop]
        self._held = ""  # may be the beginning of a stop string
        self._is_finished = False

    def push(self, token_ids: Iterable[int]) -> tuple[str, str | None]:
        """Add tokens; returns the text that is now certain, and the stop string if one was met."""
        assert not self._is_finished, "the stream has ended"
        text = self._utf8.decode(b"".join(map(self._token_bytes, token_ids)))
        if not self._matchers:
            return text, None
        return self._until_stop(text)

    def finish(self) -> str:
        """End the stream; returns what was held back. Nothing after a stop string."""
        if self._is_finished:
            return ""
        self._is_finished = True
        return self._held + self._utf8.decode(b"", final=True)

    def _until_stop(self, text: str) -> tuple[str, str | None]:
        for index, char in enumerate(text):
            met = [matcher.text for matcher in self._matchers if matcher.push(char)]
            if met:
                stop = max(met, key=len)  # the one that began first
                self._is_finished = True
                return (self._held + text[: index + 1])[: -len(stop)], stop
        text = self._held + text
        cut = len(text) - max(matcher.num_matched for matcher in self._matchers)
        self._held = text[cut:]
        return text[:cut], None


class _StopMatcher:
    """Knuth-Morris-Pratt: how many characters of `text` the characters seen so far end with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = [0] * len(text)  # longest proper prefix of text[:i + 1] that also ends it
        for i in range(1, len(text)):
            self._borders[i] = self._advance(self._borders[i - 1], text[i])

    def push(self, char: str) -> bool:
        """Take one character; true when it completes the stop string."""
        self.num_matched = self._advance(self.num_matched, char)
        return self.num_matched == len(self.text)

    def _advance(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._borders[matched - 1]
        return matched + 1 if self.text[matched] == char else 0


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise InvalidRequest("A chat needs at least one message.")
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise InvalidRequest(f"messages[{index}] has the unknown role {role!r}; use {known}.")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                raise InvalidRequest(f"messages[{index}] has a part that is not text.")
            if not isinstance(part.get("text"), str):
                raise InvalidRequest(f"messages[{index}] has no text.")


def _token_to_bytes(decoder: Mapping[str, Any]) -> Callable[[str], bytes]:
    """The bytes of a token by the decoder of tokenizer.json.

    Byte-level BPE and Gemma's pieces with byte fallback spell each token on its own, whatever
    stands before it. So a text is the joined bytes of its tokens, which is exact and linear.
    Raises CheckpointError for a decoder that looks at neighbouring tokens.
    """
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    replacements = [
        (step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"
    ]
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse"}:
        return lambda token: _byte_fallback(token, replacements, "ByteFallback" in kinds)
    raise CheckpointError(f"The tokenizer's decoder {'+'.join(kinds)} is not one that Gemma uses.")


def _byte_fallback(token: str, replacements: list[tuple[str, str]], has_fallback: bool) -> bytes:
    if has_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    for pattern, content in replacements:
        token = token.replace(pattern, content)
    return token.encode()


def _byte_level(token: str) -> bytes:
    """Each byte is written as one printable character; added tokens are written as they are."""
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        return token.encode()


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
