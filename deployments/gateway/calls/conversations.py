"""Kept conversations in the gateway: go on from where one was, and keep what was added.

A conversation keeps its token ids beside its messages: the next turn appends to exactly what the
model has read and written, so that all of it is found cached. Putting the messages through the chat
template again would not always give the same tokens: a template trims, and a text can be written
in other tokens than those that the model chose. Only thoughts go, as soon as their turn is over:
models are trained without those of earlier turns, and a context would soon be full of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from cluster.errors import ConfigError, InvalidRequest, SessionInUse, UnknownSession
from cluster.tenants.sessions import Sessions, check_name
from deployments.gateway.calls.chat_request import to_turns
from deployments.gateway.calls.remote_decoder import RemoteDecoder
from deployments.gateway.calls.tenant_threads import TenantThreads
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_TOOL_CALLS,
    Generation,
    Message,
)

NO_OPTIONS = {"tools": [], "thinking": False}

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Conversation:
    """As it was kept last; empty where it begins."""

    tenant: str
    name: str
    messages: list[dict[str, Any]]
    options: dict[str, Any]  # what stands before them: tools, thinking
    token_ids: list[int]  # up to the end of the last answer; none where the model was another one
    version: str


class Conversations:
    """The kept conversations of all tenants, one caller at a time for each."""

    def __init__(
        self,
        sessions: Sessions | None,
        decoder: RemoteDecoder,
        tokenizer: Tokenizer,
        encoding: TenantThreads,
    ) -> None:
        """`sessions` is None where there is no store: then every call raises ConfigError. The
        tokenizer runs in the threads of `encoding`.
        """
        self._sessions = sessions
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._encoding = encoding
        self._threads = TenantThreads("the store", num_threads=8, num_each=2, max_waiting=64)
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

    async def ask(self, tenant: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a call of `sessions` returns, made in a thread. Raises Overloaded too."""
        return await self._threads.run(tenant, call, *args, **kwargs)

    def close(self) -> None:
        """Hang up."""
        self._threads.close()
        if self._sessions is not None:
            self._sessions.close()

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
        kept = await self.ask(tenant, self.sessions.load, tenant, name)
        fingerprint = self._decoder.status.kv_fingerprint
        is_same_model = fingerprint != "" and kept.fingerprint == fingerprint
        token_ids = kept.content["token_ids"] if is_same_model else []
        messages, options = kept.content["messages"], kept.content.get("options", NO_OPTIONS)
        return Conversation(tenant, name, messages, options, token_ids, kept.version)

    async def load_or_begin(self, tenant: str, name: str) -> Conversation:
        try:
            return await self.load(tenant, name)
        except UnknownSession:
            return Conversation(tenant, name, [], NO_OPTIONS, [], "")

    async def prompt(
        self, conversation: Conversation, new: Iterable[Message], options: dict[str, Any]
    ) -> list[int]:
        """Token ids of the conversation with new messages, up to where the answer begins.

        With other options than before, all of it is put through the chat template.
        """
        messages = [*conversation.messages, *to_turns(new)]
        if len(messages) == len(conversation.messages):
            raise InvalidRequest("A chat needs at least one message.")
        if not conversation.token_ids or conversation.options != options:
            return await self._encoding.run(
                conversation.tenant, self._tokenizer.apply_chat_template, messages, **options
            )
        known = len(conversation.messages), conversation.token_ids
        return await self._encoding.run(
            conversation.tenant, self._tokenizer.extend_chat, messages, *known, **options
        )

    async def whole(self, conversation: Conversation) -> list[int]:
        """Token ids from which the next turn goes on."""
        if conversation.token_ids:
            return conversation.token_ids
        return await self._encoding.run(
            conversation.tenant,
            self._tokenizer.apply_chat_template,
            conversation.messages,
            **conversation.options,
        )

    async def keep(
        self,
        before: Conversation,
        new: Iterable[Message],
        options: dict[str, Any],
        prompt_ids: list[int],
        answer: Generation,
        block_keys: Sequence[bytes],
    ) -> None:
        """Add a turn. Raises SessionInUse where somebody else has added one, StoreFull."""
        messages = [*before.messages, *to_turns(new), _said(answer)]
        token_ids = self._lasting_ids(prompt_ids, answer)
        traces = self._decoder.traces(before.tenant, before.name)
        missing = await self.ask(
            before.tenant,
            self.sessions.save,
            before.tenant,
            before.name,
            {"messages": messages, "options": options, "token_ids": token_ids},
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
        removed = await self.ask(tenant, self.sessions.delete, tenant, name, traces)
        self._decoder.forget_traces(tenant, name, traces)
        self._decoder.tell_missing(tenant, removed)

    def _lasting_ids(self, prompt_ids: list[int], answer: Generation) -> list[int]:
        """The prompt and the answer without the token that ended it, which the chat template
        writes; without thoughts, unless the turn goes on with what the tools bring.
        """
        if answer.matched_stop:  # the text ends before it, the tokens don't
            text_ids = self._tokenizer.encode_plain(answer.text)
            return self._without_thoughts(prompt_ids) + text_ids
        is_cut = answer.finish_reason == FINISH_REASON_LENGTH
        token_ids = prompt_ids + list(answer.token_ids if is_cut else answer.token_ids[:-1])
        if answer.finish_reason == FINISH_REASON_TOOL_CALLS:
            return token_ids
        return self._without_thoughts(token_ids)

    def _without_thoughts(self, token_ids: list[int]) -> list[int]:
        lasting = token_ids.copy()
        for start, stop in reversed(self._tokenizer.thoughts(token_ids)):
            del lasting[start:stop]
        return lasting


def _said(answer: Generation) -> dict[str, Any]:
    """The answer as a message. Calls don't count in one that was cut: they may not be whole."""
    said = Message(role="assistant", content=answer.text, thought=answer.thought)
    if answer.finish_reason == FINISH_REASON_TOOL_CALLS:
        for call in answer.tool_calls:
            said.tool_calls.add(id=call.id, name=call.name, arguments=call.arguments)
    return to_turns([said])[0]
