"""Kept conversations in the gateway: go on from where one was, and keep what was added.

A conversation keeps its token ids beside its messages: the next turn appends to exactly what the
model has read and written, so that all of it is found cached. Putting the messages through the chat
template again would not always give the same tokens: a template trims, and a text can be written
in other tokens than those that the model chose.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.errors import ConfigError, InvalidRequest, SessionInUse, UnknownSession
from cluster.sessions import Sessions, check_name
from deployments.remote_decoder import RemoteDecoder
from protos.briolette.v1.inference_pb2 import FINISH_REASON_STOP, Generation, Message


class ChatTokenizer(Protocol):
    """What the gateway needs of engine.tokenizer.Tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def encode_plain(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def apply_chat_template(self, messages: list[dict[str, Any]]) -> list[int]: ...
    def extend_chat(
        self, messages: list[dict[str, Any]], num_known: int, known_ids: Sequence[int]
    ) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Conversation:
    """As it was kept last; empty where it begins."""

    tenant: str
    name: str
    messages: list[dict[str, Any]]
    token_ids: list[int]  # up to the end of the last answer; none where the model was another one
    version: str


class Conversations:
    """The kept conversations of all tenants, one caller at a time for each."""

    def __init__(
        self, sessions: Sessions | None, decoder: RemoteDecoder, tokenizer: ChatTokenizer
    ) -> None:
        """`sessions` is None where there is no store: then every call raises ConfigError."""
        self._sessions = sessions
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._held: set[tuple[str, str]] = set()

    @property
    def sessions(self) -> Sessions:
        """Where they are kept; its calls block. Raises ConfigError."""
        if self._sessions is None:
            raise ConfigError(
                "This cluster keeps no sessions; start it with store.enabled and "
                "engine.prefix_caching set to true."
            )
        return self._sessions

    @asynccontextmanager
    async def hold(self, tenant: str, name: str) -> AsyncIterator[None]:
        """Nobody else uses it meanwhile in this gateway. Raises SessionInUse, InvalidRequest."""
        check_name(name)
        if (tenant, name) in self._held:
            raise SessionInUse(f"The session {name!r} is in use right now; try again later.")
        self._held.add((tenant, name))
        try:
            yield
        finally:
            self._held.remove((tenant, name))

    async def load(self, tenant: str, name: str) -> Conversation:
        """Raises UnknownSession."""
        kept = await asyncio.to_thread(self.sessions.load, tenant, name)
        fingerprint = self._decoder.status.kv_fingerprint
        is_same_model = fingerprint != "" and kept.fingerprint == fingerprint
        token_ids = kept.content["token_ids"] if is_same_model else []
        return Conversation(tenant, name, kept.content["messages"], token_ids, kept.version)

    async def load_or_begin(self, tenant: str, name: str) -> Conversation:
        try:
            return await self.load(tenant, name)
        except UnknownSession:
            return Conversation(tenant, name, [], [], "")

    async def prompt(self, conversation: Conversation, new: Iterable[Message]) -> list[int]:
        """Token ids of the conversation with new messages, up to where the answer begins."""
        messages = [*conversation.messages, *to_turns(new)]
        if len(messages) == len(conversation.messages):
            raise InvalidRequest("A chat needs at least one message.")
        if not conversation.token_ids:
            return await asyncio.to_thread(self._tokenizer.apply_chat_template, messages)
        known = len(conversation.messages), conversation.token_ids
        return await asyncio.to_thread(self._tokenizer.extend_chat, messages, *known)

    async def whole(self, conversation: Conversation) -> list[int]:
        """Token ids from which the next turn goes on."""
        if conversation.token_ids:
            return conversation.token_ids
        return await asyncio.to_thread(self._tokenizer.apply_chat_template, conversation.messages)

    async def keep(
        self,
        before: Conversation,
        new: Iterable[Message],
        prompt_ids: list[int],
        answer: Generation,
        block_keys: Sequence[bytes],
    ) -> None:
        """Add a turn. Raises SessionInUse where somebody else has added one, StoreFull."""
        said = {"role": "assistant", "content": answer.text}
        token_ids = prompt_ids + self._answer_ids(answer)
        traces = self._decoder.traces(before.tenant, before.name)
        missing = await asyncio.to_thread(
            self.sessions.save,
            before.tenant,
            before.name,
            {"messages": [*before.messages, *to_turns(new), said], "token_ids": token_ids},
            block_keys,
            fingerprint=self._decoder.status.kv_fingerprint,
            num_tokens=len(token_ids),
            version=before.version,
            traces=traces,
        )
        self._decoder.forget_traces(before.tenant, before.name, traces)
        # Many of them only wait to be written, which does no harm: nothing is written twice.
        self._decoder.tell_missing(before.tenant, missing)

    async def delete(self, tenant: str, name: str) -> None:
        """Remove it and what cancelled turns have left from the store. Raises UnknownSession."""
        traces = self._decoder.traces(tenant, name)
        removed = await asyncio.to_thread(self.sessions.delete, tenant, name, traces)
        self._decoder.forget_traces(tenant, name, traces)
        self._decoder.tell_missing(tenant, removed)

    def _answer_ids(self, answer: Generation) -> list[int]:
        """The answer's tokens without the one that ended it, which the chat template writes."""
        if answer.matched_stop:  # the text ends before it, the tokens don't
            return self._tokenizer.encode_plain(answer.text)
        is_ended = answer.finish_reason == FINISH_REASON_STOP
        return list(answer.token_ids[:-1] if is_ended else answer.token_ids)


def to_turns(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as the chat template takes them."""
    return [{"role": message.role, "content": message.content} for message in messages]
