"""Text to token ids and back: plain text, prompts and conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from engine.text.chat_messages import ChatMessage, ToolDefinition, check_text
from engine.text.chat_template import MARK, ChatTemplate
from engine.text.dialect import CALL_CLOSE, RESPONSE_OPEN, THOUGHT, TURN_CLOSE, Dialect
from engine.text.recent_texts import RecentTexts
from engine.text.token_bytes import token_to_bytes


class Tokenizer:
    """One model's tokenizer. Threads may share it.

    Control tokens (the tokenizer's special tokens, such as `<|turn>`) are found here and not by the
    tokenizers library, which can't tell where one comes from. In a conversation only those of the
    chat template count; in a prompt for completion, those in its text.

    Methods that take a `tenant` keep its recent long texts with their ids, so that a conversation
    that is sent again with each turn is encoded only once. The ids are the same without.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        """Take over a fast transformers tokenizer (a `PreTrainedTokenizerFast`), which must not be
        used elsewhere.

        Raises:
            CheckpointError: Its decoder is of a kind that Gemma doesn't use, or it encodes plain
                text to a control token.
        """
        self._hf = hf_tokenizer
        self._backend: Any = hf_tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True  # as text: the library only sees plain text
        special_ids = {
            token_id
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        } | set(hf_tokenizer.all_special_ids)
        self.dialect = Dialect.find(self._backend.token_to_id)
        # The dialect's tokens too, in case a checkpoint doesn't mark one as special.
        self.control_ids = frozenset(special_ids | self.dialect.token_ids)
        self._token_to_control_id = {
            self._backend.id_to_token(i): i for i in sorted(self.control_ids)
        }
        self._control_token = _any_of(self._token_to_control_id)
        self._template = ChatTemplate(hf_tokenizer, self._token_to_control_id, self._control_token)
        self._check_plain()
        self._token_to_bytes = token_to_bytes(json.loads(self._backend.decoder.__getstate__()))
        self._id_to_bytes: dict[int, bytes] = {}  # filled as ids are met
        self._recent = RecentTexts()
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        # In the vocabulary's spelling, which has two or three bytes for some single ones.
        self.longest_token_bytes = max(len(t.encode()) for t in self._backend.get_vocab())
        self.bos_id: int | None = hf_tokenizer.bos_token_id
        ends = map(self._token_to_control_id.get, (TURN_CLOSE, RESPONSE_OPEN))
        eos_ids = (i for i in (hf_tokenizer.eos_token_id, *ends) if i is not None)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids))

    @staticmethod
    def load(model_dir: Path) -> Tokenizer:
        """Read the tokenizer files of a local model directory.

        Raises:
            CheckpointError: They are missing or broken.
        """
        from transformers import AutoTokenizer  # takes seconds to import

        if not (model_dir / "tokenizer.json").is_file():
            raise CheckpointError(f"{model_dir} has no tokenizer.json.")
        try:
            hf_tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        # border: transformers raises a bare Exception for a broken file
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(
                f"The tokenizer in {model_dir} can't be read: {reason}"
            ) from error
        return Tokenizer(hf_tokenizer)

    def encode(self, text: str, *, add_bos: bool = True, tenant: str | None = None) -> list[int]:
        """Encode a prompt for completion. Control tokens in the text count as such, so a prompt may
        spell out the turns of a chat; text of third parties belongs in a conversation.

        Args:
            text: The whole prompt.
            add_bos: True to begin with BOS, if the model has one and the text doesn't.
            tenant: Keep and find long texts for this tenant.

        Returns:
            Token ids.
        """
        pieces = self._control_token.split(text)
        ids = self._join(pieces, self._token_to_control_id.__getitem__, tenant)
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Encode text in which nothing counts as a control token."""
        check_text(text)
        # As a batch of one: for a single text the library would block all other threads.
        return list(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of token ids without control tokens; invalid bytes become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def apply_chat_template(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[ToolDefinition] = (),
        thinking: bool = False,
        tenant: str | None = None,
    ) -> list[int]:
        """Encode a conversation up to the beginning of the model's answer.

        Args:
            messages: The conversation; its contents are plain text to the model, `<|turn>` too.
            tools: The tools that the model may call.
            thinking: True to let the model think before it answers.
            tenant: Keep and find long texts for this tenant.

        Returns:
            Token ids, BOS first if the template writes it.

        Raises:
            InvalidRequest: A message or tool is malformed, or the template can't express it.
        """
        rendered = self._template.render(messages, tools, thinking)
        return self._join(rendered.split(MARK), int, tenant)

    def extend_chat(
        self,
        messages: Sequence[ChatMessage],
        num_known: int,
        known_ids: Sequence[int],
        *,
        tools: Sequence[ToolDefinition] = (),
        thinking: bool = False,
    ) -> list[int]:
        """Encode a conversation whose beginning is known as token ids.

        The rest is appended to exactly these ids, even where the template would write the answer
        differently now. If it would drop the answer, the whole conversation is encoded anew.

        Args:
            messages: The whole conversation.
            num_known: How many messages are known; the last of them is the model's answer.
            known_ids: Their ids, without the token that ended the answer.
            tools: The tools that the model may call.
            thinking: True to let the model think before it answers.

        Returns:
            Token ids up to the beginning of the model's next answer.

        Raises:
            InvalidRequest: A message or tool is malformed, or the template can't express it.
        """
        after = self._template.render_after(messages, num_known, CALL_CLOSE, tools, thinking)
        if after is None:
            return self.apply_chat_template(messages, tools=tools, thinking=thinking)
        return [*known_ids, *self._join(after.split(MARK), int)]

    def thoughts(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return the ranges [start, stop) of the model's thoughts in the last turn.

        An empty, closed thought doesn't count: templates write one to switch thinking off.
        """
        spans = self.dialect.thoughts(token_ids)
        return [(start, stop) for start, stop in spans if not self._is_empty(token_ids[start:stop])]

    def _is_empty(self, thought_ids: Sequence[int]) -> bool:
        is_closed = thought_ids[-1] == self.dialect.thought_close
        return is_closed and THOUGHT.startswith(self.decode(thought_ids))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to the text; none for control and unknown ids."""
        data = self._id_to_bytes.get(token_id)
        if data is None:
            token = None if token_id in self.control_ids else self._backend.id_to_token(token_id)
            data = b"" if token is None else self._token_to_bytes(token)
            self._id_to_bytes[token_id] = data
        return data

    def _join(
        self, pieces: Sequence[str], control_id: Callable[[str], int], tenant: str | None = None
    ) -> list[int]:
        """Encode plain texts that alternate with control tokens.

        The library, too, encodes the text between control tokens piece by piece, so the ids equal
        those that it gives for the whole.
        """
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            ids += [control_id(piece)] if index % 2 else self._encode_piece(piece, tenant)
        return ids

    def _encode_piece(self, text: str, tenant: str | None) -> list[int]:
        if tenant is None:
            return self.encode_plain(text)
        ids = self._recent.find(tenant, text)
        if ids is None:
            ids = self.encode_plain(text)
            self._recent.add(tenant, text, ids)
        return ids

    def _check_plain(self) -> None:
        """Raise CheckpointError if plain text encodes to a control token, other than the one for
        unknown characters.
        """
        for token, token_id in self._token_to_control_id.items():
            if token_id in self.encode_plain(token) and token_id != self._hf.unk_token_id:
                raise CheckpointError(
                    f"The tokenizer encodes the plain text {token!r} to a control token, so any "
                    "user could inject it."
                )


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the texts, the longest first."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
