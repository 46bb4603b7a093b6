"""Text to token ids and back: plain texts, prompts, conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from engine.text.chat_messages import check_text, to_declarations, to_turns
from engine.text.chat_template import MARK, ChatTemplate
from engine.text.dialect import CALL_CLOSE, RESPONSE_OPEN, THOUGHT, TURN_CLOSE, Dialect
from engine.text.recent_texts import RecentTexts
from engine.text.token_bytes import token_to_bytes


class Tokenizer:
    """One model's tokenizer. Threads may share it. Where a tenant is named, its long texts are
    remembered, so that they needn't be encoded again; the ids are the same.

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
        self.dialect = Dialect.find(self._backend.token_to_id)
        self._special_ids |= self.dialect.token_ids  # checkpoints call them special; if one didn't
        self._control_ids = {self._backend.id_to_token(i): i for i in sorted(self._special_ids)}
        self._control_token = _any_of(self._control_ids)
        self._template = ChatTemplate(hf_tokenizer, self._control_ids, self._control_token)
        self._check_plain()
        self._token_to_bytes = token_to_bytes(json.loads(self._backend.decoder.__getstate__()))
        self._id_to_bytes: dict[int, bytes] = {}  # filled as ids are met
        self._recent = RecentTexts()
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        # As the tokenizer writes it, with two or three bytes for some that are one in the text.
        self.longest_token_bytes = max(len(t.encode()) for t in self._backend.get_vocab())
        self.bos_id: int | None = hf_tokenizer.bos_token_id
        ends = (hf_tokenizer.eos_token_id, *map(self._control_ids.get, (TURN_CLOSE, RESPONSE_OPEN)))
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

    def encode(self, text: str, *, tenant: str | None = None) -> list[int]:
        """Token ids of a plain prompt for completion, begun by BOS where the model has one.

        A control token in the text counts as one: whoever completes a prompt writes all of it, the
        turns of a chat format too. Text of others belongs in a conversation.
        """
        ids = self._encode(text, tenant)
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which nothing counts as a control token."""
        check_text(text)
        # As a batch of one: for a single text the library would hold up all other threads.
        return list(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of token ids, special tokens skipped; U+FFFD for bytes that are no character."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool = False,
        tenant: str | None = None,
    ) -> list[int]:
        """Token ids of a conversation up to where the model's answer begins.

        A message has a `role` and a `content`: a string or a list of `{"type": "text", "text": …}`;
        an assistant's may have a `thought` and `tool_calls` (`id`, `name`, `arguments`: a JSON
        object, as text or not), a tool's has the `tool_call_id` that it answers. A tool has a
        `name`, a `description` and `parameters`: a JSON schema. All of it is plain text to the
        model, `<|turn>` too. Raises InvalidRequest for what the template can't express.
        """
        rendered = self._template.render(to_turns(messages), to_declarations(tools), thinking)
        return self._join(rendered.split(MARK), int, tenant)

    def extend_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        num_known: int,
        known_ids: Sequence[int],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool = False,
    ) -> list[int]:
        """The same for a conversation of which the first `num_known` messages, the last of them an
        answer of the model's, are known as ids, without the token that ended that answer.

        What follows is appended to exactly these ids, whatever the template would write for the
        answer now; where it would leave it out, the whole conversation goes through the template.
        """
        after = self._template.render_after(
            to_turns(messages), num_known, CALL_CLOSE, to_declarations(tools), thinking
        )
        if after is None:
            return self.apply_chat_template(messages, tools=tools, thinking=thinking)
        return [*known_ids, *self._join(after.split(MARK), int)]

    def thoughts(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Where [start, stop) a conversation's ids hold what the model thought in its last turn.

        A thought that is empty and closed is none: templates write one to switch thinking off.
        """
        spans = self.dialect.thoughts(token_ids)
        return [(start, stop) for start, stop in spans if not self._is_empty(token_ids[start:stop])]

    def _is_empty(self, thought_ids: Sequence[int]) -> bool:
        is_closed = thought_ids[-1] == self.dialect.thought_close
        return is_closed and THOUGHT.startswith(self.decode(thought_ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; none for special and unknown ids."""
        data = self._id_to_bytes.get(token_id)
        if data is None:
            token = None if token_id in self._special_ids else self._backend.id_to_token(token_id)
            data = b"" if token is None else self._token_to_bytes(token)
            self._id_to_bytes[token_id] = data
        return data

    def _encode(self, text: str, tenant: str | None = None) -> list[int]:
        """Token ids of a text in which control tokens count."""
        return self._join(self._control_token.split(text), self._control_ids.__getitem__, tenant)

    def _join(
        self, pieces: Sequence[str], control_id: Callable[[str], int], tenant: str | None = None
    ) -> list[int]:
        """Token ids of plain texts with a control token between each two of them.

        The library too encodes what lies between control tokens piece by piece, so the ids are the
        ones that it gives for the whole.
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
        """No text gives a control token, but for the one that means unknown characters."""
        for token, token_id in self._control_ids.items():
            if token_id in self.encode_plain(token) and token_id != self._hf.unk_token_id:
                raise CheckpointError(
                    f"The tokenizer gives {token!r} for plain text, so any user could write it."
                )


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches one of the texts, the longest where several begin."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
