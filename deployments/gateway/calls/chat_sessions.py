"""Sessions in the gateway: continue a kept conversation, and keep what was added.

A session keeps its token ids beside its messages: the next turn appends to exactly what the model
has read and written, so that all of it is found cached. Putting the messages through the chat
template again would not always give the same tokens: a template trims, and a text can be written
in other tokens than those that the model chose. Only thoughts are dropped when their turn is over:
models are trained without those of earlier turns, and a context would soon be full of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from cluster.errors import ConfigError, InvalidRequest, SessionInUse, UnknownSession
from cluster.tenants.sessions import Sessions, check_name
from deployments.gateway.calls.chat_request import to_chat_messages, to_options
from deployments.gateway.calls.output_collector import merge
from deployments.gateway.calls.remote_decoder import RemoteDecoder
from deployments.gateway.calls.tenant_threads import TenantThreads
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_TOOL_CALLS,
    ChatRequest,
    Generation,
    Message,
)

NO_OPTIONS = {"tools": [], "thinking": False}

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChatHistory:
    """A session as it was kept last; empty for a new one."""

    tenant: str
    name: str
    messages: list[dict[str, Any]]
    options: dict[str, Any]  # what the template writes before them: tools, thinking
    token_ids: list[int]  # to the end of the last answer; none if another model has read them
    version: str


class ChatSessions:
    """The sessions of all tenants, each used by one caller at a time."""

    def __init__(
        self,
        sessions: Sessions | None,
        decoder: RemoteDecoder,
        tokenizer: Tokenizer,
        encoding: TenantThreads,
    ) -> None:
        """Create the sessions of a gateway.

        Args:
            sessions: where they are kept; None without a store: every call raises ConfigError.
            decoder: tells which model is served, and what turns have left in the store.
            tokenizer: encodes and decodes messages.
            encoding: the threads that the tokenizer runs in.
        """
        self._sessions = sessions
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._encoding = encoding
        self._threads = TenantThreads("the store", num_threads=8, num_each=2, max_waiting=64)
        self._held: set[tuple[str, str]] = set()

    @property
    def sessions(self) -> Sessions:
        """Where sessions are kept; its calls block. Raises ConfigError."""
        if self._sessions is None:
            raise ConfigError(
                "This cluster keeps no sessions; start it with store.enabled and "
                "engine.prefix_caching set to true."
            )
        return self._sessions

    async def ask(self, tenant: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what a method of `sessions` returns, called in a thread. Raises Overloaded too."""
        return await self._threads.run(tenant, call, *args, **kwargs)

    def close(self) -> None:
        """Close the threads and the connection to the store."""
        self._threads.close()
        if self._sessions is not None:
            self._sessions.close()

    @contextmanager
    def hold(self, tenant: str, name: str) -> Iterator[None]:
        """Keep other callers of this gateway from a session.

        Raises SessionInUse, and InvalidRequest for an impossible name.
        """
        check_name(name)
        if (tenant, name) in self._held:
            raise SessionInUse(f"The session {name!r} is in use right now; try again later.")
        self._held.add((tenant, name))
        try:
            yield
        finally:
            self._held.remove((tenant, name))

    @contextmanager
    def turn(self, tenant: str, name: str) -> Iterator[SessionTurn | None]:
        """Hold a session for one turn, until the turn is kept; None without a name.

        Raises what `hold` raises.
        """
        with ExitStack() as held:
            if name:
                held.enter_context(self.hold(tenant, name))
            yield SessionTurn(self, tenant, name, held.close) if name else None

    async def load(self, tenant: str, name: str) -> ChatHistory:
        """Return a session as it was kept last. Raises UnknownSession."""
        kept = await self.ask(tenant, self.sessions.load, tenant, name)
        fingerprint = self._decoder.status.kv_fingerprint
        is_same_model = fingerprint != "" and kept.fingerprint == fingerprint
        token_ids = kept.content["token_ids"] if is_same_model else []
        messages, options = kept.content["messages"], kept.content.get("options", NO_OPTIONS)
        return ChatHistory(tenant, name, messages, options, token_ids, kept.version)

    async def encode(
        self, history: ChatHistory, new: Iterable[Message], options: dict[str, Any]
    ) -> list[int]:
        """Return the token ids of a session with new messages, up to where the answer begins.

        With other options than before, all of it is put through the chat template again.
        """
        messages = [*history.messages, *to_chat_messages(new)]
        if len(messages) == len(history.messages):
            raise InvalidRequest("A chat needs at least one message.")
        if not history.token_ids or history.options != options:
            return await self._render(history.tenant, messages, options)
        num_known, known_ids = len(history.messages), history.token_ids
        return await self._encoding.run(
            history.tenant, self._tokenizer.extend_chat, messages, num_known, known_ids, **options
        )

    async def encode_history(self, history: ChatHistory) -> list[int]:
        """Return the token ids that the next turn continues."""
        if history.token_ids:
            return history.token_ids
        return await self._render(history.tenant, history.messages, history.options)

    async def save(
        self,
        history: ChatHistory,
        turn: ChatRequest,
        prompt_ids: list[int],
        answer: Generation,
        block_keys: Sequence[bytes],
    ) -> None:
        """Add a turn to a session.

        Args:
            history: the session before the turn.
            turn: the request, with the turn's new messages.
            prompt_ids: what the model has read.
            answer: what it has written.
            block_keys: keys of the stored KV blocks that the next turn needs.

        Raises:
            SessionInUse: another gateway has added a turn meanwhile.
            StoreFull: the session exceeds the tenant's budget.
        """
        messages = [*history.messages, *to_chat_messages(turn.messages), _answer_turn(answer)]
        token_ids = self._lasting_ids(prompt_ids, answer)
        traces = self._decoder.traces(history.tenant, history.name)
        missing = await self.ask(
            history.tenant,
            self.sessions.save,
            history.tenant,
            history.name,
            {"messages": messages, "options": to_options(turn), "token_ids": token_ids},
            block_keys,
            fingerprint=self._decoder.status.kv_fingerprint,
            num_tokens=len(token_ids),
            version=history.version,
            traces=traces,
        )
        self._decoder.forget_traces(history.tenant, history.name, traces)
        # Many of them only wait to be written, which does no harm: nothing is written twice.
        self._decoder.tell_missing(history.tenant, missing)

    async def delete(self, tenant: str, name: str) -> None:
        """Remove a session and what cancelled turns have left in the store.

        Raises UnknownSession.
        """
        traces = self._decoder.traces(tenant, name)
        removed = await self.ask(tenant, self.sessions.delete, tenant, name, traces)
        self._decoder.forget_traces(tenant, name, traces)
        self._decoder.tell_missing(tenant, removed)

    async def _render(
        self, tenant: str, messages: list[dict[str, Any]], options: dict[str, Any]
    ) -> list[int]:
        return await self._encoding.run(
            tenant, self._tokenizer.apply_chat_template, messages, **options
        )

    def _lasting_ids(self, prompt_ids: list[int], answer: Generation) -> list[int]:
        """Return the prompt and the answer without the token that ended it, which the chat template
        writes, and without thoughts, unless the turn goes on with the results of tools.
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


class SessionTurn:
    """One turn of a session: its prompt is encoded, its answer collected, then both are kept."""

    def __init__(
        self, sessions: ChatSessions, tenant: str, name: str, release: Callable[[], None]
    ) -> None:
        """`release` lets others have the session."""
        self.name = name
        self._sessions = sessions
        self._tenant = tenant
        self._release = release
        self._answer = Generation()

    async def encode(self, request: ChatRequest) -> list[int]:
        """Return the token ids of the session so far with the request's messages."""
        try:
            self._history = await self._sessions.load(self._tenant, self.name)
        except UnknownSession:
            self._history = ChatHistory(self._tenant, self.name, [], NO_OPTIONS, [], "")
        options, self._request = to_options(request), request
        self._prompt_ids = await self._sessions.encode(self._history, request.messages, options)
        return self._prompt_ids

    def add(self, piece: Generation) -> None:
        """Collect a piece of the answer."""
        merge(self._answer, piece)

    async def keep(self, block_keys: Sequence[bytes]) -> None:
        """Save the turn and release the session. Raises what `ChatSessions.save` raises."""
        await self._sessions.save(
            self._history, self._request, self._prompt_ids, self._answer, block_keys
        )
        self._release()


def _answer_turn(answer: Generation) -> dict[str, Any]:
    """Return the answer as a message, without the tool calls of one that was cut: they may not be
    whole.
    """
    said = Message(role="assistant", content=answer.text, thought=answer.thought)
    if answer.finish_reason == FINISH_REASON_TOOL_CALLS:
        for call in answer.tool_calls:
            said.tool_calls.add(id=call.id, name=call.name, arguments=call.arguments)
    return to_chat_messages([said])[0]
