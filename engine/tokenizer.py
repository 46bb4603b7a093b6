"""Text to token ids and back: chat template, incremental detokenizer, stop strings."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from cluster.errors import CheckpointError, InvalidRequest
from engine.token_bytes import token_to_bytes

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
TURN_CLOSE = "<turn|>"  # ends every turn in Gemma 4's chat format
MARK = "\udc00"  # half a surrogate pair: no character, so no text that a user sends can hold it
ANSWER = "\udc01"  # the same; stands in a rendered conversation for an answer that is known as ids


class Tokenizer:
    """One model's tokenizer. Encoding and decoding keep no state, so threads may share it.

    Control tokens (the special ones of the tokenizer: `<|turn>` and its like) are found here and
    not by the tokenizers library, which can't tell who wrote one. In a conversation only those that
    the chat template writes count, in a plain prompt those that stand in its text.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        """Take over a fast transformers tokenizer (a `PreTrainedTokenizerFast`).

        Raises CheckpointError when its decoder is of a kind that Gemma doesn't use, or when it
        writes a control token for plain text.
        """
        self._hf = hf_tokenizer
        self._backend: Any = hf_tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True  # as text: whatever it is given is plain
        self._special_ids = {
            token_id
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        } | set(hf_tokenizer.all_special_ids)
        self._control_ids = {self._backend.id_to_token(i): i for i in sorted(self._special_ids)}
        self._control_token = _any_of(self._control_ids)
        self._template = self._marked_template()
        self._variables = self._marked_variables()
        self._check_plain()
        self._token_to_bytes = token_to_bytes(json.loads(self._backend.decoder.__getstate__()))
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
        except Exception as error:  # at the start; for a broken file the library raises a bare one
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(
                f"The tokenizer in {model_dir} can't be read: {reason}"
            ) from error
        return Tokenizer(hf_tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt for completion, begun by BOS where the model has one.

        A control token in the text counts as one: whoever completes a prompt writes all of it, the
        turns of a chat format too. Text of others belongs in a conversation.
        """
        ids = self._encode(text)
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which nothing counts as a control token."""
        _check_text(text)
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of token ids, special tokens skipped; U+FFFD for bytes that are no character."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the model's answer begins.

        A message has a `role` and a `content`: a string or a list of `{"type": "text", "text": …}`.
        All of it is plain text to the model, `<|turn>` too. Raises InvalidRequest for a
        conversation that the template can't express.
        """
        return self._join(self._render(_checked_messages(messages)).split(MARK), int)

    def extend_chat(
        self, messages: Sequence[Mapping[str, Any]], num_known: int, known_ids: Sequence[int]
    ) -> list[int]:
        """The same for a conversation of which the first `num_known` messages, the last of them an
        answer of the model's, are known as ids, without the token that ended that answer.

        What follows is appended to exactly these ids, whatever the template would write for the
        answer now; where it would leave it out, the whole conversation goes through the template.
        """
        turns = _checked_messages(messages)
        answered = turns.copy()
        answered[num_known - 1] = {"role": turns[num_known - 1]["role"], "content": ANSWER}
        _, *after = self._render(answered).split(ANSWER)
        if len(after) != 1:
            return self.apply_chat_template(messages)
        return [*known_ids, *self._join(after[0].split(MARK), int)]

    def _render(self, turns: Sequence[Mapping[str, Any]]) -> str:
        """The template's text, its control tokens marked; it has written BOS."""
        if self._template is None:
            raise InvalidRequest("This model has no chat template; ask for a completion instead.")
        try:
            text: str = self._hf.apply_chat_template(
                turns,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = str(error).replace(MARK, "").replace(ANSWER, "")
            raise InvalidRequest(f"The chat template refuses the messages: {reason}") from error
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; none for special and unknown ids."""
        data = self._id_to_bytes.get(token_id)
        if data is None:
            token = None if token_id in self._special_ids else self._backend.id_to_token(token_id)
            data = b"" if token is None else self._token_to_bytes(token)
            self._id_to_bytes[token_id] = data
        return data

    def _encode(self, text: str) -> list[int]:
        """Token ids of a text in which control tokens count."""
        return self._join(self._control_token.split(text), self._control_ids.__getitem__)

    def _join(self, pieces: Sequence[str], control_id: Callable[[str], int]) -> list[int]:
        """Token ids of plain texts with a control token between each two of them.

        The library too encodes what lies between control tokens piece by piece, so the ids are the
        ones that it gives for the whole.
        """
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            ids += [control_id(piece)] if index % 2 else self.encode_plain(piece)
        return ids

    def _marked_template(self) -> str | None:
        """The chat template with its control tokens marked: `MARK`, the id, `MARK`."""
        if not self._hf.chat_template:
            return None
        template: str = self._hf.get_chat_template()
        return self._control_token.sub(lambda match: self._mark(match[0]), template)

    def _marked_variables(self) -> dict[str, str]:
        """`bos_token` and the other variables by which a template may write a control token."""
        variables: dict[str, Any] = self._hf.special_tokens_map
        return {
            name: self._mark(token)
            for name, token in variables.items()
            if isinstance(token, str) and token in self._control_ids
        }

    def _mark(self, control_token: str) -> str:
        return f"{MARK}{self._control_ids[control_token]}{MARK}"

    def _check_plain(self) -> None:
        """No text gives a control token, but for the one that means unknown characters."""
        for token, token_id in self._control_ids.items():
            if token_id in self.encode_plain(token) and token_id != self._hf.unk_token_id:
                raise CheckpointError(
                    f"The tokenizer gives {token!r} for plain text, so any user could write it."
                )


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


def _checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The role and the content of each message and nothing else, all of it known to be text."""
    if not messages:
        raise InvalidRequest("A chat needs at least one message.")
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise InvalidRequest(f"messages[{index}] has the unknown role {role!r}; use {known}.")
        if isinstance(content, list):
            parts = [{"type": "text", "text": _part_text(part, index)} for part in content]
            turns.append({"role": role, "content": parts})
        else:
            turns.append({"role": role, "content": _message_text(content, index)})
    return turns


def _part_text(part: Any, index: int) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        raise InvalidRequest(f"messages[{index}] has a part that is not text.")
    return _message_text(part.get("text"), index)


def _message_text(text: Any, index: int) -> str:
    if not isinstance(text, str):
        raise InvalidRequest(f"messages[{index}] has no text.")
    _check_text(text)
    return text


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("The text has a lone surrogate, which is no character.") from None


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches one of the texts, the longest where several begin."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
